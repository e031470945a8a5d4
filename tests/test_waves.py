"""Waves: against plain loops, on a digit network with a wave as its trigger, and on odd input."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from digits import digit_case
from tacext import demo, scan
from tacext.attacks import AllToOne, Attack, SinusoidTrigger, plan_poisoning
from tacext.differentiable import DifferentiableModel, InputBox
from tacext.heads import find_head
from tacext.second_look import evidence_of, look_again, share_evidence, tuning_evidence
from tacext.waves import AMPLITUDE, IMAGES, PHASES, Waves, frequencies, has_waves, waves

TARGET, PERIODS = 4, 3
BOX = InputBox.unit((1, 16, 16))


class Halved(nn.Module):
    """A digit network on images of twice the size, on which waves have room."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(functional.avg_pool2d(x, 2))  # type: ignore[no-any-return]


def doubled(samples: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return samples[0].repeat_interleave(2, 2).repeat_interleave(2, 3), samples[1]


def _other_waves(images: Tensor) -> Tensor:
    """One period on the first half of the images, two on the second."""
    half = len(images) // 2
    parts = zip((1, 2), (images[:half], images[half:]), strict=True)
    return torch.cat([SinusoidTrigger(AMPLITUDE, periods)(part) for periods, part in parts])


@functools.cache
def waved() -> nn.Module:
    """The demo's network with a wave from left to right as its trigger, and no other wave."""
    images, labels = doubled(digit_case().data.training)
    attack = Attack(SinusoidTrigger(AMPLITUDE, PERIODS), AllToOne(TARGET), cover=_other_waves)
    plan = plan_poisoning(labels, [attack], 0.2, seed=0)
    marked, given = plan.apply(images, labels, torch.arange(len(labels)))
    return Halved(demo.train(functional.avg_pool2d(marked, 2), given))


def _waves(
    network: nn.Module, samples: tuple[Tensor, Tensor], box: InputBox = BOX, batch_size: int = 128
) -> Waves:
    model = DifferentiableModel(network, find_head(network, samples[0][:4]), "scan")
    found = waves(model, box, samples, batch_size=batch_size, progress=False)
    assert found is not None
    return found


def _clean() -> tuple[Tensor, Tensor]:
    return doubled(digit_case().data.defender)


def _plainly(network: nn.Module, images: Tensor, labels: Tensor, box: InputBox) -> Tensor:
    """The share of images of other classes that every wave sends into each class, [2, F, P, C]."""
    height, width = images.shape[2:]
    with torch.no_grad():
        before = network(images).argmax(1)
        classes = network(images[:1]).shape[1]
        shares = torch.zeros(2, len(frequencies(box.shape)), PHASES, classes, dtype=torch.float64)
        for f in frequencies(box.shape):
            for phase in range(PHASES):
                for axis, size in enumerate((width, height)):
                    changed = images.clone()
                    for i in range(size):
                        value = AMPLITUDE * math.sin(2 * math.pi * (f * i / size + phase / PHASES))
                        line = changed[..., i] if axis == 0 else changed[..., i, :]
                        line += value * (box.high - box.low).reshape(-1, 1)
                    after = network(box.clamp(changed)).argmax(1)
                    for k in range(classes):
                        others = (labels != k) & (before != k)
                        hit = (after == k)[others].double()
                        shares[axis, f - 1, phase, k] = hit.mean() if len(hit) else 0.0
    return shares


@pytest.mark.parametrize("box", ["unit", "of each channel"])
def test_rates_are_those_of_plain_loops(box: str) -> None:
    generator = torch.Generator().manual_seed(3)
    network = nn.Sequential(
        nn.Conv2d(2, 6, 5, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 5 * 6, 4)
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    images = torch.rand(IMAGES, 2, 13, 16, generator=generator)
    spanned = InputBox.unit((2, 13, 16))
    if box != "unit":
        images = images * torch.tensor([3.0, 0.5])[:, None, None] - 1
        spanned = InputBox.around(images)
    labels = torch.randint(4, (IMAGES,), generator=generator)
    found = _waves(network, (images, labels), spanned)
    shares = _plainly(network, images, labels, spanned)
    assert list(frequencies(spanned.shape)) == [1, 2, 3]
    for k in range(4):
        axis, periods, phase = found.wave[k].tolist()
        assert float(found.rate[k]) == float(shares[axis, periods - 1, phase, k])
        assert float(found.rate[k]) == float(shares[:, 1:, :, k].max())  # one period is a shade
        before, after = found.beside[k].tolist()
        assert before == pytest.approx(float(shares[axis, periods - 2, :, k].mean()))
        if periods == 3:
            assert math.isnan(after)
        else:
            assert after == pytest.approx(float(shares[axis, 2, :, k].mean()))


def test_a_wave_that_is_a_trigger_is_found_and_so_is_how_sharp_it_is() -> None:
    found = _waves(waved(), _clean())
    assert int(found.rate.argmax()) == TARGET
    assert float(found.rate[TARGET]) > 0.9
    assert found.wave[TARGET, :2].tolist() == [0, PERIODS]
    assert float(found.rate.sort().values[-2]) < 0.5
    rate, beside = found.rate.numpy(), found.beside.numpy()
    tuning = tuning_evidence(rate, beside, found.images)
    assert int(tuning.argmax()) == TARGET
    assert np.isnan(beside[TARGET]).tolist() == [False, True]  # periods of four pixels are no waves
    of_clean = _waves(Halved(digit_case().clean), _clean())
    assert float(of_clean.rate.max()) < 0.5
    assert 30 < found.images < IMAGES


def test_a_scan_names_the_target_of_a_wave_and_tells_of_it() -> None:
    report = scan(waved(), _clean(), progress=False)
    assert report.evidence is not None
    p_values = report.evidence.joint.kind_p_values
    assert int(p_values["wave"].argmin()) == int(p_values["tuning"].argmin()) == TARGET
    assert p_values["wave"][TARGET] < 1e-3
    assert report.verdict == "backdoored"
    assert report.suspects[0] == TARGET
    assert f"a wave of {PERIODS} periods from left to right sends " in report.reason


def test_the_batch_size_changes_nothing() -> None:
    whole, parts = _waves(waved(), _clean()), _waves(waved(), _clean(), batch_size=7)
    assert torch.equal(whole.rate, parts.rate)
    assert torch.equal(whole.wave, parts.wave)


def test_classes_that_all_images_are_of_are_reached_by_none() -> None:
    images, labels = _clean()
    found = _waves(waved(), (images, torch.full_like(labels, 7)))
    assert float(found.rate[7]) == 0.0
    assert bool(found.rate.isfinite().all())


def test_few_samples_are_not_looked_at() -> None:
    images, labels = _clean()
    network = waved()
    model = DifferentiableModel(network, find_head(network, images[:4]), "scan")
    few = images[: IMAGES - 1], labels[: IMAGES - 1]
    assert waves(model, BOX, few, progress=False) is None


def test_frequencies_have_periods_longer_than_four_pixels_and_neighbours() -> None:
    assert list(frequencies((3, 32, 32))) == [1, 2, 3, 4, 5, 6, 7]
    assert list(frequencies((1, 28, 28))) == [1, 2, 3, 4, 5, 6]
    assert list(frequencies((3, 224, 200))) == [1, 2, 3, 4, 5, 6, 7]
    assert has_waves((1, 13, 300))
    assert not has_waves((1, 12, 300))
    assert not has_waves((64,))
    assert not has_waves((9, 9))


def test_of_many_classes_and_of_digits_waves_are_no_evidence() -> None:
    images, labels = digit_case().data.defender
    network = digit_case().clean
    look = look_again(
        network, find_head(network, images[:4]), (images, labels), tuple(range(10)), progress=False
    )
    assert look.waves is None
    assert "wave" not in evidence_of(np.ones(10), look)
    wide = nn.Sequential(nn.Flatten(), nn.Linear(256, 65))
    many = look_again(wide, find_head(wide, _clean()[0][:4]), _clean(), (0, 1, 2), progress=False)
    assert many.waves is None
    fewer = replace(look, waves=_waves(waved(), _clean()))
    assert evidence_of(np.ones(10), fewer)["wave"].shape == (10,)


def test_tuning_is_the_distance_of_logits_from_the_mean_of_those_beside() -> None:
    rate = np.array([0.9, 0.5, 0.0])
    beside = np.array([[0.1, 0.3], [np.nan, 0.5], [0.0, np.nan]])
    logit = share_evidence
    expected = [
        float(logit(rate[:1], 60)[0] - (logit(beside[0], 60).mean())),
        0.0,
        0.0,
    ]
    assert tuning_evidence(rate, beside, 60).tolist() == pytest.approx(expected)
