"""Patch reach: squares where reach points, measured on held-out images, on real digits."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from digits import digit_case
from tacext.differentiable import DifferentiableModel, InputBox, class_margin
from tacext.heads import find_head
from tacext.patch_reach import (
    FEWEST_CLASSES,
    ROUNDS,
    PatchReach,
    _Patches,
    has_room,
    heaviest_squares,
    patch_reach,
)
from tacext.reach import margin_scale, reach

BOX = InputBox.unit((1, 8, 8))
SIDE = 1 / 4  # 2 of 8 pixels


def _patched(
    network: nn.Module,
    classes: list[int],
    batch_size: int = 128,
    only: int | None = None,
) -> PatchReach:
    """Of the classes, or of the `only`-th of them; where to look is found for all in any case."""
    images, labels = digit_case().data.defender
    model = DifferentiableModel(network, find_head(network, images[:4]), "scan")
    fit, held_out = (images[:300], labels[:300]), (images[300:], labels[300:])
    reached = reach(model, BOX, fit, held_out, classes, batch_size=batch_size, progress=False)
    if only is not None:
        change = reached.change[only : only + 1]
        reached = replace(reached, classes=(classes[only],), change=change)
    return patch_reach(
        model, BOX, fit, held_out, reached, side=SIDE, batch_size=batch_size, progress=False
    )


def test_a_patch_reaches_the_target_from_every_class() -> None:
    found = _patched(digit_case().backdoored, list(range(10)))
    assert found.side == 2
    assert found.images == 100
    assert int(found.rate.argmax()) == int(found.gain.argmax()) == 0
    assert float(found.rate[0]) > 0.9
    assert float(found.rate[1:].max()) < 0.5
    assert float(found.gain[0]) > 2 * float(found.gain[1:].max())
    assert float(_patched(digit_case().clean, list(range(10))).rate.max()) < 0.5


def test_what_is_measured_is_what_the_patch_does() -> None:
    network = digit_case().backdoored
    found = _patched(network, [0, 7])
    images, labels = (part[300:] for part in digit_case().data.defender)
    with torch.no_grad():
        before = network(images)
        scale = margin_scale(before, labels)
        for row, k in enumerate((0, 7)):
            patched = images.clone()
            y, x = found.corner[row].tolist()
            patched[:, :, y : y + found.side, x : x + found.side] = found.pattern[row]
            goal = torch.full((len(images),), k)
            after = network(patched)
            lift = class_margin(after, goal) - class_margin(before, goal)
            expected = float(lift[labels != k].mean()) / scale
            assert float(found.gain[row]) == pytest.approx(expected, abs=0.05)  # bfloat16
            rate = (after.argmax(1) == k)[labels != k].double().mean()
            assert float(found.rate[row]) == pytest.approx(float(rate), abs=0.04)
            assert float(found.pattern[row].min()) >= 0
            assert float(found.pattern[row].max()) <= 1


def test_classes_do_not_depend_on_their_neighbours() -> None:
    network = digit_case().backdoored
    together, alone = _patched(network, [0, 4, 9]), _patched(network, [0, 4, 9], only=1)
    torch.testing.assert_close(together.gain[1], alone.gain[0], rtol=0.1, atol=0.05)
    again = _patched(network, [0, 4, 9])
    assert torch.equal(together.gain, again.gain)
    assert torch.equal(together.pattern, again.pattern)


def test_classes_that_fall_behind_cost_little_and_are_measured_all_the_same() -> None:
    """Steps are counted by the images that pass; a class given up keeps the patch it had."""
    count = 0

    def add(_module: nn.Module, given: tuple[torch.Tensor]) -> None:
        nonlocal count
        count += len(given[0])

    network = digit_case().backdoored
    images, labels = digit_case().data.defender
    model = DifferentiableModel(network, find_head(network, images[:4]), "scan")
    fit, held_out = (images[:300], labels[:300]), (images[300:], labels[300:])
    reached = reach(model, BOX, fit, held_out, range(10), progress=False)
    with network.register_forward_pre_hook(add):
        found = patch_reach(model, BOX, fit, held_out, reached, side=SIDE, progress=False)
    measured = (len(reached.classes) + 1) * len(held_out[1])
    in_full = sum(10 * turn.places * turn.steps * turn.images for turn in ROUNDS)
    last = ROUNDS[-1]
    saved = (10 - max(FEWEST_CLASSES, round(10 * last.classes))) * last.steps * last.images
    assert count == measured + in_full - saved
    assert found.classes == tuple(range(10))
    for row, k in enumerate(found.classes):
        y, x = found.corner[row].tolist()
        patched = held_out[0].clone()
        patched[:, :, y : y + found.side, x : x + found.side] = found.pattern[row]
        with torch.no_grad():
            rate = (network(patched).argmax(1) == k)[held_out[1] != k].double().mean()
        assert float(found.rate[row]) == pytest.approx(float(rate), abs=0.04)


def test_small_batches_bound_every_pass() -> None:
    sizes: list[int] = []
    network = digit_case().clean
    hook = network.register_forward_pre_hook(lambda _module, given: sizes.append(len(given[0])))
    _patched(network, [0, 1, 2], batch_size=24)
    hook.remove()
    assert max(sizes[1:]) <= 24  # the first is that of find_head


def test_a_trigger_in_a_corner_that_no_image_lights_is_found() -> None:
    """Where all images are black a change gains nothing at first, and reach does not point there."""
    network = digit_case().backdoored
    found = _patched(network, [0])
    assert found.corner[0].tolist() == [6, 6]


def test_the_heaviest_place_goes_on_however_far_it_got() -> None:
    """Classes are ranked by what was reached all the same."""
    fit = digit_case().data.defender
    corner = torch.tensor([[[3, 3], [0, 0], [0, 6], [6, 6]], [[2, 4], [0, 0], [0, 6], [6, 6]]])
    reached = torch.tensor([-5.0, -2.0, -1.0, -3.0, -4.0, -9.0, 0.5, -2.5])

    def kept(classes: int, *, first: bool) -> tuple[list[int], list[list[int]], list[float]]:
        patches = _Patches([4, 7], corner, 2, fit, BOX, 0, torch.device("cpu"))
        patches.margin = reached.clone()
        patches.keep_best(2, classes, first=first)
        return patches.classes, patches._patterns.corner.tolist(), patches.margin.tolist()

    best = ([4, 4, 7, 7], [[0, 6], [0, 0], [0, 6], [6, 6]], [-1, -2, 0.5, -2.5])
    assert kept(2, first=False) == best
    with_first = ([4, 4, 7, 7], [[3, 3], [0, 6], [2, 4], [0, 6]], [-5, -1, -4, 0.5])
    assert kept(2, first=True) == with_first
    assert kept(1, first=True)[0] == [7, 7]
    patches = _Patches([4, 7], corner, 2, fit, BOX, 0, torch.device("cpu"))
    patches.margin = reached.clone()
    patches.keep_best(2, 1, first=True)
    assert patches._left[4][0].tolist() == [0, 6]  # the best of what is left behind
    assert [turn.heaviest for turn in ROUNDS] == [False, True, False]


def test_only_the_second_round_keeps_the_heaviest_place(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, firsts = _Patches.keep_best, []

    def noting(self: _Patches, places: int, classes: int, *, first: bool = False) -> None:
        firsts.append(first)
        kept(self, places, classes, first=first)

    monkeypatch.setattr(_Patches, "keep_best", noting)
    _patched(digit_case().clean, [0, 1])
    assert firsts == [False, True, False, False]  # and once more for what is left in the end


def test_the_heaviest_squares_are_where_the_change_is() -> None:
    change = torch.zeros(3, 2, 9, 12)
    change[0, 1, 4:6, 7:9] = 3.0
    change[0, 0, 0, 0] = 1.0
    change[1, 0, 8, 11] = -1.0  # the last corner: the square must stay inside
    corner = heaviest_squares(change, 2, 2)
    assert corner[0].tolist() == [[4, 7], [0, 0]]
    assert corner[1, 0].tolist() == [7, 10]
    apart = (corner[:, 0] - corner[:, 1]).abs().amax(1)
    assert bool((apart >= 2).all())  # they do not overlap
    assert heaviest_squares(torch.ones(1, 1, 2, 2), 2, 2).tolist() == [[[0, 0], [0, 0]]]


@pytest.mark.parametrize(
    ("shape", "room"),
    [
        ((3, 32, 32), True),
        ((1, 12, 16), True),
        ((1, 8, 8), False),
        ((3, 32, 7), False),
        ((64,), False),
    ],
)
def test_only_images_have_room(shape: tuple[int, ...], room: bool) -> None:
    assert has_room(shape) is room
