"""Tricks of whoever supplies the model: none of them may end in a clean verdict."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from digits import digit_case, scan_of
from tacext import demo, scan
from tacext.detection import judge_norms
from tacext.errors import HeadNotFoundError, NotFiniteError
from tacext.joint_test import judge_jointly, shipped_calibration
from tacext.reach import Reach
from tacext.scan_report import Depth
from tacext.second_look import SecondLook
from tacext.verdict import weigh


@pytest.mark.parametrize("scale", [1e-25, 1e30])
def test_the_scale_of_the_logits_hides_nothing(scale: float) -> None:
    case = digit_case()
    scaled = copy.deepcopy(case.backdoored)
    with torch.no_grad():
        for parameter in scaled[-1].parameters():
            parameter.mul_(scale)
    found, expected = scan(scaled, case.data.defender), scan_of("backdoored")
    assert found.verdict == expected.verdict == "backdoored"
    assert found.suspects == expected.suspects == (demo.TARGET,)
    assert found.evidence is not None
    assert expected.evidence is not None
    gains = found.evidence.look.reach.gain, expected.evidence.look.reach.gain  # type: ignore[union-attr]
    torch.testing.assert_close(*gains, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("depth", ["fast", "thorough"])
def test_logits_at_the_end_of_what_float32_holds_hide_nothing(depth: Depth) -> None:
    """Those of changed inputs are finite, but not their differences in float32."""
    case = digit_case()
    plain = scan(case.backdoored, case.data.defender, depth=depth)
    model = copy.deepcopy(case.backdoored)
    scale = 0.95 * torch.finfo(torch.float32).max / float(plain.margins.max())
    with torch.no_grad():
        for parameter in model[-1].parameters():
            parameter.mul_(scale)
    found = scan(model, case.data.defender, depth=depth)
    assert (found.verdict, found.suspects, found.warnings) == ("backdoored", (demo.TARGET,), ())
    assert 0.1 < np.log(found.p_value) / np.log(plain.p_value) < 10
    with torch.no_grad():
        for parameter in model[-1].parameters():
            parameter.div_(0.8)
    with pytest.raises(NotFiniteError, match="logits whose differences float32 holds"):
        scan(model, case.data.defender, depth=depth)


def test_infinite_evidence_is_not_taken_for_none() -> None:
    evidence = {kind: np.zeros(10) for kind in ("norm", "corner")}
    evidence["corner"][3] = np.inf
    with pytest.raises(NotFiniteError, match="finite evidence of corner"):
        judge_jointly(evidence, 0.01, shipped_calibration())


def rescaled(model: nn.Module, factor: torch.Tensor) -> nn.Sequential:
    """The same function: latents times factors, their columns of the head divided by them."""
    same = copy.deepcopy(model)
    assert isinstance(same, nn.Sequential)
    norm = next(layer for layer in reversed(same) if isinstance(layer, nn.BatchNorm2d))
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.mul_(factor)
        same[-1].weight.div_(factor)
    return same


def test_rescaled_latents_do_not_hide_a_class_from_balanced_norms() -> None:
    """Factors that make the plain norms blind: latents that the trigger wakes become as dear as others."""
    case = digit_case()
    assert isinstance(case.backdoored, nn.Sequential)
    images = case.data.defender[0]
    with torch.no_grad():
        spread = case.backdoored[:-1](images).std(0)
        model = rescaled(case.backdoored, 1 / spread.clamp_min(0.05 * spread.mean()))
        torch.testing.assert_close(model(images), case.backdoored(images), rtol=1e-4, atol=1e-4)
    found, expected = (scan(m, case.data.defender, depth="norms") for m in (model, case.backdoored))
    assert judge_norms(found.test.norm).verdict != "backdoored"
    assert (found.verdict, found.suspects) == ("backdoored", (demo.TARGET,))
    assert expected.test.balanced is not None
    np.testing.assert_allclose(found.test.balanced, expected.test.balanced, rtol=1e-4)
    assert scan(model, case.data.defender).suspects == (demo.TARGET,)


def test_a_model_that_no_change_moves_is_not_cleared() -> None:
    """Rounding hides all gradients but those of one pixel, which moves little."""

    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = digit_case().clean

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            rounded = (16 * x).round() / 16
            rounded[..., 0, 0] = x[..., 0, 0]
            return self.model(rounded)  # type: ignore[no-any-return]

    report = scan(Rounded(), digit_case().data.defender)
    assert report.verdict == "inconclusive"
    assert any("no change of the inputs moves the model" in w for w in report.warnings)


def test_a_decoy_head_is_not_taken_for_the_models() -> None:
    class Decoy(nn.Module):
        """The backdoored model decides; the clean one adds what all classes share."""

        def __init__(self) -> None:
            super().__init__()
            self.decides, self.decoy = (
                copy.deepcopy(digit_case().backdoored),
                copy.deepcopy(digit_case().clean),
            )
            with torch.no_grad():
                self.decoy[-1].bias += 1e5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (5 * self.decides(x) + self.decoy(x)) / 2  # type: ignore[no-any-return]

    with pytest.raises(HeadNotFoundError, match="an output that no such layer reproduces"):
        scan(Decoy(), digit_case().data.defender)


def test_the_head_must_agree_with_the_model_on_every_sample() -> None:
    class Turncoat(nn.Module):
        """The first linear layer decides, except of images that are bright somewhere."""

        def __init__(self) -> None:
            super().__init__()
            self.model = digit_case().clean

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.model(x)
            bright = x.flatten(1).sum(1) > images.flatten(1).sum(1)[:8].max()
            return torch.where(bright[:, None], -logits, logits)

    images = digit_case().data.defender[0]
    with pytest.raises(HeadNotFoundError, match="whose own differs on"):
        scan(Turncoat(), digit_case().data.defender)


def test_a_model_that_changes_its_inputs_leaves_the_callers_alone() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = digit_case().clean

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model(x.sub_(0.05).clamp_(0, 1))  # type: ignore[no-any-return]

    images, labels = digit_case().data.defender
    mine = images.clone()
    report = scan(InPlace(), (mine, labels))
    assert torch.equal(mine, images)
    assert report.evidence is not None


def test_norms_that_tell_are_not_overruled() -> None:
    """Norms so alike that one at nine tenths of them stands out, and gradients that see nothing."""
    test = judge_norms(np.array([2.0, 2.04, 1.98, 1.8, 2.02, 1.99, 2.01, 1.97, 2.03, 2.0]), 0.01)
    assert test.verdict == "backdoored"
    classes = tuple(range(10))
    gain = torch.full((1, 10), 0.6, dtype=torch.float64)
    reached = Reach(classes, (1.0,), gain, gain, 1.0, torch.zeros(10, 4), 0.0)
    look = SecondLook(classes, reached, None, None, None, None, None, 0.0)
    finding, _ = weigh(test, look, 0.01, shipped_calibration())
    assert finding.verdict == "inconclusive"
    assert "does not bear it out" in finding.reason
