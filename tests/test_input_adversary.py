"""The attacker of a repair: what it puts on which inputs, which way it climbs, and what it asks for."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn

from digits import Cropped, digit_case, padded
from tacext import demo
from tacext.differentiable import InputBox
from tacext.heads import find_head
from tacext.input_adversary import InputAdversary, divergence, not_the_target
from tacext.reach import BUDGET


@functools.cache
def larger() -> tuple[Tensor, Tensor]:
    return padded(digit_case().data.defender)


def sought(targets: tuple[int, ...] = (demo.TARGET,)) -> tuple[nn.Module, InputAdversary]:
    network = Cropped(digit_case().backdoored)
    images, labels = larger()
    head = find_head(network, images[:4])
    return network, InputAdversary.sought(network, head, images, labels, targets, progress=False)


def test_half_of_a_batch_gets_the_change_and_the_rest_the_patch() -> None:
    _, adversary = sought()
    images = larger()[0][:7]
    attacked = adversary.attack(images, 0)
    assert attacked.shape == images.shape
    differ = (attacked != images).flatten(1)
    change = (attacked - images)[:4].detach()
    length = adversary._changes[0].length
    assert float(change.flatten(1).norm(dim=1).max()) <= length * (1 + 1e-5)
    assert length >= BUDGET * InputBox.unit(images.shape[1:]).diagonal * (1 - 1e-6)
    side = 2  # an eighth of 16
    assert int(differ[4:].sum(1).max()) <= side**2
    y, x = adversary._patterns.corner[0].tolist()  # type: ignore[union-attr]
    outside = torch.ones(16, 16, dtype=torch.bool)
    outside[y : y + side, x : x + side] = False
    assert torch.equal(attacked[4:, :, outside], images[4:, :, outside])
    attacked = attacked.detach()
    assert float(attacked.min()) >= 0
    assert float(attacked.max()) <= 1


def test_it_climbs_into_the_target_whatever_the_model_is_taught() -> None:
    """On a model that stands still, from a blank start, each step leads further into the target."""
    network, adversary = sought((demo.TARGET, 5))
    images, labels = larger()
    adversary._changes[0].change.zero_()
    adversary._patterns.pattern.fill_(0.5)  # type: ignore[union-attr]
    kept = images[labels != demo.TARGET][:120]
    with torch.no_grad():
        original = network(kept)
    sure = []
    for step in range(0, 100, 2):  # even steps are the first target's turn
        logits = network(adversary.attack(kept, step))
        adversary.loss(logits, original)
        adversary.follow()
        share = logits.softmax(1)[:, demo.TARGET].detach()
        sure.append((float(share[:60].mean()), float(share[60:].mean())))
    assert sure[-1][0] > 10 * sure[0][0]  # of a change as small as it may be
    assert sure[-1][1] > sure[0][1] + 0.5


def test_targets_take_turns() -> None:
    network, adversary = sought((demo.TARGET, 5))
    images = larger()[0][:8]
    before = [changes.change.clone() for changes in adversary._changes]
    logits = network(adversary.attack(images, 1))
    adversary.loss(logits, logits.detach())
    adversary.follow()
    assert torch.equal(adversary._changes[0].change, before[0])
    assert not torch.equal(adversary._changes[1].change, before[1])


def test_the_loss_is_what_it_says() -> None:
    _, adversary = sought()
    adversary.attack(larger()[0][:4], 0)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 10, generator=generator)
    original = torch.randn(4, 10, generator=generator)
    original[0, demo.TARGET] = 50.0  # taken for the target when it was clean
    attack = adversary._attack
    given = logits + 0 * sum(part.sum() for part in attack)  # the attack must have a way to climb
    found = float(adversary.loss(given, original).detach())
    p = logits.softmax(1)
    expected = -float((1 - p[1, demo.TARGET]).log()) / 4
    expected += 0.5 * float(divergence(logits[2:], original[2:]))
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_sure_model_still_has_a_gradient() -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    loss = not_the_target(logits, 0)
    assert loss.tolist() == pytest.approx([200 - 0.6931, 0.8584], abs=1e-3)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert float(gradient[0, 0]) == pytest.approx(1.0)


def test_divergence_is_that_of_torchs_distributions() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(5, 3, generator=generator) for _ in range(2))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=b), torch.distributions.Categorical(logits=a)
    ).mean()
    assert float(divergence(a, b)) == pytest.approx(float(expected), rel=1e-5)


def test_what_moved_at_first_is_counted_on_inputs_that_could_move() -> None:
    network, adversary = sought()
    images, labels = larger()
    rates = adversary.moved(network, images, labels, 64)
    assert rates.shape == (1, 2)
    with torch.no_grad():
        movable = images[(labels != demo.TARGET) & (network(images).argmax(1) != demo.TARGET)]
        changed = (movable + adversary._first_changes[0]).clamp(0, 1)
        expected = (network(changed).argmax(1) == demo.TARGET).double().mean()
    assert float(rates[0, 0]) == pytest.approx(float(expected))
    assert float(rates[0, 1]) > 0.9  # the patch is the trigger
