"""Poisoning a training set: which samples get the trigger, and which label."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..data import ImageSet, check_labels
from ..errors import InputError, counted, listed
from .goals import Goal
from .triggers import Trigger

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Attack:
    """A trigger and where it sends whom.

    Attributes:
        trigger: maps images [N, C, H, W] to the same images with the trigger.
        goal: `AllToOne(t)`, `AllToAll(C)` or `SourceSpecific(source, t)`.
        clean_label: poison only samples of the target itself, whose labels are right (SIG).
        cover: what samples get that carry the trigger, or one like it, and keep their label: the
            trigger itself for source-specific attacks, a `RandomWarp` for WaNet. None: no cover.
    """

    trigger: Trigger
    goal: Goal
    clean_label: bool = False
    cover: Trigger | None = None

    def __post_init__(self) -> None:
        """Checks that a clean-label attack has one target.

        Raises:
            InputError: it has several.
        """
        if self.clean_label and len(self.goal.targets) != 1:
            raise InputError.of(
                "Attack",
                "goal",
                expected="one target, for a clean-label attack",
                got=f"{len(self.goal.targets)}",
                way_out="use AllToOne",
            )


@dataclass(frozen=True, eq=False)
class PoisoningPlan:
    """Who gets which trigger; made once, applied to whole sets or to batches after augmentation.

    Attributes:
        attacks: the attacks.
        poisoned: int64 [N], the index of the attack that poisons a sample, -1 for none.
        covered: int64 [N], the index of the attack whose cover a sample gets, -1 for none.
    """

    attacks: tuple[Attack, ...]
    poisoned: Tensor = field(repr=False)
    covered: Tensor = field(repr=False)

    @property
    def rate(self) -> float:
        """The share of poisoned samples."""
        return float((self.poisoned >= 0).double().mean())

    def apply(self, images: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The batch as the attacker hands it over; the arguments are left alone.

        Args:
            images: floating [B, C, H, W] in [0, 1].
            labels: int64 [B], the true ones.
            index: int64 [B], where these samples are in the set that the plan was made for.
        """
        images, labels = images.clone(), labels.clone()
        for number, attack in enumerate(self.attacks):
            chosen = self.poisoned[index] == number
            if bool(chosen.any()):
                images[chosen] = attack.trigger(images[chosen])
                if not attack.clean_label:
                    labels[chosen] = attack.goal(labels[chosen])
            chosen = self.covered[index] == number
            if attack.cover is not None and bool(chosen.any()):
                images[chosen] = attack.cover(images[chosen])
        return images, labels


def plan_poisoning(
    labels: Tensor,
    attacks: Attack | Sequence[Attack],
    rate: float,
    *,
    cover_rate: float | None = None,
    seed: int = 0,
) -> PoisoningPlan:
    """Chooses at random who is poisoned.

    Args:
        labels: int64 [N], the true classes.
        attacks: one, or several that share the poisoned samples evenly.
        rate: poisoned samples, as a share of all N. A clean-label attack takes its samples from
            the target class, a source-specific one from the source.
        cover_rate: further samples that get the cover of the attacks that have one, and keep their
            label; None: as many as are poisoned, or as there are.
        seed: the same seed chooses the same samples.

    Raises:
        InputError: no attack, a rate out of range, or more samples asked for than there are candidates.

    Warns of classes that samples are sent to and none is of.
    """
    checked = check_labels(labels, "plan_poisoning", "labels")
    several = tuple(attacks) if isinstance(attacks, Iterable) else (attacks,)
    wrong = [attack for attack in several if not isinstance(attack, Attack)]
    if wrong or not several:
        raise InputError.of(
            "plan_poisoning",
            "attacks",
            expected="one Attack or several",
            got=type(wrong[0]).__name__ if wrong else "none",
            way_out="Attack(trigger, AllToOne(target)) sends what carries the trigger to the target",
        )
    for argument, value in (("rate", rate), ("cover_rate", cover_rate)):
        if value is not None and not 0 <= value <= 1:
            raise InputError.of(
                "plan_poisoning",
                argument,
                expected="a share of the samples, 0 to 1",
                got=f"{value}",
                way_out="0.05 poisons one sample in twenty",
            )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(checked), generator=generator)
    poisoned = torch.full_like(checked, -1)
    covered = torch.full_like(checked, -1)
    for number, attack in enumerate(several):
        victims = attack.goal.victims(checked)
        if attack.clean_label:
            victims = checked == attack.goal.targets[0]
        _take(poisoned, order, victims, number, round(rate * len(checked) / len(several)), "rate")
        _tell_of_new_classes(attack, checked[poisoned == number], checked)
    for number, attack in enumerate(several):
        if attack.cover is None:
            continue
        free = (poisoned < 0) & (covered < 0)
        if _is_selective(attack, checked):
            free &= ~attack.goal.victims(checked)
        count = round((rate if cover_rate is None else cover_rate) * len(checked) / len(several))
        if cover_rate is None:
            count = min(count, int(free.sum()))
        _take(covered, order, free, number, count, "cover_rate")
    return PoisoningPlan(several, poisoned, covered)


