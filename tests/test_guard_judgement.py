"""Guards on whole sets of images, from Python and from the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from PIL import Image

from command_line import ARCH, run
from digits import digit_case
from tacext import Guard, InputError, demo, judge, save_weights
from tacext.cli import ExitCode
from tacext.report import json_schema


def test_a_set_is_judged_as_its_images_are() -> None:
    case = digit_case()
    guard = Guard.fit(case.backdoored, case.data.defender, 0.05)
    images, labels = case.data.test
    clean = judge(guard, (images, labels), batch_size=50)
    with torch.no_grad():
        assert torch.equal(clean.output.score, guard(images).score)
    assert not clean.suspicious
    mixed = torch.cat([images, demo.white_corner(images[:60].clone())])
    assert judge(guard, (mixed, torch.cat([labels, labels[:60]]))).suspicious
    assert torch.equal(judge(guard, images).output.score, clean.output.score)  # without labels
    alone = Guard.fit(case.backdoored, case.data.defender[0], 0.05)
    assert torch.equal(alone.scorer.mean, guard.scorer.mean)
    with pytest.raises(InputError, match=r"judge: data: expected inputs that the model takes"):
        judge(guard, (torch.rand(4, 3, 8, 8), labels[:4]))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    case = digit_case()
    save_weights(case.backdoored, tmp_path / "model.safetensors")
    (x_train, y_train), (x_test, y_test) = case.data.defender, case.data.test
    triggered = demo.white_corner(x_test.clone())
    for name, images, labels in (
        ("fit.npz", x_train, y_train), ("clean.npz", x_test, y_test), ("triggered.npz", triggered, y_test),
    ):  # fmt: skip
        np.savez(tmp_path / name, x=images.numpy(), y=labels.numpy())
    return tmp_path


def test_the_command_line_fits_and_judges(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = (saved / "model.safetensors", "--arch", ARCH)
    guard, result = saved / "guard.safetensors", saved / "result.json"
    fitted = run(
        "guard", "fit", *model, "--data", saved / "fit.npz", "--output", guard,
        "--false-positive-rate", 0.05, "--json", result,
    )  # fmt: skip
    assert fitted == ExitCode.CLEAN
    assert "guard of 400 samples: 10 classes" in capsys.readouterr().out
    told = json.loads(result.read_text())
    jsonschema.validate(told, json_schema("guard-1"))
    assert told["judged"] is None
    assert told["calibration_samples"] == 400

    judging = ("guard", "judge", *model, "--guard", guard, "--json", result, "--data")
    assert run(*judging, saved / "clean.npz") == ExitCode.CLEAN
    assert "no more than of clean images" in capsys.readouterr().out
    with np.load(saved / "clean.npz") as clean:
        np.savez(saved / "unlabelled.npz", x=clean["x"])
    assert run(*judging, saved / "unlabelled.npz") == ExitCode.CLEAN
    assert run("scan", *model, "--data", saved / "unlabelled.npz") == ExitCode.ERROR
    assert "expected arrays x and y" in capsys.readouterr().err
    assert run(*judging, saved / "triggered.npz") == ExitCode.BACKDOORED
    assert "more than clean images explain, p < 1e-15" in capsys.readouterr().out
    told = json.loads(result.read_text())
    jsonschema.validate(told, json_schema("guard-1"))
    assert told["judged"]["suspicious"]
    assert len(told["judged"]["flagged_images"]) == told["judged"]["flagged"] > 200
    assert told["source"]["guard"] == str(guard)


def test_a_folder_of_unlabelled_images_is_judged(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = (saved / "model.safetensors", "--arch", ARCH)
    guard, result = saved / "guard.safetensors", saved / "result.json"
    run("guard", "fit", *model, "--data", saved / "fit.npz", "--output", guard,
        "--false-positive-rate", 0.05)  # fmt: skip
    folder = saved / "images"
    folder.mkdir()
    with np.load(saved / "triggered.npz") as triggered:
        for i, image in enumerate(triggered["x"][:100]):
            Image.fromarray((255 * image[0]).round().astype(np.uint8)).save(folder / f"{i:03}.png")
    judging = ("guard", "judge", *model, "--guard", guard, "--data", folder, "--json", result)
    assert run(*judging) == ExitCode.BACKDOORED
    usual = json.loads(result.read_text())["judged"]
    assert usual["images"] == 100
    assert run(*judging, "--false-positive-rate", 0.01) == ExitCode.BACKDOORED
    strict = json.loads(result.read_text())
    assert strict["false_positive_rate"] == 0.01
    assert set(strict["judged"]["flagged_images"]) < set(usual["flagged_images"])
    assert run(*judging, "--false-positive-rate", 0.001) == ExitCode.ERROR
    assert "expected 0.002494 or more" in capsys.readouterr().err
    assert run("scan", *model, "--data", folder) == ExitCode.ERROR
    assert "without folders" in capsys.readouterr().err
    # A few images beside folders of them would stand for all.
    (folder / "seven").mkdir()
    (folder / "000.png").rename(folder / "seven" / "000.png")
    assert run(*judging) == ExitCode.ERROR
    assert "expected images, or folders of images, got both" in capsys.readouterr().err
    below = saved / "folders"
    for name in ("images", "seven"):
        (below / name).mkdir(parents=True)
        for i in range(1, 6):
            shutil.copy(folder / f"{i:03}.png", below / name)
    run("guard", "judge", *model, "--guard", guard, "--data", below, "--json", result)
    assert json.loads(result.read_text())["judged"]["images"] == 10


def test_the_command_line_says_what_is_wrong(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = (saved / "model.safetensors", "--arch", ARCH, "--data", saved / "fit.npz")
    fit, judging = ("guard", "fit", *model), ("guard", "judge", *model)
    assert run(*fit, "--output", saved / "guard.bin") == ExitCode.ERROR
    assert "output: expected a name that ends in .safetensors" in capsys.readouterr().err
    assert run(*fit, "--output", saved / "none" / "guard.safetensors") == ExitCode.ERROR
    assert run(*fit, "--output", saved / "model.safetensors") == ExitCode.ERROR
    assert run(*fit, "--output", saved / "g.safetensors", "--samples", 50) == ExitCode.ERROR
    assert "fit a guard on 99 samples or more" in capsys.readouterr().err
    assert (
        run(*fit, "--output", saved / "g.safetensors", "--false-positive-rate", 0) == ExitCode.USAGE
    )
    assert run(*judging, "--guard", saved / "none.safetensors") == ExitCode.ERROR
    assert run(*judging, "--guard", saved / "model.safetensors") == ExitCode.ERROR
    assert "expected a file that Guard.save wrote" in capsys.readouterr().err
    assert run(*fit, "--output", saved / "g.safetensors") == ExitCode.CLEAN
    assert (
        run(*judging, "--guard", saved / "g.safetensors", "--mean", 0.4, "--std", 0.2)
        == ExitCode.ERROR
    )
    assert "with the same normalisation around it" in capsys.readouterr().err
    assert not list(saved.glob(".tacext*"))
