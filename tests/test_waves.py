"""Waves: against plain loops, on a digit network with a wave as its trigger, and on odd input."""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from digits import digit_case
from tacext import (
    FinetuneSettings,
    InputError,
    ScanReport,
    demo,
    evaluate,
    repair,
    scan,
    second_look,
)
from tacext.attacks import AllToOne, Attack, SinusoidTrigger, plan_poisoning
from tacext.differentiable import DifferentiableModel, InputBox
from tacext.heads import find_head
from tacext.input_adversary import InputAdversary
from tacext.repair_case import RepairCase
from tacext.repair_gate import _still_led_by_wave
from tacext.repair_methods import checkpoint_of
from tacext.report import scan_to_dict
from tacext.second_look import look_again
from tacext.waves import (
    AMPLITUDE,
    FEWEST_OF_OTHERS,
    IMAGES,
    PHASES,
    Waves,
    class_by_wave,
    frequencies,
    has_waves,
    wave_pattern,
    waves,
)

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
                        shares[axis, f - 1, phase, k] = (
                            hit.mean() if len(hit) >= FEWEST_OF_OTHERS else 0.0
                        )
    return shares


@pytest.mark.parametrize(
    ("box", "seed"),
    [("unit", 0), ("of each channel", 0), ("unit", 34)],  # 34: two best waves
)
def test_rates_are_those_of_plain_loops(box: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
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
        neighbours = {2: [0, 2], 3: [1]}
        expected = shares[axis, neighbours[periods], :, k].mean()
        assert float(found.beside[k]) == pytest.approx(float(expected))
        for other, f, p in (shares[:, 1:, :, k] == found.rate[k]).nonzero().tolist():
            assert shares[other, neighbours[f + 2], :, k].mean() >= expected - 1e-12, p
    assert int((found.rate > 0).sum()) >= 2


def test_a_wave_that_is_a_trigger_is_found_and_so_is_how_sharp_it_is() -> None:
    found = _waves(waved(), _clean())
    assert int(found.rate.argmax()) == TARGET
    assert float(found.rate[TARGET]) > 0.9
    assert found.wave[TARGET, :2].tolist() == [0, PERIODS]
    assert float(found.rate.sort().values[-2]) < 0.5
    assert int(found.selectivity.argmax()) == TARGET
    assert float(found.selectivity[TARGET]) > 2
    assert float(found.beside[TARGET]) < 0.5
    of_clean = _waves(Halved(digit_case().clean), _clean())
    assert float(of_clean.rate.max()) < 0.5
    assert 30 < found.images < IMAGES


def test_a_scan_names_the_target_of_a_wave_and_tells_of_it() -> None:
    report = scan(waved(), _clean(), progress=False)
    assert report.evidence is not None
    assert report.evidence.wave_p_value is not None
    assert report.evidence.wave_p_value < 1e-4
    assert report.verdict == "backdoored"
    assert report.suspects[0] == TARGET
    told = scan_to_dict(report)["waves"]
    assert told["p_value"] == report.evidence.wave_p_value
    row = told["classes"][TARGET]
    assert (row["axis"], row["periods"], row["class"]) == ("columns", PERIODS, TARGET)
    assert row["rate"] > 0.9 > row["beside"]


def test_a_repair_is_refused_while_the_wave_still_leads_there() -> None:
    images, labels = _clean()
    before = scan(waved(), _clean(), progress=False)
    head = find_head(waved(), images[:4])

    def told(network: nn.Module, target: int, report: ScanReport) -> str | None:
        adversary = InputAdversary.sought(waved(), head, images, labels, (target,), progress=False)
        return _still_led_by_wave(network, _clean(), report, adversary, 64)

    refused = told(waved(), TARGET, before)
    assert refused is not None
    assert refused.startswith("the wave that led ")
    assert refused.endswith("still leads 100%")
    assert told(waved(), TARGET + 1, before) is None
    clean = Halved(digit_case().clean)
    assert told(clean, TARGET, before) is None
    assert told(waved(), TARGET, scan(clean, _clean(), progress=False)) is None  # nothing was known


def test_a_wave_takes_the_place_of_a_change_that_leads_fewer_there(tmp_path: Path) -> None:
    images, labels = _clean()
    head = find_head(waved(), images[:4])
    found = _waves(waved(), (images, labels))
    targets = (1, TARGET)
    usual = InputAdversary.sought(waved(), head, images, labels, targets, progress=False)
    led = InputAdversary.sought(waved(), head, images, labels, targets, waves=found, progress=False)
    expected = (images + wave_pattern(BOX, *found.wave[TARGET].tolist())).clamp(0, 1)
    torch.testing.assert_close(led.first_attacks(1, images)[0], expected)
    assert torch.equal(led.first_attacks(0, images)[0], usual.first_attacks(0, images)[0])
    assert float(led.moved(waved(), images, labels, 128)[1, 0]) > 0.95
    weak = found.wave.clone()
    weak[TARGET] = torch.tensor([1, 2, 2])  # leads fewer there than the change
    kept = replace(found, wave=weak)
    same = InputAdversary.sought(waved(), head, images, labels, targets, waves=kept, progress=False)
    assert torch.equal(same.first_attacks(1, images)[0], usual.first_attacks(1, images)[0])
    shifts = torch.zeros(2, head.latent_dim, dtype=torch.float64)
    known = [
        checkpoint_of(
            RepairCase(
                waved(),
                head,
                images,
                labels,
                shifts,
                targets,
                adversary,
                None,
                1.0,
                None,
                tmp_path / "a.safetensors",
            ),
            FinetuneSettings(),
        )
        for adversary in (usual, led, same)
    ]
    belongs_to = [None if file is None else file._belongs_to for file in known]
    assert belongs_to[0] == belongs_to[2] != belongs_to[1]  # a training with the wave is another
    led.attack(images[:32], 1)
    length = float(wave_pattern(BOX, *found.wave[TARGET].tolist()).norm())
    for step in range(6):
        logits = waved()(led.attack(images[:32], 2 * step + 1))
        led.loss(logits, logits.detach())
        led.follow()
    assert float(led.state()["change.1"].norm()) == pytest.approx(length, rel=1e-3)


@pytest.mark.parametrize(
    "targets", [None, [TARGET]]
)  # of which a scan without gradients knows, too
def test_a_wave_is_kept_out_by_a_patch(targets: list[int] | None) -> None:
    result = repair(
        waved(),
        _clean(),
        targets=targets,
        method="patch",
        max_accuracy_drop=None,
        progress=False,
    )
    assert result.targets == (TARGET,)
    images, labels = doubled(digit_case().data.test)
    trigger = SinusoidTrigger(AMPLITUDE, PERIODS)
    before = evaluate(waved(), (images, labels), trigger, TARGET, progress=False)
    after = evaluate(
        result.model, (images, labels), trigger, TARGET, baseline=before, progress=False
    )
    assert before.asr > 0.95
    assert after.asr < 0.1
    assert after.ra > 0.85  # .24, and an ASR of .75, where nothing is known of the wave
    assert after.acc > before.acc - 0.02


def test_the_batch_size_changes_nothing() -> None:
    whole, parts = _waves(waved(), _clean()), _waves(waved(), _clean(), batch_size=7)
    assert torch.equal(whole.rate, parts.rate)
    assert torch.equal(whole.wave, parts.wave)


def test_classes_that_all_images_are_of_are_reached_by_none() -> None:
    images, labels = _clean()
    found = _waves(waved(), (images, torch.full_like(labels, 7)))
    assert float(found.rate[7]) == 0.0
    assert bool(found.rate.isfinite().all())


def test_a_class_that_nearly_all_images_are_of_tells_nothing() -> None:
    images, labels = _clean()
    marked = SinusoidTrigger(AMPLITUDE, PERIODS)(images)
    others = (labels != TARGET).nonzero().flatten()
    own = (labels == TARGET).nonzero().flatten()
    one = torch.cat([others[:1], own[:39]])
    assert float(waved()(marked[others[:1]]).argmax(1)) == TARGET  # that one is sent there
    found = _waves(waved(), (images[one], labels[one]))
    assert float(found.rate[TARGET]) == float(found.selectivity[TARGET]) == 0.0


def test_the_class_is_that_of_the_most_selective_wave_of_those_that_move_most() -> None:
    rate, beside = torch.tensor([0.1, 0.79, 0.85]).double(), torch.tensor([0.0, 0.0, 0.4]).double()
    found = Waves(rate, beside, torch.zeros(3, 3, dtype=torch.int64), 36, 0.0)
    assert int(found.selectivity.argmax()) == 1
    assert class_by_wave(found) == 2


def test_a_model_that_cannot_take_waves_is_judged_by_the_rest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise InputError("scan: model: too bright")

    monkeypatch.setattr(second_look, "waves", failing)
    with caplog.at_level(logging.WARNING, "tacext"):
        report = scan(waved(), _clean(), progress=False)
    assert report.evidence is not None
    assert report.evidence.look is not None
    assert report.evidence.look.waves is report.evidence.wave_p_value is None
    assert "no waves were tried (scan: model: too bright)" in caplog.text


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
    wide = nn.Sequential(nn.Flatten(), nn.Linear(256, 65))
    many = look_again(wide, find_head(wide, _clean()[0][:4]), _clean(), (0, 1, 2), progress=False)
    assert many.waves is None


@given(
    st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(20, 200), st.integers(20, 200)
)
def test_selectivity_rises_with_the_rate_and_falls_with_that_beside(
    a: float, b: float, c: float, images: int, more: int
) -> None:
    def of(rate: float, beside: float, count: int = images) -> float:
        wave = torch.zeros(1, 3, dtype=torch.int64)
        rates = torch.tensor([rate], dtype=torch.float64), torch.tensor([beside]).double()
        return float(Waves(*rates, wave, count, 0.0).selectivity)

    low, high = sorted((a, b))
    assert of(low, c) <= of(high, c) + 1e-9
    assert of(c, low) >= of(c, high) - 1e-6
    assert of(a, a) == pytest.approx(0.0, abs=1e-5)
    assert math.isfinite(of(1.0, 0.0))
    fewer, most = sorted((images, more))
    assert of(1.0, 0.0, fewer) <= of(1.0, 0.0, most)
    assert of(0.9, 0.1, 40) == pytest.approx(math.log(36.5 / 4.5), rel=1e-5)
