"""The command line on bad input, full disks, interrupts and hostile names: message and exit code."""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from torch import nn

from command_line import ARCH, run
from digits import digit_case
from tacext import load_state_dict
from tacext.cli import ExitCode, cli
from tacext.cli.wording import command_of, in_options, options_of
from tacext.report import json_schema


def bad_files(folder: Path, place: Path) -> dict[str, tuple[list[object], str]]:
    weights, data = folder / "backdoored.safetensors", folder / "digits.npz"
    truncated = place / "truncated.safetensors"
    truncated.write_bytes(weights.read_bytes()[:5000])
    truncated_pt = place / "truncated.pt"
    truncated_pt.write_bytes((folder / "backdoored.pt").read_bytes()[:5000])
    state = load_state_dict(weights)
    state["0.weight"][0, 0, 0, 0] = torch.nan
    with_nan = place / "nan.pt"
    torch.save(state, with_nan)

    with np.load(data) as archive:
        x, y = archive["x"], archive["y"]

    def images(name: str, x: np.ndarray, y: np.ndarray) -> Path:
        np.savez(place / name, x=x, y=y)
        return place / name

    nan_x = x.copy()
    nan_x[5, 0, 1, 1] = np.nan
    nan_images = images("nan_images.npz", nan_x, y)
    no_samples = images("empty.npz", x[:0], y[:0])
    one_class = images("one.npz", x[y == 3], y[y == 3])
    bad_labels = images("labels.npz", x, y + 1)
    colour = images("colour.npz", x.repeat(3, 1), y)
    cut = place / "cut.npz"
    cut.write_bytes(data.read_bytes()[:3000])

    def case(weights: Path, data: Path, *more: object, arch: str = ARCH) -> list[object]:
        return [weights, "--arch", arch, "--data", data, *more]

    return {
        "missing weights": (case(place / "none.safetensors", data), "weights: .*none.safetensors"),
        "truncated safetensors": (case(truncated, data), "weights: .*truncated"),
        "truncated pt": (case(truncated_pt, data), "weights: .*truncated"),
        "wrong architecture": (
            case(weights, data, arch="torch.nn:Identity"),
            "arch: expected torch.nn:Identity to fit the weights",
        ),
        "no such factory": (case(weights, data, arch="tacext.demo:nothing"), "arch: expected"),
        "NaN in weights": (case(with_nan, data), "0.weight"),
        "NaN in images": (case(weights, nan_images), "NaN or infinity"),
        "no samples": (case(weights, no_samples), "at least 1 (image|sample)"),
        "one class": (case(weights, one_class), "at least 2 classes"),
        "labels out of range": (case(weights, bad_labels), "labels from 0 to 9.*got 10"),
        "wrong shape": (case(weights, colour), "inputs that the model takes.*channels"),
        "truncated images": (case(weights, cut), "path: expected an .npz archive"),
        "missing images": (case(weights, place / "absent.npz"), "path: .*absent.npz"),
        "too many samples": (case(weights, data, "--samples", 401), "at most the 400 images"),
        "unwritable json": (
            case(weights, data, "--json", place / "no" / "folder.json"),
            "json: expected a file that can be written",
        ),
        "unwritable plot": (case(weights, data, "--plot", place), "plot: .*directory"),
        "unknown head": (case(weights, data, "--head", "x"), "head: expected the name"),
        "unknown head behind --mean": (
            case(weights, data, "--head", "x", "--mean", 0, "--std", 1),
            "head: expected the name .*got 'x'",
        ),
        "json over weights": (
            case(weights, data, "--json", weights),
            "json: expected a file of its own, got .*which is WEIGHTS",
        ),
        "one file for two": (
            case(weights, data, "--json", place / "a.png", "--plot", place / "a.png"),
            "plot: expected a file of its own, got .*which is --json",
        ),
    }  # fmt: skip