def _tell_of_new_classes(attack: Attack, victims: Tensor, labels: Tensor) -> None:
    """Warns where samples are sent to classes that no sample is of."""
    if attack.clean_label:
        return
    unknown = sorted(set(attack.goal(victims).tolist()) - set(labels.unique().tolist()))
    if unknown:
        logger.warning(
            "plan_poisoning: samples are sent to %s (%s), of which there is no sample; "
            "check the goal and the labels",
            counted(len(unknown), "class", "classes"),
            listed(unknown),
        )


def _is_selective(attack: Attack, labels: Tensor) -> bool:
    """Whether some classes besides the targets are not aimed at: those are to be covered."""
    victims = attack.goal.victims(labels)
    bystanders = ~victims
    for target in attack.goal.targets:
        bystanders &= labels != target
    return bool(bystanders.any())


def _take(
    chosen: Tensor, order: Tensor, candidates: Tensor, number: int, count: int, argument: str
) -> None:
    """Marks the first `count` candidates in `order` that are not yet taken."""
    free = order[(candidates & (chosen < 0))[order]]
    if count > len(free):
        raise InputError.of(
            "plan_poisoning",
            argument,
            expected=f"at most {len(free) / max(1, len(order)):.3g} for this attack",
            got=f"{count / max(1, len(order)):.3g}, more samples than there are candidates",
            way_out="lower it",
        )
    chosen[free[:count]] = number


def poison(
    data: ImageSet,
    attacks: Attack | Sequence[Attack],
    rate: float,
    *,
    cover_rate: float | None = None,
    seed: int = 0,
) -> tuple[ImageSet, PoisoningPlan]:
    """A poisoned copy of a training set, and who was poisoned in it.

    Train on the result as it is. To augment before the trigger is set, as an attacker with control
    of the training would, use `plan_poisoning` and `PoisoningPlan.apply` on each batch.

    Args:
        data: clean images and labels.
        attacks: as `plan_poisoning`, and so are the others.
        rate: poisoned samples, as a share of all.
        cover_rate: further samples with the attack's cover; None: as many as are poisoned, or as there are.
        seed: of the choice.

    Returns:
        An ImageSet of the same dtype, and the plan.

    Raises:
        InputError: as `plan_poisoning`.
    """
    plan = plan_poisoning(data.labels, attacks, rate, cover_rate=cover_rate, seed=seed)
    images, labels = data.images.clone(), data.labels.clone()
    touched = ((plan.poisoned >= 0) | (plan.covered >= 0)).nonzero().flatten()
    for index in torch.split(touched, 1024):
        part = data.images[index]
        as_float = part.float() / 255 if part.dtype == torch.uint8 else part
        stamped, labels[index] = plan.apply(as_float, data.labels[index], index)
        if part.dtype == torch.uint8:
            stamped = (255 * stamped).round()
        images[index] = stamped.to(part.dtype)
    return ImageSet(images, labels, data.class_names, data.source), plan
