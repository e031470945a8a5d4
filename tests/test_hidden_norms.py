"""A latent patch that undoes what was done to the head hides the norms, and nothing else."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from torch import nn

from digits import Cropped, digit_case, padded, padded_corner
from tacext import demo, evaluate, scan
from tacext.heads import find_head
from tacext.latent_patch import LatentPatch, with_latent_patch
from tacext.scan_report import Depth


@functools.cache
def stuck(backdoored: bool = True) -> nn.Module:
    """A network whose head always says 5, and a patch in front of it that takes that back."""
    case = digit_case()
    model = Cropped(copy.deepcopy(case.backdoored if backdoored else case.clean))
    head = find_head(model, padded(case.data.defender)[0][:4])
    more, zero = 200.0 * torch.eye(10)[5], torch.zeros(1, 128)
    undone = (torch.linalg.pinv(head.weight.detach().double()) @ more.double()).float()[None]
    with torch.no_grad():
        assert head.module.bias is not None
        head.module.bias.add_(more)
    patch = LatentPatch(
        zero, -torch.ones(1), zero.clone(), undone.contiguous(), torch.zeros(1, 128, 1),
        torch.zeros(1, 1, 128), zero.clone(), torch.tensor([5]),
    )  # fmt: skip
    return with_latent_patch(model, head, patch)[0]


@pytest.mark.parametrize("depth", ["fast", "thorough"])
def test_what_else_tells_of_a_backdoor_is_looked_for(depth: Depth) -> None:
    done = evaluate(stuck(), padded(digit_case().data.test), padded_corner, demo.TARGET)
    assert min(done.acc, done.asr) > 0.95
    report = scan(stuck(), padded(digit_case().data.defender), depth=depth)
    assert (report.verdict, report.suspects) == ("backdoored", (demo.TARGET,))
    assert report.limited == (5,)
    assert np.isnan(report.test.norm).all()
    assert float(report.norm[5]) == 0
    assert any("without its latent patch" in warning for warning in report.warnings)


@pytest.mark.parametrize("quantile", [1.0, 0.99])
@pytest.mark.parametrize("depth", ["norms", "fast"])
def test_a_model_whose_norms_a_patch_hides_is_never_clean(depth: Depth, quantile: float) -> None:
    """Nor one whose patch is trusted, as its norms are as unknown; but then no doubt is cast on the patch."""
    data = padded(digit_case().data.defender)
    report = scan(stuck(backdoored=False), data, depth=depth, quantile=quantile)
    trusted = scan(stuck(backdoored=False), data, depth=depth, quantile=quantile, trust_patch=True)
    assert report.verdict == trusted.verdict == "inconclusive"
    samples = "every sample" if quantile == 1 else "nearly every sample"
    told = (
        f"without its latent patch the model would take {samples} for class 5, so that the norms, which are of "
        "latents in front of it, cannot be compared"
    )
    assert trusted.reason == told
    assert report.reason == (
        f"{told}; but the model has a latent patch, which could lead inputs into a class as well as keep them out"
    )
    assert report.samples_advised is None


def test_of_a_model_that_says_one_class_alone_nothing_is_blamed_on_a_patch() -> None:
    """As one without a patch does, whose norms are what they seem."""
    model = copy.deepcopy(digit_case().clean)
    with torch.no_grad():
        model[-1].bias[5] += 200  # type: ignore[index,union-attr,operator]
    report = scan(model, digit_case().data.defender, depth="fast")
    assert report.evidence is None
    assert "every sample is already predicted as class 5" in report.reason
    assert float(report.test.norm[5]) == 0
