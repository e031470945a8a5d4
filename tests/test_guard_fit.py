"""What a guard learns of latents drawn at will, and whether its promise holds."""

from __future__ import annotations

import math

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tacext import InputError
from tacext.guard_fit import Geometry, fit_scorer
from tacext.guard_scoring import calibration_table, threshold_at


def test_the_distances_are_those_of_a_covariance() -> None:
    """near and far are y' P y with P the inverse of a covariance that is even beside the basis."""
    generator = torch.Generator().manual_seed(3)
    predicted = torch.arange(600) % 3
    mix = torch.eye(12) + 0.1 * torch.randn(12, 12, generator=generator)
    mixed = torch.randn(600, 12, generator=generator) @ mix
    geometry = Geometry.of(mixed + 3 * predicted[:, None], predicted, torch.ones(3, 12))
    assert torch.allclose(geometry.basis @ geometry.basis.T, torch.eye(12), atol=1e-4)
    latent = torch.randn(20, 12, generator=generator)
    parts, classes = geometry.parts(latent, torch.eye(3)[torch.arange(20) % 3])
    y = ((latent - geometry.mean[classes]) * geometry.inverse_spread).double()
    rows = (mixed + 3 * predicted[:, None] - geometry.mean[predicted]) * geometry.inverse_spread
    covariance = (rows.double().T @ rows.double()) / 597
    exact = (y @ torch.linalg.inv(covariance) * y).sum(1).sqrt()  # all 12 directions are known
    assert torch.allclose(parts[:, 1].double(), exact, rtol=1e-3)


# ---- the promised rate ---------------------------------------------------------------------------


def drawn(seed: int, samples: int) -> tuple[Tensor, Tensor]:
    """Latents and logits of classes that overlap, of uneven size, with heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    shape = torch.Generator().manual_seed(1)
    centres = 2 * torch.randn(7, 40, generator=shape)
    mix = torch.randn(40, 40, generator=shape) / 6
    label = (7 * torch.rand(samples, generator=generator) ** 2).long().clamp(max=6)
    noise = torch.randn(samples, 40, generator=generator)
    tail = 1 / torch.rand(samples, 1, generator=generator).clamp(min=1e-4).pow(0.25)
    latent = (centres[label] + tail * noise @ mix).relu()
    return latent, latent @ centres.T


@pytest.mark.parametrize(("samples", "fits"), [(120, 60), (200, 60), (500, 40), (2500, 10)])
def test_the_promised_rate_holds_from_few_samples_on(samples: int, fits: int) -> None:
    rate, flagged, asked = 0.02, 0, 4000
    perturbation = torch.randn(7, 40, generator=torch.Generator().manual_seed(2))
    rates = []
    for seed in range(fits):
        scorer = fit_scorer(*drawn(seed, samples), perturbation, rate, seed, "test")
        count = int(scorer(*drawn(10_000 + seed, asked)).flagged.sum())
        flagged += count
        rates.append(count / asked)
    # Over fits, the rate of a conformal guard is beta distributed around the promise.
    deviation = math.sqrt(rate * (1 - rate) / samples / fits + rate * (1 - rate) / asked / fits)
    assert flagged / asked / fits <= rate + 3 * deviation
    assert flagged / asked / fits >= 0.3 * rate  # and nothing is given away for it
    few = scipy.stats.beta(samples * rate, samples * (1 - rate)).ppf(1 - 1e-3 / fits)
    assert max(rates) <= few + 4 * math.sqrt(rate / asked)


def test_p_values_of_clean_samples_are_uniform_enough() -> None:
    perturbation = torch.randn(7, 40, generator=torch.Generator().manual_seed(2))
    scorer = fit_scorer(*drawn(5, 1000), perturbation, 0.05, 0, "test")
    p_value = scorer(*drawn(6, 8000)).p_value
    for level in (0.01, 0.05, 0.2, 0.5):
        share = float((p_value <= level).float().mean())
        assert share <= level + 3 * math.sqrt(level * (1 - level) * (1 / 1000 + 1 / 8000))


@given(
    st.lists(st.floats(0, 100, width=32), min_size=1, max_size=60),
    st.integers(2, 12),
    st.floats(0.01, 0.9),
    st.floats(0, 120, width=32),
)
def test_flagged_means_a_p_value_within_the_rate(
    scores: list[float], exact: int, rate: float, asked: float
) -> None:
    knots, exceeding = calibration_table(torch.tensor(scores, dtype=torch.float64), exact)
    below = int((knots < asked).sum())
    p_value = (1 + float(exceeding[below])) / (1 + len(scores))
    true = (1 + sum(s >= asked for s in scores)) / (1 + len(scores))
    assert p_value >= true - 1e-6  # never understated
    if len(scores) <= 2 * exact:
        assert p_value == pytest.approx(true)
    try:
        threshold = threshold_at(knots, exceeding, len(scores), rate, "test")
    except InputError:
        assert 1 / (1 + len(scores)) > rate or exceeding.min() > 0
        return
    assert (asked > float(threshold)) == (p_value <= rate * (1 + 1e-12))
