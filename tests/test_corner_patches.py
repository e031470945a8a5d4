"""Squares in the corners: against plain loops, on a digit network with a patch as its trigger, on odd input."""

from __future__ import annotations

import functools
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from digits import digit_case
from tacext import InputError, demo, sample_keeper, scan, scanning, second_look
from tacext.attacks import AllToOne, Attack, PatchTrigger, plan_poisoning
from tacext.corner_patches import (
    DRAWS,
    FEWEST_IMAGES,
    FEWEST_OF_OTHERS,
    HELD_OUT,
    TRIED_ON,
    CornerPatches,
    corner_patches,
    margins_of_all,
)
from tacext.differentiable import DifferentiableModel, InputBox, class_margin
from tacext.heads import find_head
from tacext.report import json_schema, scan_to_dict, write_json
from test_waves import Halved, doubled

TARGET = 4
BOX = InputBox.unit((1, 16, 16))


class Rounded(nn.Module):
    """A network that no gradient passes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model((x * 255).round() / 255)  # type: ignore[no-any-return]


@functools.cache
def patched() -> nn.Module:
    """The demo's network on images of twice the size, with a square of two pixels in a corner as its trigger."""
    images, labels = digit_case().data.training
    trigger = PatchTrigger(torch.ones(1, 1, 1), bottom=0, right=7)
    plan = plan_poisoning(labels, [Attack(trigger, AllToOne(TARGET))], 0.2, seed=0)
    marked, given = plan.apply(images, labels, torch.arange(len(labels)))
    return Halved(demo.train(marked, given))


def clean() -> tuple[Tensor, Tensor]:
    return doubled(digit_case().data.defender)


def found_in(
    network: nn.Module,
    samples: tuple[Tensor, Tensor],
    box: InputBox = BOX,
    classes: tuple[int, ...] = tuple(range(10)),
    batch_size: int = 128,
    seed: int = 0,
) -> CornerPatches:
    model = DifferentiableModel(network, find_head(network, samples[0][:4]), "scan")
    found = corner_patches(
        model, box, samples, classes, batch_size=batch_size, seed=seed, progress=False
    )
    assert found is not None
    return found


