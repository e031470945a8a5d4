"""The command line: what it prints, what it writes, and its exit codes."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch

from command_line import ARCH, TRIGGER, run
from digits import digit_case
from tacext import (
    InputError,
    Normalized,
    demo,
    load_model,
    load_state_dict,
    remove_latent_patch,
    save_weights,
)
from tacext.cli import ExitCode, inputs
from tacext.cli.inputs import head_in_model
from tacext.heads import find_head
from tacext.latent_patch import LatentPatch, with_latent_patch
from tacext.report import json_schema

# ---- what works ----------------------------------------------------------------------------------


def test_scan_of_a_backdoored_model_exits_with_1(
    scan_command: functools.partial[int],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result = tmp_path / "scan.json"
    plot = tmp_path / "norms.png"
    assert scan_command("--json", result, "--plot", plot) == ExitCode.BACKDOORED == 1
    assert "verdict: backdoored   suspects: 0" in capsys.readouterr().out
    content = json.loads(result.read_text())
    jsonschema.validate(content, json_schema("scan-1"))
    assert content["verdict"] == "backdoored"
    assert content["suspects"] == [demo.TARGET]
    assert content["p_value"] < 0.01
    assert [row["class"] for row in content["classes"]] == list(range(10))
    assert content["certificate"] <= 1e-8
    assert content["source"]["weights"] == str(folder / "backdoored.safetensors")
    assert len(content["source"]["weights_sha256"]) == 64
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_a_state_dict_in_a_pt_file_gives_the_same_scan(folder: Path, tmp_path: Path) -> None:
    norms = []
    for name in ("backdoored.safetensors", "backdoored.pt"):
        result = tmp_path / "scan.json"
        code = run(
            "scan", folder / name, "--arch", ARCH, "--data", folder / "digits.npz", "--json", result
        )
        assert code == ExitCode.BACKDOORED
        norms.append([row["norm"] for row in json.loads(result.read_text())["classes"]])
    assert norms[0] == norms[1]


def test_scan_of_a_clean_model_exits_with_0(folder: Path) -> None:
    code = run(
        "scan", folder / "clean.safetensors", "--arch", ARCH, "--data", folder / "digits.npz"
    )
    assert code == ExitCode.CLEAN == 0


def test_an_inconclusive_scan_exits_with_3(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "two.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))\n"
    )
    save_weights(
        {"1.weight": torch.eye(2, 64), "1.bias": torch.zeros(2)}, tmp_path / "two.safetensors"
    )
    images, labels = digit_case().data.defender
    np.savez(tmp_path / "two.npz", x=images.numpy(), y=(labels % 2).numpy())
    code = run(
        "scan", tmp_path / "two.safetensors", "--arch", f"{tmp_path}/two.py:net",
        "--data", tmp_path / "two.npz",
    )  # fmt: skip
    assert code == ExitCode.INCONCLUSIVE == 3


def test_normalisation_samples_split_and_head(
    scan_command: functools.partial[int], tmp_path: Path
) -> None:
    result = tmp_path / "scan.json"
    code = scan_command(
        "--mean", "0.0", "--std", "1.0", "--samples", 300, "--split", "test", "--head", "19",
        "--json", result, "--metric", "l2",
    )  # fmt: skip
    content = json.loads(result.read_text())
    assert code in (0, 1, 3)
    assert (content["samples"], content["head"], content["metric"]) == (300, "19", "l2")


def test_a_head_is_named_as_in_the_users_own_model() -> None:
    own = torch.nn.Module()
    own.fc = torch.nn.Linear(3, 2)
    own.classifier = own.fc  # one layer under two names
    model = Normalized(own, [0.5], [0.5])
    for head, expected in (
        ("fc", "model.fc"),
        ("classifier", "model.classifier"),
        ("model.fc", "model.fc"),
        ("other", "other"),
        (None, None),
    ):
        assert head_in_model(head, model) == expected
        assert head_in_model(head, own) == head


def test_repair_then_evaluate(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repaired, result = tmp_path / "repaired.safetensors", tmp_path / "result.json"
    before = (folder / "backdoored.safetensors").read_bytes()
    common = "--arch", ARCH, "--data", folder / "digits.npz"
    assert run(
        "repair", folder / "backdoored.safetensors", *common, "--output", repaired,
        "--batch-size", 32, "--json", result,
    ) == 0  # fmt: skip
    content = json.loads(result.read_text())
    jsonschema.validate(content, json_schema("repair-1"))
    assert content["targets"] == [demo.TARGET]
    assert content["precautions"] == []
    assert content["attempts"][0]["targets"] == [demo.TARGET]
    assert (folder / "backdoored.safetensors").read_bytes() == before
    assert (content["method"], content["limits_added"]) == ("finetune", True)
    restored = remove_latent_patch(load_model(repaired, demo.digit_net))
    demo.digit_net().load_state_dict(restored.state_dict())

    capsys.readouterr()
    assert run(
        "evaluate", repaired, *common, "--split", "test", "--trigger", TRIGGER, "--target", 0,
        "--baseline", folder / "backdoored.safetensors", "--json", result,
    ) == 0  # fmt: skip
    content = json.loads(result.read_text())
    jsonschema.validate(content, json_schema("evaluation-1"))
    assert content["asr"] < 0.1
    assert content["der"] > 0.9
    assert "baseline" in capsys.readouterr().out

    assert run(
        "evaluate", folder / "backdoored.safetensors", *common, "--split", "test", "--trigger", TRIGGER,
        "--target", 0, "--source", 4, "--json", result,
    ) == 0  # fmt: skip
    of_source = json.loads(result.read_text())
    assert of_source["triggered"] == int((digit_case().data.test[1] == 4).sum())
    assert of_source["asr"] > 0.9
    assert of_source["source_class"] == 4
    assert (
        f"ASR and RA of the {of_source['triggered']} images of class 4" in capsys.readouterr().out
    )


def test_a_patched_model_is_written_and_read_again(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repaired, result = tmp_path / "repaired.safetensors", tmp_path / "result.json"
    common = "--arch", ARCH, "--data", folder / "digits.npz"
    assert run(
        "repair", folder / "clean.safetensors", *common, "--output", repaired, "--target", 3,
        "--method", "patch", "--no-gate", "--json", result,
    ) == 0  # fmt: skip
    content = json.loads(result.read_text())
    jsonschema.validate(content, json_schema("repair-1"))
    assert content["method"] == "patch"
    assert [attempt["method"] for attempt in content["attempts"]] == ["patch"]
    assert content["history"] == []
    assert any(".patch." in name for name in load_state_dict(repaired))
    capsys.readouterr()
    again = "repair", repaired, *common, "--output", tmp_path / "again.safetensors"
    assert run(*again) == ExitCode.ERROR  # before any scan
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "which has one; repair the weights that it was made" in printed.err
    assert run(
        "evaluate", repaired, *common, "--split", "test", "--trigger", TRIGGER, "--target", 3,
        "--json", result,
    ) == 0  # fmt: skip
    assert json.loads(result.read_text())["acc"] > 0.97


def test_repair_scans_as_it_is_told(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = folder / "backdoored.safetensors", "--arch", ARCH, "--data", folder / "digits.npz"
    how = "--metric", "l2", "--quantile", 0.95, "--alpha", 0.3
    once = "--method", "finetune", "--no-gate", "--epochs", 1
    scanned = run("scan", *common, *how)
    table = capsys.readouterr().out
    code = run("repair", *common, *how, "--output", tmp_path / "o.safetensors", *once)
    repaired = capsys.readouterr().out
    norms = [line.split()[:2] for line in table.splitlines()[1:11]]
    assert norms == [line.split()[:2] for line in repaired.splitlines()[1:11]]
    assert (code, scanned) == (0, ExitCode.BACKDOORED)


@pytest.mark.parametrize(
    ("given", "depth"),
    [
        ((), "thorough"),
        (("--target", 0), "fast"),
        (("--target", 0, "--depth", "thorough"), "thorough"),
        (("--target", 0, "--depth", "norms"), "norms"),
        (("--depth", "norms"), "norms"),
    ],
)
def test_a_repair_of_given_targets_scans_fast_but_as_it_is_told(
    given: tuple[object, ...],
    depth: str,
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[object] = []

    def scanning(*_: object, **how: object) -> None:
        asked.append(how["depth"])
        raise InputError("scan: data: no")

    monkeypatch.setattr(inputs, "scan", scanning)
    output = "--output", tmp_path / "o.safetensors"
    common = folder / "backdoored.safetensors", "--arch", ARCH, "--data", folder / "digits.npz"
    assert run("repair", *common, *output, *given) == ExitCode.ERROR
    assert asked == [depth]


def test_a_model_with_a_patch_is_clean_where_that_is_trusted(folder: Path, tmp_path: Path) -> None:
    case = digit_case()
    head, zero = find_head(case.clean, case.data.defender[0][:4]), torch.zeros(1, 128)
    patch = LatentPatch(
        zero, torch.full((1,), 1e9), zero.clone(), zero.clone(), torch.zeros(1, 128, 1),
        torch.zeros(1, 1, 128), zero.clone(), torch.tensor([3]),
    )  # fmt: skip
    patched, result = tmp_path / "patched.safetensors", tmp_path / "scan.json"
    save_weights(with_latent_patch(case.clean, head, patch)[0], patched)
    common = [
        "scan", patched, "--arch", ARCH, "--data", folder / "digits.npz", "--json", result,
        "--depth", "norms", "--alpha", 0.05,
    ]  # fmt: skip
    for more, code in ((), ExitCode.INCONCLUSIVE), (("--trust-patch",), ExitCode.CLEAN):
        assert run(*common, *more) == code
        content = json.loads(result.read_text())
        jsonschema.validate(content, json_schema("scan-1"))
        assert (content["limited"], content["trust_patch"]) == ([3], bool(more))


def test_info_and_help_name_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info") == 0
    assert "simd" in capsys.readouterr().out
    for arguments in (["--help"], ["scan", "--help"], ["repair", "-h"]):
        assert run(*arguments) == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "0 clean" in text
        assert "3 inconclusive" in text
        assert "4 wrong usage" in text