CASES = (
    "missing weights", "truncated safetensors", "truncated pt", "wrong architecture",
    "no such factory", "NaN in weights", "NaN in images", "no samples", "one class",
    "labels out of range", "wrong shape", "truncated images", "missing images", "too many samples",
    "unwritable json", "unwritable plot", "unknown head", "unknown head behind --mean",
    "json over weights", "one file for two",
)  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_input_exits_with_2_and_says_what_to_do(
    name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = bad_files(folder, tmp_path)
    assert tuple(cases) == CASES
    arguments, message = cases[name]
    assert run("scan", *arguments) == ExitCode.ERROR == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert re.search(message, lines[0]), lines[0]
    assert re.search(r"expected .*, got .*; ", lines[0]), lines[0]
    assert "Traceback" not in captured.err


def test_a_pickle_with_code_is_refused_and_nothing_runs(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "ran"

    class Payload:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {marker}",)

    for name, save in (
        ("zip.pt", lambda file: torch.save({"weight": Payload()}, file)),
        ("bare.pt", lambda file: pickle.dump(Payload(), file)),
    ):
        buffer = io.BytesIO()
        save(buffer)
        (tmp_path / name).write_bytes(buffer.getvalue())
        code = run("scan", tmp_path / name, "--arch", ARCH, "--data", folder / "digits.npz")
        assert code == ExitCode.ERROR
        assert "refused" in capsys.readouterr().err
        assert not marker.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["scan"],
        ["scan", "w.safetensors", "--arch", "a:b"],
        ["scan", "w.safetensors", "--arch", "a:b", "--data", "d.npz", "--alpha", "2"],
        ["scan", "w.safetensors", "--arch", "a:b", "--data", "d.npz", "--alpha", "nan"],
        ["scan", "w.safetensors", "--arch", "a:b", "--data", "d.npz", "--quantile", "nan"],
        ["scan", "w.safetensors", "--arch", "a:b", "--data", "d.npz", "--mean", "", "--std", ""],
        ["scan", "w.safetensors", "--arch", "a:b", "--data", "d.npz", "--mean", "nan", "--std", "1"],
        [
            "repair", "w.safetensors", "--arch", "a:b", "--data", "d.npz", "--output",
            "o.safetensors", "--learning-rate", "inf",
        ],
        ["scan", "w.safetensors", "--arch", "a:b", "--data", "d.npz", "--samples", "0"],
        ["scan", "w.safetensors", "--arch", "a:b", "--data", "d.npz", "--mean", "zero"],
        ["scan", "w.safetensors", "--arch", "a:b", "--data", "d.npz", "--mean", "0.5"],
        ["scan", "w.safetensors", "--arch", "a:b", "--data", "d.npz", "--size", "axb"],
        ["scan", "w.safetensors", "--arch", "a:b", "--data", "d.npz", "--size", "²"],
        ["scan", "w.safetensors", "--arch", "a:b", "--data", "d.npz", "--seed", "-1"],
        ["destroy"],
        ["--nonsense"],
    ],
)  # fmt: skip
def test_wrong_usage_exits_with_4(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*arguments) == ExitCode.USAGE == 4
    assert "Usage" in capsys.readouterr().err


def test_errors_speak_of_options() -> None:
    repair, guard = (
        command_of(cli, words) for words in (["-v", "repair"], ["guard", "fit", "scan"])
    )
    assert (repair.name, guard.name) == ("repair", "fit")
    assert in_options("use depth='fast'", options_of(guard)) == "use depth='fast'"
    assert command_of(cli, ["nonsense"]) is cli
    options = options_of(repair)
    for text, expected in (
        ("name the last linear layer with head=", "name the last linear layer with --head"),
        ("with head= (candidates: a)", "with --head (candidates: a)"),
        (
            "or repair with method=\"finetune\", or metric='l2'",
            "or repair with --method finetune, or --metric l2",
        ),
        ("name the class with targets=[...] where", "name the class with --target where"),
        ("give size=(H, W), or x=images", "give size=(H, W), or x=images"),
        ("max_samples= is none", "max_samples= is none"),
        ("got /a/alpha=.05/x; leave alpha= out", "got /a/alpha=.05/x; leave --alpha out"),
    ):
        assert in_options(text, options) == expected