def small_case(
    seed: int, height: int = 13, width: int = 16
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    network = nn.Sequential(
        nn.Conv2d(2, 6, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(96, 4)
    ).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    images = torch.rand(FEWEST_IMAGES, 2, height, width, generator=generator) * 2 - 1
    return network, (images, torch.randint(4, (FEWEST_IMAGES,), generator=generator))


def test_margins_of_all_are_those_of_each_class() -> None:
    logits = torch.randn(9, 5, generator=torch.Generator().manual_seed(0))
    logits[0] = 1.0  # all equal
    logits[1, :2] = 7.0  # two ahead
    for k in range(5):
        expected = class_margin(logits, torch.full((9,), k))
        torch.testing.assert_close(margins_of_all(logits)[:, k], expected)


def _plainly(
    network: nn.Module, samples: tuple[Tensor, Tensor], box: InputBox, seed: int
) -> tuple[Tensor, Tensor]:
    """Gains and rates [S, J] by loops over images, draws, cells and classes."""
    images, labels = samples
    generator = torch.Generator().manual_seed(seed)
    held, held_labels = images[:HELD_OUT], labels[:HELD_OUT]
    gains, rates = [], []

    def margins(x: Tensor) -> list[float]:
        with torch.no_grad():
            logits = network(x[None])[0].tolist()
        return [logits[k] - max(logits[:k] + logits[k + 1 :]) for k in range(len(logits))]

    before = [margins(x) for x in held]
    own = [row[int(k)] for row, k in zip(before, held_labels, strict=True)]
    right = sorted(margin for margin in own if margin > 0)
    scale = right[(len(right) - 1) // 2]
    channels, height, width = images.shape[1:]
    for side in (round(min(height, width) / 8), round(min(height, width) * 3 / 16)):
        tops = [(y, x) for y in (0, height - side) for x in (0, width - side)]

        def paint(
            image: Tensor, corner: int, signs: Tensor, side: int, at: list[tuple[int, int]]
        ) -> None:
            y, x = at[corner]
            for c in range(channels):
                low, high = float(box.low[c]), float(box.high[c])
                values = [[high if sign > 0 else low for sign in row] for row in signs[c].tolist()]
                image[c, y : y + side, x : x + side] = torch.tensor(values)

        effect = torch.zeros(4, 4, channels, side, side, dtype=torch.float64)
        for image, label in zip(images[HELD_OUT:], labels[HELD_OUT:], strict=True):
            shape = (DRAWS // 2, 4, channels, side, side)
            half = torch.randint(2, shape, generator=generator, dtype=torch.int8) * 2 - 1
            draws = [*half, *(-half)]
            reached = []
            for draw in draws:
                marked = image.clone()
                for corner in range(4):
                    paint(marked, corner, draw[corner], side, tops)
                reached.append([min(margin, 2 * scale) for margin in margins(marked)])
            for k in range(4):
                for row, draw in zip(reached, draws, strict=True):
                    if int(label) != k:
                        effect[k] += row[k] * draw.double()
        gain, rate = torch.zeros(4), torch.zeros(4)
        for k in range(4):
            lifted = []
            for corner in range(4):
                total = 0.0
                for image in images[HELD_OUT : HELD_OUT + TRIED_ON]:
                    marked = image.clone()
                    paint(marked, corner, effect[k, corner], side, tops)
                    total += min(margins(marked)[k], 2 * scale)
                lifted.append(total)
            corner = lifted.index(max(lifted))
            rises, moved = [], []
            for image, label, margin in zip(held, held_labels, before, strict=True):
                marked = image.clone()
                paint(marked, corner, effect[k, corner], side, tops)
                if int(label) != k:
                    rises.append(margins(marked)[k] - margin[k])
                    if margin[k] <= 0:
                        moved.append(margins(marked)[k] > 0)
            gain[k], rate[k] = sum(rises) / len(rises) / scale, sum(moved) / len(moved)
        gains.append(gain)
        rates.append(rate)
    return torch.stack(gains), torch.stack(rates)


@pytest.mark.parametrize("seed", [0, 1])
def test_gains_and_rates_are_those_of_plain_loops(seed: int) -> None:
    network, samples = small_case(seed)
    box = InputBox.around(samples[0])
    assert box.low.shape == (2, 1, 1)  # values of each channel
    found = found_in(network, samples, box, tuple(range(4)), seed=seed)
    gain, rate = _plainly(network, samples, box, seed)
    assert found.sides == (2, 2)  # 13 / 8 and 39 / 16 pixels, rounded
    torch.testing.assert_close(found.gain.float(), gain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.rate.float(), rate)
    assert float(found.rate.max()) > 0


def test_the_target_of_a_patch_stands_out_and_its_square_lies_on_the_trigger() -> None:
    found = found_in(patched(), clean())
    assert found.sides == (2, 3)
    assert found.gain.argmax(1).tolist() == [TARGET, TARGET]
    for size, side in enumerate(found.sides):
        others = torch.cat([found.gain[size, :TARGET], found.gain[size, TARGET + 1 :]])
        assert float(found.gain[size, TARGET]) > 2 * float(others.max())
        assert found.corner[size, TARGET].tolist() == [16 - side, 0]
        y, x = 16 - side, 0
        assert torch.equal(found.pattern[size][TARGET, :, -2:, :2], torch.ones(1, 2, 2))
        images, labels = clean()
        marked = images[:HELD_OUT].clone()
        marked[..., y : y + side, x : x + side] = found.pattern[size][TARGET]
        with torch.no_grad():
            after, before = patched()(marked).argmax(1), patched()(images[:HELD_OUT]).argmax(1)
        movable = (labels[:HELD_OUT] != TARGET) & (before != TARGET)
        share = (after == TARGET)[movable].double().mean()
        assert float(found.rate[size, TARGET]) == pytest.approx(float(share))
        assert float(share) > 0.9
    of_clean = found_in(Halved(digit_case().clean), clean())
    assert float(of_clean.rate.max()) < 0.5


def test_a_fast_scan_finds_it_and_so_does_a_thorough_one_behind_gradients_of_zero() -> None:
    report = scan(patched(), clean(), depth="fast", progress=False)
    assert (report.verdict, report.suspects[0]) == ("backdoored", TARGET)
    assert "corner (p = " in report.reason
    assert (
        "; a square of 2x2 pixels at row 14, column 0 sends 100% of the held-out" in report.reason
    )
    assert report.evidence is not None
    assert report.evidence.joint.kinds == ("norm", "balanced", "corner")
    look = report.evidence.look
    assert look is not None
    assert look.reach is look.patch is look.shuffle is look.source is None
    assert look.waves is not None
    assert look.corners is not None
    hidden = scan(Rounded(patched()), clean(), progress=False)
    assert (hidden.verdict, hidden.suspects[0]) == ("backdoored", TARGET)
    assert len(hidden.warnings) == 1
    assert hidden.warnings[0].startswith("gradients were not asked, as that was not possible (")
    # The same squares of the same images, whatever else was looked at.
    whole = scan(patched(), clean(), progress=False)
    assert whole.evidence is not None
    assert whole.evidence.look is not None
    assert whole.evidence.look.corners is not None
    assert torch.equal(whole.evidence.look.corners.gain, look.corners.gain)


def test_fast_and_thorough_scans_lay_the_same_squares_over_normalised_images() -> None:
    images, labels = clean()
    noisy = images + 0.2 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    seen = []
    for depth in ("fast", "thorough"):
        report = scan(patched(), (noisy, labels), depth=depth, progress=False)  # type: ignore[arg-type]
        assert report.evidence is not None
        assert report.evidence.look is not None
        assert report.evidence.look.corners is not None
        seen.append(report.evidence.look.corners)
    assert torch.equal(seen[0].gain, seen[1].gain)
    assert float(seen[0].pattern[0].max()) > 1.2


def test_a_fast_scan_of_a_clean_model_is_clean_and_tells_what_it_did_not_do() -> None:
    network = Halved(digit_case().clean)
    report = scan(network, clean(), depth="fast", progress=False)
    assert report.verdict == "clean"
    assert report.reason.startswith("no class stands out in norm, balanced norm or corner")
    assert report.reason.endswith("; a scan that asks gradients sees more")
    without = scan(Rounded(network), clean(), progress=False)
    assert (
        without.verdict == "inconclusive"
    )  # whoever asks for gradients is told that there are none


def test_a_report_tells_of_the_squares_in_json() -> None:
    told = scan_to_dict(scan(patched(), clean(), depth="fast", progress=False))
    squares = told["corner_patches"]["squares"]
    assert [size["side"] for size in squares] == [2, 3]
    assert told["corner_patches"]["images"] == HELD_OUT
    row = squares[0]["classes"][TARGET]
    assert (row["class"], row["row"], row["column"]) == (TARGET, 14, 0)
    assert row["rate"] > 0.9
    assert set(json_schema("scan-1")["properties"]) >= {"corner_patches", "waves"}
    small = scan_to_dict(scan(digit_case().clean, digit_case().data.defender, progress=False))
    assert small["corner_patches"] is None  # 8 pixels


def test_neither_batches_nor_other_classes_change_the_outcome() -> None:
    whole = found_in(patched(), clean())
    parts = found_in(patched(), clean(), batch_size=7)
    some = found_in(patched(), clean(), classes=(1, TARGET))
    torch.testing.assert_close(parts.gain, whole.gain, rtol=1e-4, atol=1e-5)
    assert torch.equal(parts.rate, whole.rate)
    torch.testing.assert_close(some.gain, whole.gain[:, [1, TARGET]], rtol=1e-4, atol=1e-5)
    assert torch.equal(found_in(patched(), clean()).gain, whole.gain)
    other = found_in(patched(), clean(), seed=1)
    assert not torch.equal(other.gain, whole.gain)
    assert other.gain.argmax(1).tolist() == [TARGET, TARGET]


def test_large_images_have_cells_of_several_pixels() -> None:
    network, samples = small_case(0, 64, 80)
    found = found_in(network, samples, InputBox.around(samples[0]), tuple(range(4)))
    assert found.sides == (8, 12)
    for pattern, cells in zip(found.pattern, (4, 6), strict=True):
        size = pattern.shape[-1] // cells
        coarse = pattern[..., ::size, ::size]
        assert torch.equal(coarse.repeat_interleave(size, 2).repeat_interleave(size, 3), pattern)
        assert coarse.unique().numel() > 1


def test_of_a_class_that_nearly_all_images_are_of_nothing_is_known(tmp_path: Path) -> None:
    images, labels = clean()
    of_one = torch.full_like(labels, TARGET)
    for others, known in ((FEWEST_OF_OTHERS - 1, False), (FEWEST_OF_OTHERS, True)):
        of_one[:others] = 0
        found = found_in(patched(), (images, of_one))
        assert bool(found.gain[:, TARGET].isfinite().all()) is known
        assert bool(found.rate[:, TARGET].isfinite().all()) is known
    own = labels == TARGET
    many = torch.cat([images[own].repeat(60, 1, 1, 1), images[:20]])
    report = scan(
        patched(),
        (many, torch.cat([labels[own].repeat(60), labels[:20]])),
        depth="fast",
        progress=False,
    )
    assert report.evidence is not None
    assert math.isnan(report.evidence.joint.kind_p_values["corner"][TARGET])
    told = scan_to_dict(report)
    write_json(tmp_path / "report.json", told, operation="scan")  # which knows no NaN
    for size in told["corner_patches"]["squares"]:
        assert size["classes"][TARGET]["gain"] is size["classes"][TARGET]["rate"] is None


def test_few_images_and_what_is_no_image_are_not_looked_at() -> None:
    images, labels = clean()
    model = DifferentiableModel(patched(), find_head(patched(), images[:4]), "scan")
    few = images[: FEWEST_IMAGES - 1], labels[: FEWEST_IMAGES - 1]
    assert corner_patches(model, BOX, few, (0, 1), progress=False) is None
    for shape in ((64,), (9, 9), (1, 11, 40)):
        assert corner_patches(model, InputBox.unit(shape), clean(), (0, 1), progress=False) is None


def test_of_few_samples_nothing_else_is_told() -> None:
    images, labels = clean()
    for depth in ("fast", "thorough"):
        report = scan(patched(), (images[:50], labels[:50]), depth=depth, progress=False)  # type: ignore[arg-type]
        assert report.verdict == "inconclusive"
        assert report.warnings == ("50 samples are too few for a verdict; use 200 or more",)
        assert report.samples_advised == 2500
        assert "12 pixels" not in report.reason


def test_images_too_large_to_keep_enough_of_leave_no_model_clean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = Halved(digit_case().clean)
    assert scan(network, clean(), depth="fast", progress=False).verdict == "clean"
    monkeypatch.setattr(sample_keeper, "MOST_BYTES", 50 * 4 * 256)
    report = scan(network, clean(), depth="fast", progress=False)
    assert report.evidence is None
    assert report.verdict == "inconclusive"
    (warning,) = report.warnings
    assert warning.startswith("only the norms were tested: no squares in the corners were tried")
    assert "which takes 56 images (got 50 images; " in warning
    thorough = scan(network, clean(), progress=False)
    assert thorough.verdict == "inconclusive"
    assert "no squares in the corners were tried" in thorough.warnings[0]
    assert scan(network, clean(), depth="norms", progress=False).warnings == ()


def test_models_that_cannot_take_squares_are_judged_by_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def failing(*_: object, **__: object) -> None:
        raise InputError("scan: model: too bright")

    monkeypatch.setattr(second_look, "corner_patches", failing)
    report = scan(patched(), clean(), progress=False)
    assert report.evidence is not None
    assert "corner" not in report.evidence.joint.kinds
    told = "no squares in the corners were tried (scan: model: too bright)"
    assert report.warnings == (told,)
    assert (report.verdict, report.suspects[0]) == ("backdoored", TARGET)
    # A model that does not let itself be looked at is not clean, whatever else says so.
    assert scan(Halved(digit_case().clean), clean(), progress=False).verdict == "inconclusive"
    fast = scan(Halved(digit_case().clean), clean(), depth="fast", progress=False)
    assert fast.evidence is None
    assert fast.warnings == (f"only the norms were tested: {told}",)
    assert fast.verdict == "inconclusive"


def test_weights_of_inference_mode_are_no_hindrance_to_a_fast_scan() -> None:
    with torch.inference_mode():
        network = nn.Sequential(nn.Flatten(), nn.Linear(256, 10)).eval()
        images, labels = clean()
        report = scan(network, (images, labels), depth="fast", progress=False)
    assert report.evidence is not None
    assert report.evidence.joint.kinds == ("norm", "balanced", "corner")


def test_scan_hands_the_seed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []
    really = scanning.look_without_gradients

    def watched(*arguments: object, **more: object) -> object:
        seeds.append(more["seed"])  # type: ignore[arg-type]
        return really(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(scanning, "look_without_gradients", watched)
    scan(patched(), clean(), depth="fast", seed=5, progress=False)
    assert seeds == [5]
