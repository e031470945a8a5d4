"""Shuffle: an all-to-all backdoor in real digits, its clean twin, and a model built to be shuffled."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from digits import all_to_all, digit_case
from tacext import demo
from tacext.differentiable import DifferentiableModel, InputBox
from tacext.heads import find_head
from tacext.reach import BUDGET, BUDGETS
from tacext.shuffle import Shuffle, _assign, shuffle


def _shuffle_of(network: nn.Module, seed: int = 0) -> Shuffle:
    images, labels = digit_case().data.defender
    model = DifferentiableModel(network, find_head(network, images[:4]), "scan")
    return shuffle(
        model,
        InputBox.unit((1, 8, 8)),
        (images[:300], labels[:300]),
        (images[300:], labels[300:]),
        seed=seed,
        progress=False,
    )


def test_a_backdoor_from_all_to_all_is_found_with_its_moves() -> None:
    network = all_to_all()
    images, labels = digit_case().data.test
    with torch.no_grad():
        moved = (network(demo.white_corner(images)).argmax(1) == (labels + 1) % 10).double().mean()
    assert float(moved) > 0.8  # the attack itself works
    found = _shuffle_of(network)
    assert found.share > 0.6
    right = [found.destinations[k] == (k + 1) % 10 for k in range(10)]
    assert sum(right) >= 7
    assert found.budget in BUDGETS


def test_a_clean_twin_and_a_single_target_are_not_shuffled() -> None:
    shares = [
        _shuffle_of(network).share for network in (digit_case().clean, digit_case().backdoored)
    ]
    assert max(shares) < 0.5


def test_the_share_is_what_the_change_does_to_held_out_images() -> None:
    network = digit_case().clean
    found = _shuffle_of(network)
    images, labels = (part[300:] for part in digit_case().data.defender)
    with torch.no_grad():
        predicted = network((images + found.change).clamp(0, 1)).argmax(1)
    shares = torch.tensor(
        [
            float((predicted[labels == k] == found.destinations[k]).double().mean())
            for k in range(10)
        ]
    )
    torch.testing.assert_close(found.shares.float(), shares, atol=0.1, rtol=0)  # bfloat16
    assert found.share == pytest.approx(float(found.shares.mean()))
    assert sorted(found.destinations) == list(range(10))


def test_only_the_given_budgets_are_tried() -> None:
    images, labels = digit_case().data.defender
    network = digit_case().clean
    model = DifferentiableModel(network, find_head(network, images[:4]), "scan")
    box = InputBox.unit((1, 8, 8))
    parts = images, labels
    found = shuffle(model, box, parts, parts, budgets=(0.5,), steps=3, progress=False)
    assert found.budget == 0.5
    assert float(found.change.norm()) <= 0.5 * BUDGET * box.diagonal * (1 + 1e-5)


def test_the_same_seed_finds_the_same() -> None:
    first, again = _shuffle_of(digit_case().clean, 3), _shuffle_of(digit_case().clean, 3)
    assert torch.equal(first.change, again.change)
    assert first.destinations == again.destinations


def test_the_assignment_is_the_best_without_fixed_points() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        value = generator.standard_normal((5, 5))
        found = _assign(value)
        best = max(
            sum(value[k, order[k]] for k in range(5))
            for order in itertools.permutations(range(5))
            if all(order[k] != k for k in range(5))
        )
        assert sum(value[k, found[k]] for k in range(5)) == pytest.approx(best)
        assert all(found[k] != k for k in range(5))


def test_a_class_without_images_goes_nowhere() -> None:
    images, labels = digit_case().data.defender
    seen = labels != 4
    network = digit_case().clean
    model = DifferentiableModel(network, find_head(network, images[:4]), "scan")
    parts: tuple[Tensor, Tensor] = (images[seen], labels[seen])
    found = shuffle(model, InputBox.unit((1, 8, 8)), parts, parts, steps=3, progress=False)
    assert found.destinations[4] == -1
    assert bool(found.shares[4].isnan())
    assert 0 <= found.share <= 1