def test_a_bug_is_no_verdict(
    scan_command: functools.partial[int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from tacext.cli import inputs as module

    def broken(*_arguments: object, **_options: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(module, "scan", broken)
    assert scan_command() == ExitCode.ERROR
    assert "bug in tacext" in capsys.readouterr().err


def test_an_interrupt_while_writing_leaves_no_half_file(
    scan_command: functools.partial[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = tmp_path / "scan.json"
    result.write_text("old")

    def interrupt(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    assert scan_command("--json", result) == ExitCode.INTERRUPTED == 130
    assert result.read_text() == "old"
    assert os.listdir(tmp_path) == ["scan.json"]


# A shell that starts pytest in the background makes its children ignore the signal.
NOT_IGNORING_INTERRUPTS = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from tacext.cli import main
main()
"""


def test_ctrl_c_in_a_repair_exits_with_130_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "repaired.safetensors"
    process = subprocess.Popen(
        [
            sys.executable, "-c", NOT_IGNORING_INTERRUPTS, "-v", "repair", folder / "backdoored.safetensors",
            "--arch", ARCH, "--data", folder / "digits.npz", "--target", "0",
            "--epochs", "100000", "--output", output,
        ],
        stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        for line in process.stderr:  # wait until the training is under way
            if "epoch 1 " in line:
                break
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, rest = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
    assert process.returncode == ExitCode.INTERRUPTED
    assert "interrupted" in rest
    assert list(tmp_path.iterdir()) == []


def test_repair_never_replaces_its_input(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = folder / "backdoored.safetensors"
    before = weights.read_bytes()
    common = "repair", weights, "--arch", ARCH, "--data", folder / "digits.npz", "--output"
    assert run(*common, weights) == ExitCode.ERROR
    assert "which is WEIGHTS" in capsys.readouterr().err
    assert run(*common, tmp_path / "o.pt") == ExitCode.ERROR
    assert "ends in .safetensors" in capsys.readouterr().err
    assert weights.read_bytes() == before


@pytest.fixture
def everything(folder: Path, tmp_path: Path) -> Path:
    """A folder with weights, code and a folder of images, which a command is about to read."""
    from PIL import Image

    shutil.copy(folder / "clean.safetensors", tmp_path / "base.safetensors")
    for name, function in (("arch", "digit_net"), ("trigger", "white_corner")):
        (tmp_path / f"{name}.py").write_text(f"from tacext.demo import {function}\n")
    images, labels = digit_case().data.defender
    for k in range(10):
        place = tmp_path / "images" / f"class{k}"
        place.mkdir(parents=True)
        array = (images[labels == k][0, 0] * 255).round().to(torch.uint8).numpy()
        Image.fromarray(array).save(place / "000.png")
    return tmp_path


@pytest.mark.parametrize(
    ("output", "what"),
    [
        ("base.safetensors", "which is --baseline"),
        ("trigger.py", "which is --trigger"),
        ("arch.py", "which is --arch"),
        ("images/class0/000.png", "which is inside the folder of --data"),
        ("images/result.json", "which is inside the folder of --data"),
    ],
)
def test_no_output_replaces_what_is_read(
    output: str,
    what: str,
    everything: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(everything)
    before = {file: file.read_bytes() for file in everything.rglob("*") if file.is_file()}
    weights = folder / "backdoored.safetensors"
    for arch in ("arch.py:digit_net", "./arch.py:digit_net", "arch:digit_net"):
        common = weights, "--arch", arch, "--data", "images", "--json", output
        assert run(
            "evaluate", *common, "--trigger", "trigger.py:white_corner", "--target", 0,
            "--baseline", "base.safetensors",
        ) == ExitCode.ERROR  # fmt: skip
        error = capsys.readouterr().err
        assert f"evaluate: json: expected a file of its own, got {output}, {what}; " in error
    if "--data" in what:
        assert run("scan", *common[:-2], "--plot", output) == ExitCode.ERROR
        assert what in capsys.readouterr().err
    assert before == {file: file.read_bytes() for file in everything.rglob("*") if file.is_file()}


def test_outputs_may_lie_beside_the_data(
    everything: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(everything)
    weights = folder / "backdoored.safetensors"
    code = run(
        "scan", weights, "--arch", "arch.py:digit_net", "--data", "images", "--json", "images.json"
    )
    assert code == ExitCode.INCONCLUSIVE  # ten images say nothing
    assert (everything / "images.json").is_file()


def test_a_repair_shows_what_it_rests_on(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = "--arch", ARCH, "--data", folder / "digits.npz", "--output", tmp_path / "o.safetensors"
    assert run("repair", folder / "clean.safetensors", *common) == ExitCode.ERROR
    captured = capsys.readouterr()
    assert "verdict: clean" in captured.out
    assert "name the class with --target where you know better" in captured.err
    arguments = (
        "--target", 0, "--method", "finetune", "--learning-rate", 0.5, "--epochs", 1,
        "--json", tmp_path / "r.json",
    )  # fmt: skip
    for gate, code, told in (
        ([], ExitCode.ROLLED_BACK, "warning: rolled back: it loses"),
        (["--no-gate"], ExitCode.CLEAN, "warning: the repair costs"),
    ):
        assert run("repair", folder / "clean.safetensors", *common, *arguments, *gate) == code
        assert told in capsys.readouterr().out.replace("\n", " ")
        assert (tmp_path / "o.safetensors").exists() == bool(gate)
        content = json.loads((tmp_path / "r.json").read_text())
        jsonschema.validate(content, json_schema(content["schema"]))
        assert content["accepted"] is bool(gate)
        assert len(content["warnings"]) == 1


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--no-gate"], "--no-gate needs a --method"),
        (["--method", "patch", "--epochs", "3"], "--epochs is of --method finetune, not of patch"),
        (["--method", "prune", "--gamma", "1"], "--gamma is of --method finetune, not of prune"),
        (["--method", "patch", "--checkpoint", "c"], "--checkpoint is of --method finetune"),
    ],
)
def test_options_that_nothing_would_come_of_are_wrong_usage(
    arguments: list[str], told: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = "--arch", ARCH, "--data", folder / "digits.npz", "--output", folder / "o.safetensors"
    code = run("repair", folder / "clean.safetensors", *common, *arguments)
    assert code == ExitCode.USAGE
    assert told in " ".join(capsys.readouterr().err.split())


def test_a_closed_pipe_keeps_the_verdict(folder: Path) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [
        sys.executable, "-m", "tacext", "scan", folder / "clean.safetensors", "--arch", ARCH,
        "--data", folder / "digits.npz",
    ]  # fmt: skip
    process = subprocess.run(
        command, check=False, stdout=write_end, stderr=subprocess.PIPE, timeout=120
    )
    os.close(write_end)
    assert process.returncode == ExitCode.CLEAN, process.stderr


def test_what_is_printed_after_a_closed_pipe_goes_nowhere() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    program = """
import sys
from tacext.cli.console import ResultConsole
ResultConsole().print("x " * 50_000)  # words: rich takes a minute to break one this long
print("more")
sys.exit(3)
"""
    command = [sys.executable, "-c", program]
    process = subprocess.run(
        command, check=False, stdout=write_end, stderr=subprocess.PIPE, timeout=120
    )
    os.close(write_end)
    assert (process.returncode, process.stderr) == (3, b"")


def test_an_exit_in_the_users_code_is_no_verdict(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "quits.py").write_text("import sys\ndef stamp(x):\n    sys.exit(0)\n")
    code = run(
        "evaluate", folder / "clean.safetensors", "--arch", ARCH, "--data", folder / "digits.npz",
        "--trigger", f"{tmp_path}/quits.py:stamp", "--target", 0,
    )  # fmt: skip
    assert code == ExitCode.ERROR
    assert "exits (0)" in capsys.readouterr().err


def test_names_in_the_data_cannot_steer_the_terminal(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    images, labels = digit_case().data.defender
    for k in range(10):
        place = tmp_path / "images" / f"{k} \x1b[2J [red] $x^{{$"
        place.mkdir(parents=True)
        for i, image in enumerate(images[labels == k]):
            array = (image[0] * 255).round().to(torch.uint8).numpy()
            Image.fromarray(array).save(place / f"{i}.png")
    code = run(
        "scan", folder / "clean.safetensors", "--arch", ARCH, "--data", tmp_path / "images",
        "--plot", tmp_path / "norms.png",
    )  # fmt: skip
    text = capsys.readouterr().out
    assert code == ExitCode.CLEAN
    assert "\x1b" not in text
    assert "?[2J [red] $x^{$" in text

    (tmp_path / "images" / "0 \x1b]0;broken").mkdir()
    assert run(
        "scan", folder / "clean.safetensors", "--arch", ARCH, "--data", tmp_path / "images"
    ) == ExitCode.ERROR  # fmt: skip
    assert "\x1b" not in capsys.readouterr().err


def test_a_full_disk_is_an_error_that_says_so(
    scan_command: functools.partial[int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert scan_command("--json", tmp_path / "scan.json") == ExitCode.ERROR
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = digit_case()

    def trained(_: torch.Tensor, labels: torch.Tensor, *, seed: int) -> nn.Module:
        assert seed == 0
        clean = torch.equal(labels, case.data.training[1])  # no label of these is another's
        return copy.deepcopy(case.clean if clean else case.backdoored)

    monkeypatch.setattr("tacext.demo.train", trained)  # as it has trained them for other tests
    assert run("demo", "--output", tmp_path / "demo") == 0
    text = capsys.readouterr().out
    assert "verdict: backdoored   suspects: 0" in text
    assert "repaired" in text
    names = {"backdoored.safetensors", "repaired.safetensors", "digits.npz", "norms.png"}
    assert {file.name for file in (tmp_path / "demo").iterdir()} == names
    # What the README goes on with.
    weights, images = tmp_path / "demo" / "repaired.safetensors", tmp_path / "demo" / "digits.npz"
    demo = ["--arch", "tacext.demo:digit_net", "--data", images, "--split", "test"]
    known = ["--trigger", "tacext.demo:white_corner", "--target", 0]
    assert run("evaluate", weights, *demo, *known) == 0
    assert run("demo", "--output", tmp_path / "demo" / "norms.png") == ExitCode.ERROR
