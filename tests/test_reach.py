"""Reach: changes within their budget, measured on held-out images, on real digits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from digits import digit_case, steady_case
from tacext.differentiable import DifferentiableModel, InputBox, class_margin
from tacext.heads import find_head
from tacext.reach import (
    BUDGET,
    ENOUGH_GAIN,
    ImagesInTurn,
    Reach,
    UniversalChanges,
    lift,
    margin_scale,
    reach,
)

SHAPE = (1, 8, 8)
WIDE = 4.0  # a trigger of four of 64 pixels takes more of the diagonal than one of 32x32


def _reach_of(
    network: nn.Module, classes: list[int], steps: int = 20, budgets: tuple[float, ...] = (WIDE,)
) -> Reach:
    images, labels = digit_case().data.defender
    model = DifferentiableModel(network, find_head(network, images[:4]), "scan")
    return reach(
        model,
        InputBox.unit(SHAPE),
        (images[:300], labels[:300]),
        (images[300:], labels[300:]),
        classes,
        budgets=budgets,
        steps=steps,
        progress=False,
    )


def test_a_small_change_reaches_the_target_from_every_class() -> None:
    wide = 1.5 * WIDE  # below, so few images move at all that chance ranks the classes
    found = _reach_of(steady_case().backdoored, list(range(10)), budgets=(wide,))
    assert int(found.gain[0].argmax()) == int(found.rate[0].argmax()) == 0
    assert float(found.rate[0, 0]) > 1.2 * float(found.rate[0, 1:].max())
    length = found.change.flatten(1).norm(dim=1)
    budget = wide * BUDGET * 64**0.5
    torch.testing.assert_close(length, torch.full((10,), budget), rtol=0.02, atol=0)


def test_what_is_measured_is_what_the_change_does() -> None:
    network = digit_case().backdoored
    found = _reach_of(network, [3, 7])
    images, labels = (part[300:] for part in digit_case().data.defender)
    with torch.no_grad():
        before = network(images)
        scale = margin_scale(before, labels)
        assert found.scale == pytest.approx(scale, rel=0.02)  # bfloat16
        for row, k in enumerate((3, 7)):
            after = network((images + found.change[row]).clamp(0, 1))
            goal = torch.full((len(images),), k)
            lift = class_margin(after, goal) - class_margin(before, goal)
            expected = float(lift[labels != k].mean()) / scale
            assert float(found.gain[0, row]) == pytest.approx(expected, abs=0.05)
            rate = float((after.argmax(1) == k)[labels != k].double().mean())
            assert float(found.rate[0, row]) == pytest.approx(rate, abs=0.05)


def test_a_change_grows_step_by_step_up_to_its_budget() -> None:
    first = _reach_of(digit_case().clean, [1], steps=1).change
    assert float(first.norm()) == pytest.approx(WIDE * BUDGET * 64**0.5 / 6, rel=1e-4)
    last = _reach_of(digit_case().clean, [1], steps=30).change
    assert float(last.norm()) <= WIDE * BUDGET * 64**0.5 * (1 + 1e-5)


def test_more_budget_gains_more() -> None:
    gains = [float(_reach_of(digit_case().clean, [5], budgets=(b,)).gain) for b in (0.5, 1, 2, 4)]
    assert gains == sorted(gains)
    assert gains[0] > 0


def test_the_budget_grows_until_the_median_class_gains_something() -> None:
    budgets = (0.5, 1.0, 4.0, 64.0, 65.0)
    found = _reach_of(digit_case().clean, list(range(10)), budgets=budgets)
    medians = found.gain.median(1).values.tolist()
    assert found.budgets == budgets[: len(medians)]
    assert len(medians) in (3, 4)
    assert medians == sorted(medians)
    assert medians[-1] >= ENOUGH_GAIN > medians[-2]


def test_classes_do_not_depend_on_their_neighbours() -> None:
    network = digit_case().clean
    alone = _reach_of(network, [2], steps=5)
    among = _reach_of(network, [1, 2, 5], steps=5)
    torch.testing.assert_close(among.gain[0, 1], alone.gain[0, 0], rtol=0.05, atol=0.05)


def test_every_image_of_the_other_classes_comes_before_any_comes_again() -> None:
    labels = torch.arange(20) % 4
    turn = ImagesInTurn(labels, without=1, seed=0)
    assert sorted(turn.take(15).tolist()) == [i for i in range(20) if i % 4 != 1]
    assert len(set(turn.take(15).tolist())) == 15
    assert sorted(ImagesInTurn(labels, None, 0).take(20).tolist()) == list(range(20))


def test_each_change_follows_the_mean_gradient_of_its_own_images() -> None:
    changes = UniversalChanges(InputBox.unit((2,)), torch.zeros(2, 2), length=0.6)
    changes.ascend(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, -8.0]]))
    torch.testing.assert_close(changes.change, torch.tensor([[0.1, 0.0], [0.0, -0.1]]))
    applied = changes.apply(torch.full((4, 2), 0.95), 2)
    expected = torch.tensor([[1.0, 0.95], [1.0, 0.95], [0.95, 0.85], [0.95, 0.85]])
    torch.testing.assert_close(applied, expected)


def test_the_scale_is_the_median_margin_of_what_is_right() -> None:
    logits = torch.tensor([[3.0, 1.0], [5.0, 1.0], [1.0, 9.0], [0.0, 6.0]])
    assert margin_scale(logits, torch.tensor([0, 0, 0, 1])) == 4.0
    assert margin_scale(logits, torch.tensor([1, 1, 0, 0])) == 1.0


def test_images_that_are_far_enough_give_way_in_the_models_own_scale(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caps: set[float | None] = set()
    ascent = DifferentiableModel.margin_gradient

    def noting(
        model: DifferentiableModel,
        inputs: torch.Tensor,
        classes: torch.Tensor,
        cap: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        caps.add(cap)
        return ascent(model, inputs, classes, cap)

    monkeypatch.setattr(DifferentiableModel, "margin_gradient", noting)
    found = _reach_of(digit_case().clean, [0, 1], steps=2)
    assert caps == {None, 3 * found.scale}  # None: whether there are gradients at all


def test_images_that_were_taken_for_the_class_before_do_not_count_as_moved() -> None:
    labels = torch.tensor([0, 1, 1, 2, 2, 2])
    before = torch.eye(3)[[0, 0, 1, 0, 0, 2]]  # three of other classes are taken for 0 already
    after = torch.eye(3)[[0, 0, 0, 0, 0, 2]]
    _, rate = lift(before, after, labels, 0)
    assert float(rate) == 1 / 2
    _, none = lift(torch.eye(3)[[0] * 6], torch.eye(3)[[0] * 6], labels, 0)
    assert float(none) == 0
