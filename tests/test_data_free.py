"""Scans without any data: they rank, flag what overshoots, and never clear a model."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import jsonschema
import pytest
import torch
from torch import nn

from command_line import ARCH, run
from digits import digit_case
from tacext import InputError, ScanReport, save_weights, scan
from tacext.cli.exit_codes import ExitCode
from tacext.errors import NoGradientError, NotFiniteError
from tacext.report import json_schema, scan_to_dict

SHAPE = (1, 8, 8)


def _scanned(network: nn.Module, **how: object) -> ScanReport:
    return scan(network, None, input_shape=SHAPE, progress=False, **how)  # type: ignore[arg-type]


def test_the_target_comes_first_and_a_clean_model_is_not_cleared() -> None:
    report = _scanned(digit_case().backdoored)
    assert report.evidence is not None
    assert report.evidence.joint.most_suspicious == 0
    assert report.evidence.joint.kinds == ("margin", "prototype")
    assert report.samples == 0
    assert report.p_value < 0.3
    clean = _scanned(digit_case().clean)
    assert (clean.verdict, clean.suspects) == ("inconclusive", ())
    assert "without data many backdoors pass unseen" in clean.reason
    assert clean.p_value > report.p_value
    for found in (report, clean):
        first = found.evidence.joint.most_suspicious  # type: ignore[union-attr]
        in_doubt = 0.01 <= found.p_value < 0.2
        assert found.doubtful[:1] == ((first,) if in_doubt else ())


def test_an_overshooting_class_is_flagged() -> None:
    report = _scanned(digit_case().backdoored, alpha=0.5)
    assert (report.verdict, report.suspects[0]) == ("backdoored", 0)
    assert report.reason.startswith("class 0 stands out in ")
    assert " of synthetic inputs: a hint alone, as without data one clean" in report.reason


def test_norms_are_certified_all_the_same() -> None:
    report = _scanned(digit_case().clean)
    assert report.certificate < 1e-9
    assert report.norm.shape == (10,)


def test_the_same_seed_gives_the_same_report() -> None:
    one, two = (_scanned(digit_case().clean, seed=3) for _ in range(2))
    assert one.p_value == two.p_value
    assert torch.equal(one.norm, two.norm)
    assert _scanned(digit_case().clean, seed=4).p_value != one.p_value


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({}, "input_shape: expected the shape of one input where there is no data"),
        *(
            (
                {"input_shape": (1, 8, 8), "depth": depth},
                'data: expected clean samples for a quantile or any depth but "thorough"',
            )
            for depth in ("norms", "fast")
        ),
        ({"input_shape": (1, 8, 8), "quantile": 0.9}, "data: expected clean samples"),
        ({"input_shape": 8}, r"input_shape: expected the shape of one input, such as"),
        ({"input_shape": (1, 0, 8)}, r"input_shape: expected the shape of one input, such as"),
        ({"input_shape": (3, 8)}, r"input_shape: expected inputs that the model takes"),
        ({"input_shape": (1, 10**6, 10**6)}, r"input_shape: expected inputs that fit into memory"),
        ({"input_shape": (1, 8, 8), "batch_size": 0}, r"batch_size: expected an integer"),
        ({"input_shape": (1, 8, 8), "batch_size": 2.5}, r"batch_size: expected an integer"),
    ],
)
def test_what_is_missing_is_named(how: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        scan(digit_case().clean, None, progress=False, **how)  # type: ignore[arg-type]


def test_a_shape_beside_data_is_refused() -> None:
    with pytest.raises(InputError, match=r"input_shape: .*beside data"):
        scan(digit_case().clean, digit_case().data.defender, input_shape=SHAPE)


def test_a_model_without_gradients_is_refused() -> None:
    class Detached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = digit_case().clean

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.model(images.detach())  # type: ignore[no-any-return]

    with pytest.raises(NoGradientError, match="or pass clean samples"):
        _scanned(Detached())


def test_a_model_with_nan_is_named_as_such() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = digit_case().clean

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.model(images) * float("nan")  # type: ignore[no-any-return]

    with pytest.raises(NotFiniteError, match="finite"):
        _scanned(Broken())


def test_small_batches_give_the_same_classes() -> None:
    whole, small = _scanned(digit_case().clean), _scanned(digit_case().clean, batch_size=16)
    torch.testing.assert_close(whole.norm, small.norm, rtol=0.1, atol=0.05)


def test_a_class_that_takes_everything_is_told_of() -> None:
    network = copy.deepcopy(digit_case().clean)
    with torch.no_grad():
        network[-1].bias[6] += 1e4  # type: ignore[index,union-attr,operator]
    warnings = _scanned(network).warnings
    assert [w for w in warnings if w.startswith("every synthetic input is taken for class 6, ")]
    assert not [w for w in _scanned(digit_case().clean).warnings if "every synthetic" in w]


def test_json_keeps_to_its_schema() -> None:
    content = scan_to_dict(_scanned(digit_case().clean))
    jsonschema.validate(content, json_schema("scan-1"))
    assert content["samples"] == 0
    assert content["accuracy"] is None
    assert set(content["classes"][0]["evidence"]) == {"margin", "prototype"}
    json.dumps(content, allow_nan=False)


def test_the_command_line_scans_without_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    weights, result = tmp_path / "digits.safetensors", tmp_path / "scan.json"
    save_weights(digit_case().clean, weights)
    code = run("scan", weights, "--arch", ARCH, "--input-shape", "1x8x8", "--json", result)
    assert code == ExitCode.INCONCLUSIVE
    shown = capsys.readouterr().out
    assert "no data" in shown
    assert "margin" in shown
    assert json.loads(result.read_text())["source"]["data"] is None
    assert run("scan", weights, "--arch", ARCH) == ExitCode.USAGE
    assert run("scan", weights, "--arch", ARCH, "--input-shape", "1x8x8", "--data", result) == (
        ExitCode.USAGE
    )
    plotted = run(
        "scan", weights, "--arch", ARCH, "--input-shape", "1x8x8", "--plot", tmp_path / "n.png"
    )
    assert plotted == ExitCode.USAGE
    capsys.readouterr()
    for more in (("--depth", "fast"), ("--depth", "norms"), ("--quantile", "0.9")):
        given = "scan", weights, "--arch", ARCH, "--input-shape", "1x8x8"
        assert run(*given, *more) == ExitCode.USAGE
        assert "--depth and --quantile judge real images" in capsys.readouterr().err
    for more in (("--split", "test"), ("--samples", "5"), ("--size", "8")):
        given = "scan", weights, "--arch", ARCH, "--input-shape", "1x8x8"
        assert run(*given, *more) == ExitCode.USAGE
    assert run("scan", weights, "--arch", ARCH, "--input-shape", "big") == ExitCode.USAGE
    assert "expected 3x32x32" in capsys.readouterr().err
