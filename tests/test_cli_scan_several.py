"""`tacext scan` of several models: each by itself, whatever becomes of the others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from torch import nn

import tacext
from command_line import ARCH, run
from digits import digit_case
from tacext import FileError, demo
from tacext.cli import ExitCode
from tacext.report import json_schema, write_json


@pytest.fixture
def common(folder: Path) -> tuple[object, ...]:
    # At this alpha the norms alone tell enough of ten classes to call one clean.
    return "--arch", ARCH, "--data", folder / "digits.npz", "--depth", "norms", "--alpha", 0.05


def read(file: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(file.read_text())
    jsonschema.validate(content, json_schema("scans-1"))
    for scanned in content["scans"]:
        jsonschema.validate(scanned, json_schema("scan-1"))
    return content


def test_one_that_fails_does_not_stop_the_others(
    folder: Path, common: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result, cut = tmp_path / "scans.json", tmp_path / "cut.safetensors"
    cut.write_bytes((folder / "clean.safetensors").read_bytes()[:1000])
    names = [folder / "clean.safetensors", cut, folder / "backdoored.safetensors"]
    assert run("scan", *names, *common, "--json", result) == ExitCode.BACKDOORED
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert [line.split()[0] for line in lines] == ["clean", "backdoored", "3"]
    assert lines[0].endswith(f"  accuracy 0.990  {names[0]}")
    assert lines[1].endswith(f"  {names[2]}   suspects: {demo.TARGET}")
    assert lines[2] == "3 models: 1 backdoored, 1 failed, 0 inconclusive, 1 clean"
    assert printed.err.startswith(f"error: {cut}: load_model: weights: expected")
    content = read(result)
    assert [scanned["source"]["weights"] for scanned in content["scans"]] == [
        str(name) for name in names[::2]
    ]
    assert [scanned["verdict"] for scanned in content["scans"]] == ["clean", "backdoored"]
    assert [failure["weights"] for failure in content["failed"]] == [str(cut)]
    assert content["models"] == 3

    assert run("scan", names[0], cut, *common) == ExitCode.ERROR
    assert run("scan", names[0], names[0], *common) == ExitCode.CLEAN
    assert run("scan", *names, *common, "--plot", tmp_path / "p.png") == ExitCode.USAGE
    before = names[2].read_bytes()
    assert run("scan", *names, *common, "--json", names[2]) == ExitCode.ERROR
    assert names[2].read_bytes() == before
    assert run("scan", *common) == ExitCode.USAGE


def test_whatever_happens_to_one_the_others_are_scanned(
    folder: Path,
    common: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result, name = tmp_path / "scans.json", folder / "backdoored.safetensors"
    happens = [None, MemoryError(), OSError("gone"), RuntimeError("odd"), SystemExit(3), None]

    def scanning(*arguments: Any, **more: Any) -> tacext.ScanReport:
        error = happens[len(seen)]
        seen.append(arguments)
        if error is not None:
            raise error
        return tacext.scan(*arguments, **more)

    seen: list[object] = []
    monkeypatch.setattr("tacext.cli.inputs.scan", scanning)
    code = run("scan", *[name] * len(happens), *common, "--json", result)
    assert code == ExitCode.BACKDOORED
    content = read(result)
    assert len(content["scans"]) == 2
    assert [failure["error"] for failure in content["failed"]] == [
        "out of memory; use fewer --samples or a smaller --batch-size",
        "tacext: gone",
        "this is a bug in tacext; please report the lines above",
        "the code named on the command line exits (3)",
    ]
    assert "RuntimeError: odd" in capsys.readouterr().err


def test_what_is_found_before_an_interruption_is_kept(
    folder: Path, common: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result, name = tmp_path / "scans.json", folder / "backdoored.safetensors"
    result.write_text("of an earlier run")

    def scan_until(*arguments: Any, **more: Any) -> tacext.ScanReport:
        content = read(result)  # whole at any time
        assert content["models"] == 3
        if len(content["scans"]) == 1:
            raise KeyboardInterrupt
        return tacext.scan(*arguments, **more)

    monkeypatch.setattr("tacext.cli.inputs.scan", scan_until)
    monkeypatch.setattr(
        "tacext.cli.scan_several._WRITING", 1e9
    )  # after each, however long it takes
    assert run("scan", *[name] * 3, *common, "--json", result) == ExitCode.INTERRUPTED
    content = read(result)
    assert (content["models"], len(content["scans"]), content["failed"]) == (3, 1, [])
    monkeypatch.setattr("tacext.cli.scan_several._WRITING", 1e-9)  # or at the end alone

    def scan_twice(*arguments: Any, **more: Any) -> tacext.ScanReport:
        calls.append(arguments)
        assert read(result)["scans"] == []
        if len(calls) == 3:
            raise KeyboardInterrupt
        return tacext.scan(*arguments, **more)

    calls: list[object] = []
    monkeypatch.setattr("tacext.cli.inputs.scan", scan_twice)
    assert run("scan", *[name] * 3, *common, "--json", result) == ExitCode.INTERRUPTED
    assert len(read(result)["scans"]) == 2


def test_a_json_that_cannot_be_written_stops_nothing(
    folder: Path,
    common: tuple[object, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result, name = tmp_path / "scans.json", folder / "clean.safetensors"
    full = [True]

    def writing(*arguments: Any, **more: Any) -> None:
        if full[0]:
            raise FileError("scan: json: the disk is full")
        write_json(*arguments, **more)

    monkeypatch.setattr("tacext.cli.scan_several.write_json", writing)
    assert run("scan", name, name, *common, "--json", result) == ExitCode.ERROR
    printed = capsys.readouterr()
    assert printed.out.endswith("2 models: 0 backdoored, 0 failed, 0 inconclusive, 2 clean\n")
    assert printed.err.count("the disk is full") == 1
    assert not result.exists()

    def scanning(*arguments: Any, **more: Any) -> tacext.ScanReport:
        full[0] = False
        return tacext.scan(*arguments, **more)

    full[0] = True
    monkeypatch.setattr("tacext.cli.inputs.scan", scanning)
    assert run("scan", name, name, *common, "--json", result) == ExitCode.CLEAN
    assert len(read(result)["scans"]) == 2


@pytest.mark.parametrize("both", [False, True])
def test_a_reader_that_goes_away_changes_nothing(
    folder: Path, common: tuple[object, ...], tmp_path: Path, both: bool
) -> None:
    result, name = tmp_path / "scans.json", folder / "clean.safetensors"
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [
        sys.executable, "-m", "tacext", "scan", name, tmp_path / "none", tmp_path / "none", name,
        *common, "--mean", "0.3", "--std", "0.1", "--json", result,
    ]  # fmt: skip
    process = subprocess.run(
        [str(part) for part in command],
        check=False,
        stdout=write_end,
        stderr=write_end if both else subprocess.DEVNULL,
        timeout=240,
    )
    os.close(write_end)
    content = read(result)
    assert (len(content["scans"]), len(content["failed"])) == (2, 2)
    assert process.returncode == ExitCode.ERROR


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_results_that_cannot_be_told_are_an_error(
    folder: Path, common: tuple[object, ...], tmp_path: Path
) -> None:
    result, name = tmp_path / "scans.json", folder / "clean.safetensors"
    command = [sys.executable, "-m", "tacext", "scan", name, name, *common, "--json", result]
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [str(part) for part in command],
            check=False,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=240,
        )
    assert process.returncode == ExitCode.ERROR
    assert process.stderr.count("No space left on device") == 1
    assert len(read(result)["scans"]) == 2


def test_names_that_the_terminal_has_no_letters_for_stop_nothing(
    folder: Path, common: tuple[object, ...], tmp_path: Path
) -> None:
    named, name = tmp_path / "mod\u00e8le.safetensors", folder / "backdoored.safetensors"
    shutil.copy(folder / "clean.safetensors", named)
    command = [sys.executable, "-m", "tacext", "scan", named, tmp_path / "f\u00e8", name, *common]
    process = subprocess.run(
        [str(part) for part in command],
        check=False,
        capture_output=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        timeout=240,
    )
    assert process.returncode == ExitCode.BACKDOORED
    assert rb"mod\xe8le.safetensors" in process.stdout
    assert process.stderr.count(b": load_model: weights: expected") == 1
    assert b"1 backdoored, 1 failed, 0 inconclusive, 1 clean" in process.stdout


@pytest.mark.parametrize("built", ["net", "nn.Sequential(*net)"])
def test_a_model_of_the_users_is_never_two(
    folder: Path, common: tuple[object, ...], tmp_path: Path, built: str
) -> None:
    """Weights with a latent patch, first in the list, leave nothing in what a factory hands out again."""
    patched, result = tmp_path / "patched.safetensors", tmp_path / "scans.json"
    repaired = tacext.repair(
        digit_case().backdoored, digit_case().data.defender, targets=[demo.TARGET], method="patch",
        settings=tacext.PatchSettings(early_exits=False), max_accuracy_drop=None,
    )  # fmt: skip
    tacext.save_weights(repaired.model, patched)
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\nfrom tacext.demo import digit_net\nnet = digit_net()\n\n"
        f"def build():\n    return {built}\n"
    )
    names = [patched, folder / "clean.safetensors", folder / "backdoored.safetensors"]
    more = "--arch", f"{file}:build", *common[2:], "--json", result
    assert run("scan", *names, *more) == ExitCode.BACKDOORED
    content = read(result)
    assert content["failed"] == []
    assert [scanned["limited"] for scanned in content["scans"]] == [[demo.TARGET], [], []]
    assert [scanned["verdict"] for scanned in content["scans"]][1:] == ["clean", "backdoored"]


def test_what_cannot_be_copied_is_not_shared(
    folder: Path, common: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import threading\nfrom tacext.demo import digit_net\nnet = digit_net()\n"
        "net.lock = threading.Lock()\n\ndef build():\n    return net\n"
    )
    name = folder / "clean.safetensors"
    assert run("scan", name, name, "--arch", f"{file}:build", *common[2:]) == ExitCode.ERROR
    assert capsys.readouterr().err.count("a factory that builds a new model each time") == 2
    assert run("scan", name, "--arch", f"{file}:build", *common[2:]) == ExitCode.CLEAN


def test_what_a_factory_makes_anew_is_not_copied(
    folder: Path, common: tuple[object, ...], tmp_path: Path
) -> None:
    """A closure would go on to run the model that it was copied from, without weights."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from tacext.demo import digit_net\n\ndef build():\n    net = digit_net()\n"
        "    inner = net.forward\n    net.forward = lambda x: inner(x)\n    return net\n"
    )
    names = folder / "clean.safetensors", folder / "backdoored.safetensors"
    result = tmp_path / "scans.json"
    more = "--arch", f"{file}:build", *common[2:], "--json", result
    assert run("scan", *names, *more) == ExitCode.BACKDOORED
    assert [scanned["verdict"] for scanned in read(result)["scans"]] == ["clean", "backdoored"]


