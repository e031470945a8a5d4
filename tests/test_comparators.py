"""The detectors that the bench compares with, on real digit classifiers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from digits import digit_case, steady_case
from tacext.differentiable import DifferentiableModel
from tacext.heads import find_head

sys.path.append(str(Path(__file__).parents[1] / "benchmarks" / "detection"))

import comparators
from comparators import _Cost, _smallest_mask, mm_bd, neural_cleanse


def _model(network: nn.Module) -> DifferentiableModel:
    return DifferentiableModel(network, find_head(network, torch.rand(4, 1, 8, 8)), "compare")


def test_neural_cleanse_needs_the_smallest_mask_for_the_target() -> None:
    images = digit_case().data.defender[0]
    found = neural_cleanse(_model(steady_case().backdoored), images, 2, steps=8)
    assert found.first == 0
    assert found.statistic[0] < 0.7 * found.statistic[1:].min()
    assert found.statistic.shape == (2,)


def test_mm_bd_drives_the_target_furthest() -> None:
    found = mm_bd(_model(digit_case().backdoored), (1, 8, 8), 3)
    assert found.first == 0
    assert found.statistic[0] > found.statistic[1:].max()


def test_the_gamma_null_is_that_of_the_other_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    margins = iter([5.0, 6.0, 5.5, 6.5, 5.2, 5.8, 6.1, 5.9, 40.0, 6.2, *np.linspace(5, 6, 10)])
    monkeypatch.setattr(comparators, "_largest_margin", lambda *_: next(margins))
    model = _model(digit_case().clean)
    far, near = mm_bd(model, (1, 8, 8), 10), mm_bd(model, (1, 8, 8), 10)
    assert (far.flagged, far.first) == (True, 8)
    assert (near.flagged, near.first) == (False, 9)
    others = np.linspace(5, 6, 10)[:9]
    p_value = 1 - stats.gamma.cdf(6.0, *stats.gamma.fit(others)) ** 10
    assert near.score == pytest.approx(-np.log(p_value))


def test_a_search_that_gains_no_more_ends_early(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Cost, "PATIENCE", 1)
    images = digit_case().data.defender[0]
    model = _model(digit_case().backdoored)
    with model.open():
        size, ended = _smallest_mask(model, images, 0, steps=200, seed=0)
        cut, unfinished = _smallest_mask(model, images, 0, steps=2, seed=0)
    assert ended
    assert not unfinished
    assert size < 10 < cut  # the trigger has four pixels of 64


def test_the_cost_waits_rises_and_falls() -> None:
    cost = _Cost()
    for _ in range(4):
        cost.update(works=True)
    assert cost.value == 0
    cost.update(works=True)
    assert cost.value == 1e-3
    for _ in range(5):
        cost.update(works=True)
    assert cost.value == 2e-3
    assert cost.rose
    assert not cost.fell
    for _ in range(5):
        cost.update(works=False)
    assert cost.value == 2e-3 / 2**1.5
    assert cost.fell
    cost.update(works=True)
    for _ in range(4):
        cost.update(works=False)
    assert cost.value == 2e-3 / 2**1.5  # the run was interrupted
