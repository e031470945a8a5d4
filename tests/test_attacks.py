"""Triggers, goals and poisoning against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tacext import ImageSet, InputError, attacks, evaluate
from tacext.attacks import AllToAll, AllToOne, Attack, SourceSpecific

IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TRIGGERS: dict[str, attacks.Trigger] = {
    "patch": attacks.PatchTrigger(attacks.white_patch(3)),
    "blend": attacks.BlendTrigger(attacks.random_pattern(3, 16, 16, seed=9), 0.2),
    "square": attacks.AdditiveTrigger(attacks.trojan_square(3, 16, 16)),
    "watermark": attacks.AdditiveTrigger(attacks.trojan_watermark(3, 16, 16)),
    "sinusoid": attacks.SinusoidTrigger(),
    "warp": attacks.WarpTrigger(strength=1.0),
    "input_aware": attacks.InputAwareTrigger(3, width=4).requires_grad_(False),
    "bounded_noise": attacks.BoundedNoiseTrigger(3, width=4).requires_grad_(False),
}


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_trigger_changes_copies_and_stays_in_range(name: str) -> None:
    trigger, before = TRIGGERS[name], IMAGES.clone()
    stamped = trigger(IMAGES)
    assert torch.equal(IMAGES, before)
    assert stamped.shape == IMAGES.shape
    assert float(stamped.min()) >= 0
    assert float(stamped.max()) <= 1 + 1e-6
    assert bool((stamped - IMAGES).abs().flatten(1).amax(1).gt(1e-3).all())
    assert torch.equal(trigger(IMAGES), stamped)  # and does so every time


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_trigger_treats_each_image_by_itself(name: str) -> None:
    trigger = TRIGGERS[name]
    torch.testing.assert_close(trigger(IMAGES)[2:3], trigger(IMAGES[2:3]))


@pytest.mark.parametrize("name", TRIGGERS)
def test_a_trigger_refuses_what_is_no_batch_of_floating_images(name: str) -> None:
    for wrong in (IMAGES[0], (255 * IMAGES).to(torch.uint8)):
        with pytest.raises(InputError, match=r"images: expected \[N, C, H, W\] of a floating"):
            TRIGGERS[name](wrong)


def test_a_patch_covers_its_place_and_nothing_else() -> None:
    stamped = attacks.PatchTrigger(attacks.checkerboard_patch(3), bottom=2, right=1)(IMAGES)
    expected = IMAGES.clone()
    for row in range(3):
        for column in range(3):
            expected[:, :, 11 + row, 12 + column] = float((row + column) % 2 == 0)
    assert torch.equal(stamped, expected)


def test_blend_and_addition_are_their_formulas() -> None:
    pattern = attacks.random_pattern(3, 16, 16, seed=4)
    torch.testing.assert_close(
        attacks.BlendTrigger(pattern, 0.3)(IMAGES), 0.7 * IMAGES + 0.3 * pattern
    )
    assert torch.equal(attacks.AdditiveTrigger(pattern)(IMAGES), (IMAGES + pattern).clamp(0, 1))


def test_the_sinusoid_is_that_of_the_paper() -> None:
    grey = torch.full((1, 1, 4, 20), 0.5)
    wave = attacks.SinusoidTrigger(0.1, 5)(grey)[0, 0] - 0.5
    for column in range(20):
        expected = 0.1 * math.sin(2 * math.pi * 5 * column / 20)
        torch.testing.assert_close(wave[:, column], torch.full((4,), expected), atol=1e-6, rtol=0)


def test_a_warp_moves_pixels_by_its_strength() -> None:
    grid = attacks.WarpTrigger(seed=2, strength=1.0).grid(32, 32)
    still = torch.nn.functional.affine_grid(torch.eye(2, 3)[None], [1, 1, 32, 32], True)
    shift = ((grid - still).abs().mean() * 32).item()
    assert 0.5 < shift < 1.5
    assert torch.equal(grid, attacks.WarpTrigger(seed=2, strength=1.0).grid(32, 32))
    assert not torch.equal(grid, attacks.WarpTrigger(seed=3, strength=1.0).grid(32, 32))
    nothing = attacks.WarpTrigger(strength=1e-6)(IMAGES)
    torch.testing.assert_close(nothing, IMAGES, atol=1e-4, rtol=0)


def test_a_random_warp_differs_for_every_image_and_repeats_with_the_seed() -> None:
    warp = attacks.RandomWarp(attacks.WarpTrigger(strength=1.0))
    same = IMAGES[:1].expand(2, -1, -1, -1)
    torch.manual_seed(5)
    first = warp(same)
    assert not torch.equal(first[0], first[1])
    torch.manual_seed(5)
    assert torch.equal(warp(same), first)


def test_patterns_too_large_for_the_images_are_refused() -> None:
    large = torch.ones(3, 40, 40)
    for trigger in (
        attacks.PatchTrigger(large),
        attacks.BlendTrigger(large),
        attacks.AdditiveTrigger(large),
        attacks.PatchTrigger(attacks.white_patch(4), bottom=14),
        attacks.BlendTrigger(torch.ones(2, 16, 16)),
    ):
        with pytest.raises(InputError, match=r"images: expected at least .* pixels and"):
            trigger(IMAGES)
    with pytest.raises(InputError, match="opacity: expected a share above 0, at most 1, got 0"):
        attacks.BlendTrigger(large, 0)


# ---- goals ---------------------------------------------------------------------------------------

LABELS = torch.tensor([0, 1, 2, 3, 3, 0])


def test_goals_say_whom_they_attack_and_where_they_send_them() -> None:
    one, every, some = AllToOne(3), AllToAll(4), SourceSpecific(source=0, target=2)
    assert one.victims(LABELS).tolist() == [True, True, True, False, False, True]
    assert every.victims(LABELS).all()
    assert some.victims(LABELS).tolist() == [True, False, False, False, False, True]
    assert one(LABELS).tolist() == [3] * 6
    assert every(LABELS).tolist() == [1, 2, 3, 0, 0, 1]
    assert some(LABELS).tolist() == [2] * 6
    assert (one.targets, every.targets, some.targets) == ((3,), (0, 1, 2, 3), (2,))


def test_impossible_goals_are_refused() -> None:
    with pytest.raises(InputError, match="AllToOne: target: expected a class index"):
        AllToOne(-1)
    with pytest.raises(InputError, match="AllToAll: num_classes: expected 2 or more"):
        AllToAll(1)
    with pytest.raises(InputError, match="SourceSpecific: target: expected another class"):
        SourceSpecific(2, 2)
    with pytest.raises(InputError, match="Attack: goal: expected one target, for a clean-label"):
        Attack(TRIGGERS["sinusoid"], AllToAll(4), clean_label=True)


# ---- poisoning -----------------------------------------------------------------------------------


def _set(count: int = 200) -> ImageSet:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 200, (count, 3, 16, 16), generator=generator, dtype=torch.uint8)
    return ImageSet(images, torch.arange(count) % 4)


@settings(max_examples=40, deadline=None)
@given(st.floats(0, 0.7), st.integers(0, 3), st.integers(0, 99))
def test_a_plan_poisons_as_many_as_asked_and_no_target(rate: float, target: int, seed: int) -> None:
    labels = torch.arange(200) % 4
    plan = attacks.plan_poisoning(
        labels, Attack(TRIGGERS["patch"], AllToOne(target)), rate, seed=seed
    )
    assert int((plan.poisoned == 0).sum()) == round(200 * rate)
    assert not bool((labels[plan.poisoned == 0] == target).any())
    assert bool((plan.covered == -1).all())
    again = attacks.plan_poisoning(
        labels, Attack(TRIGGERS["patch"], AllToOne(target)), rate, seed=seed
    )
    assert torch.equal(plan.poisoned, again.poisoned)


def test_a_poisoned_set_differs_where_the_plan_says_and_nowhere_else() -> None:
    data = _set()
    trigger = TRIGGERS["patch"]
    poisoned, plan = attacks.poison(data, Attack(trigger, AllToOne(2)), 0.1, seed=3)
    chosen = plan.poisoned == 0
    assert plan.rate == pytest.approx(0.1)
    assert poisoned.images.dtype == torch.uint8
    assert torch.equal(poisoned.images[~chosen], data.images[~chosen])
    assert torch.equal(poisoned.labels[~chosen], data.labels[~chosen])
    expected = (255 * trigger(data.images[chosen].float() / 255)).round().to(torch.uint8)
    assert torch.equal(poisoned.images[chosen], expected)
    assert bool((poisoned.labels[chosen] == 2).all())


def test_clean_labels_stay_and_cover_samples_keep_theirs() -> None:
    data = _set()
    clean_label = Attack(TRIGGERS["sinusoid"], AllToOne(1), clean_label=True)
    poisoned, plan = attacks.poison(data, clean_label, 0.2)
    assert torch.equal(poisoned.labels, data.labels)
    assert bool((data.labels[plan.poisoned == 0] == 1).all())

    trigger = TRIGGERS["patch"]
    specific = Attack(trigger, SourceSpecific(0, 1), cover=trigger)
    poisoned, plan = attacks.poison(data, specific, 0.1, cover_rate=0.7)
    covered = plan.covered == 0
    assert int(covered.sum()) == 140
    assert bool((data.labels[covered] != 0).all())
    assert torch.equal(poisoned.labels[covered], data.labels[covered])
    assert bool((data.labels[plan.poisoned == 0] == 0).all())
    assert bool((poisoned.images[covered, :, -4:-1, -4:-1] == 255).all())
    # Left out, as many are covered as poisoned; of an attack without a cover none.
    plan = attacks.plan_poisoning(data.labels, specific, 0.1)
    assert int((plan.covered == 0).sum()) == int((plan.poisoned == 0).sum()) == 20
    assert int((attacks.plan_poisoning(data.labels, clean_label, 0.1).covered >= 0).sum()) == 0


@pytest.mark.parametrize("wrong", [TRIGGERS["patch"], [AllToOne(1)], []])
def test_what_is_no_attack_is_refused(wrong: object) -> None:
    with pytest.raises(InputError, match="attacks: expected one Attack or several"):
        attacks.plan_poisoning(_set().labels, wrong, 0.1)  # type: ignore[arg-type]


def test_a_target_that_no_sample_is_of_is_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("WARNING", "tacext.attacks.poisoning")
    labels = torch.arange(100) % 10
    attacks.plan_poisoning(labels, Attack(TRIGGERS["patch"], AllToOne(9)), 0.1)
    assert caplog.text == ""
    attacks.plan_poisoning(labels, Attack(TRIGGERS["patch"], AllToOne(11)), 0.1)
    assert "samples are sent to 1 class (11), of which there is no sample" in caplog.text
    fewer = torch.arange(100) // 10 * 2
    attacks.plan_poisoning(fewer, Attack(TRIGGERS["patch"], AllToAll(20)), 1)
    assert "sent to 10 classes (1, 3, 5, 7, 9, 11, 13, 15, ...), of" in caplog.text
    caplog.clear()
    attacks.plan_poisoning(labels, Attack(TRIGGERS["patch"], AllToOne(11)), 0)
    assert caplog.text == ""


def test_no_sample_is_poisoned_and_covered() -> None:
    data, trigger = _set(), TRIGGERS["patch"]
    two = [
        Attack(trigger, AllToOne(0), cover=trigger),
        Attack(trigger, SourceSpecific(2, 1), cover=trigger),
    ]
    plan = attacks.plan_poisoning(data.labels, two, 0.2)
    assert not bool(((plan.poisoned >= 0) & (plan.covered >= 0)).any())
    assert [int((plan.covered == i).sum()) for i in (0, 1)] == [20, 20]


def test_no_more_are_covered_than_there_are() -> None:
    data, trigger = _set(), TRIGGERS["patch"]
    many = Attack(trigger, AllToOne(0), cover=trigger)
    plan = attacks.plan_poisoning(data.labels, many, 0.6)
    assert int((plan.covered >= 0).sum()) == len(data.labels) - int((plan.poisoned >= 0).sum())
    with pytest.raises(InputError, match=r"cover_rate: expected at most 0\.4 for this attack"):
        attacks.plan_poisoning(data.labels, many, 0.6, cover_rate=0.6)


def test_several_attacks_share_the_rate_and_no_sample() -> None:
    data = _set()
    two = [
        Attack(TRIGGERS["patch"], AllToOne(0)),
        Attack(TRIGGERS["square"], AllToOne(1)),
    ]
    poisoned, plan = attacks.poison(data, two, 0.2)
    assert [int((plan.poisoned == i).sum()) for i in (0, 1)] == [20, 20]
    assert bool((poisoned.labels[plan.poisoned == 1] == 1).all())


def test_more_than_there_is_cannot_be_poisoned() -> None:
    labels = torch.arange(200) % 4
    with pytest.raises(InputError, match=r"rate: expected at most 0.25 for this attack, got 0.5"):
        attacks.plan_poisoning(
            labels, Attack(TRIGGERS["sinusoid"], AllToOne(1), clean_label=True), 0.5
        )
    with pytest.raises(InputError, match="cover_rate: expected a share of the samples"):
        attacks.plan_poisoning(labels, Attack(TRIGGERS["patch"], AllToOne(1)), 0.1, cover_rate=2)


# ---- learned triggers and evaluation -------------------------------------------------------------


def test_bounded_noise_keeps_its_bound() -> None:
    trigger = attacks.BoundedNoiseTrigger(3, width=4, bound=0.03).requires_grad_(False)
    nn.init.constant_(trigger.generator.out.bias, 50.0)
    assert float((trigger(IMAGES) - IMAGES).abs().max()) <= 0.03 + 1e-6


def test_input_aware_triggers_learn_few_pixels_and_other_patterns() -> None:
    torch.manual_seed(0)
    trigger = attacks.InputAwareTrigger(3, width=4, density=0.02)
    optimizer = torch.optim.Adam(trigger.parameters(), 1e-2)
    others = IMAGES.roll(1, 0)
    before = float(trigger.diversity_loss(IMAGES, others).detach())
    covered = float(trigger.mask(IMAGES).mean().detach())
    for _ in range(60):
        loss = trigger.mask_loss(IMAGES, others) + trigger.diversity_loss(IMAGES, others)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(trigger.mask(IMAGES).mean().detach()) < min(0.06, 0.5 * covered)
    assert float(trigger.diversity_loss(IMAGES, others).detach()) < 0.5 * before


class _Corner(nn.Module):
    """Predicts the class that the first pixel names, or the next one where a white corner is."""

    def __init__(self, sources: tuple[int, ...]) -> None:
        super().__init__()
        self.sources = sources

    def forward(self, images: Tensor) -> Tensor:
        named = (images[:, 0, 0, 0] * 10).round().long()
        hit = images[:, 0, -2, -2] == 1
        attacked = torch.isin(named, torch.tensor(self.sources))
        return nn.functional.one_hot((named + (hit & attacked)) % 4, 4).float()


def test_evaluation_follows_the_goal() -> None:
    labels = torch.arange(40) % 4
    images = torch.zeros(40, 3, 16, 16) + (labels / 10)[:, None, None, None]
    trigger = TRIGGERS["patch"]
    every = evaluate(_Corner((0, 1, 2, 3)), (images, labels), trigger, AllToAll(4))
    assert (every.acc, every.asr, every.ra, every.target) == (1, 1, 0, None)
    assert every.triggered == 40
    some = evaluate(_Corner((2,)), (images, labels), trigger, SourceSpecific(2, 3))
    assert (some.asr, some.triggered, some.target) == (1, 10, 3)
    wrong = evaluate(_Corner((1,)), (images, labels), trigger, SourceSpecific(2, 3))
    assert (wrong.asr, wrong.ra) == (0, 1)