def test_what_a_scan_warns_of_is_told(
    folder: Path, common: tuple[object, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    name = folder / "clean.safetensors"
    assert run("scan", name, name, *common, "--mean", 5, "--std", 0.01) == ExitCode.INCONCLUSIVE
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("inconclusive")
    warned = [line for line in lines if line.startswith("    warning: the model is right on only")]
    assert len(warned) == 2
    assert "check the normalisation" in warned[0]
    assert lines[1].startswith("    ")  # the reason
    assert not lines[1].startswith("    warning")


def test_each_is_scanned_as_if_it_were_alone(folder: Path, tmp_path: Path) -> None:
    images, labels = digit_case().data.defender
    named = tmp_path / "named"
    for k in range(10):
        (named / f"digit{k}").mkdir(parents=True)
        for i, x in enumerate(images[labels == k][:25]):
            np.save(tmp_path / "x.npy", x)
            picture(x.numpy(), named / f"digit{k}" / f"{i}.png")
    name = folder / "backdoored.safetensors"
    options = (
        "--arch", ARCH, "--data", named, "--size", "8x8", "--mean", "0.1", "--std", "0.9",
        "--head", "19", "--seed", 3, "--depth", "norms", "--json", tmp_path / "out.json",
    )  # fmt: skip
    run("scan", name, *options)
    alone = json.loads((tmp_path / "out.json").read_text())
    run("scan", name, name, *options)
    for scanned in read(tmp_path / "out.json")["scans"]:
        assert scanned | {"seconds": 0} == alone | {"seconds": 0}
    assert alone["classes"][0]["name"] == "digit0"
    assert alone["head"] == "19"


def picture(x: np.ndarray[Any, Any], file: Path) -> None:
    from PIL import Image

    Image.fromarray((255 * x[0]).astype(np.uint8)).save(file)


def test_several_are_scanned_without_images(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, result = folder / "backdoored.safetensors", tmp_path / "out.json"
    code = run("scan", name, name, "--arch", ARCH, "--input-shape", "1x8x8", "--json", result)
    content = read(result)
    assert [scanned["samples"] for scanned in content["scans"]] == [0, 0]
    assert code in (ExitCode.BACKDOORED, ExitCode.INCONCLUSIVE)
    assert "accuracy" not in capsys.readouterr().out


def test_names_cannot_steer_the_terminal(
    folder: Path, common: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = tmp_path / "[red]x\x1b[31m\n.safetensors"
    shutil.copy(folder / "clean.safetensors", odd)
    assert run("scan", odd, f"{odd}no", *common) == ExitCode.ERROR
    printed = capsys.readouterr()
    for text in (printed.out, printed.err):
        assert "[red]x" in text
        assert "\x1b" not in text
    assert len(printed.out.splitlines()) == 2
    assert len(printed.err.splitlines()) == 1


def test_messages_speak_of_options(
    folder: Path,
    common: tuple[object, ...],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def scanning(*_arguments: Any, **_more: Any) -> tacext.ScanReport:
        raise tacext.InputError("scan: model: expected one head, got two; name it with head=")

    monkeypatch.setattr("tacext.cli.inputs.scan", scanning)
    name = folder / "clean.safetensors"
    assert run("scan", name, name, *common) == ExitCode.ERROR
    assert capsys.readouterr().err.count("got two; name it with --head\n") == 2


def test_the_users_code_is_loaded_once_and_told_of_once(
    folder: Path, common: tuple[object, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, count = folder / "clean.safetensors", tmp_path / "count"
    file = tmp_path / "mine.py"
    file.write_text(
        "from pathlib import Path\nfrom tacext.demo import digit_net\n"
        f"file = Path({str(count)!r})\n"
        "file.write_text('x' + (file.read_text() if file.exists() else ''))\n"
    )
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(b"")
    arch = f"{file}:digit_net"
    assert run("scan", cut, cut, "--arch", arch, *common[2:]) == ExitCode.ERROR
    assert not count.exists()  # nothing runs before there is a file that is safe
    assert run("scan", name, cut, name, "--arch", arch, *common[2:]) == ExitCode.ERROR
    assert count.read_text() == "x"
    capsys.readouterr()
    assert run("scan", name, name, "--arch", f"{file}:nonet", *common[2:]) == ExitCode.ERROR
    assert capsys.readouterr().err.count("nonet") == 1


def test_one_model_at_a_time_is_in_memory(
    folder: Path, common: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[nn.Module]] = []
    counts = []

    def scanning(model: nn.Module, *arguments: Any, **more: Any) -> tacext.ScanReport:
        counts.append(sum(reference() is not None for reference in alive))
        alive.append(weakref.ref(model))
        if len(alive) == 2:
            raise tacext.InputError("no")
        return tacext.scan(model, *arguments, **more)

    monkeypatch.setattr("tacext.cli.inputs.scan", scanning)
    run("scan", *[folder / "clean.safetensors"] * 4, *common)
    assert counts == [0, 0, 0, 0]
