"""Reach: how far one small change of the input, the same for all images, drives them into a class.

A trigger is such a change. For every class it is found by projected gradient ascent on the mean
margin of the class; how much it lifts that margin on images that it was not made on is the evidence.
How large a change tells the classes apart depends on the data: it is doubled until the median class
gains something.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .differentiable import DifferentiableModel, InputBox, class_margin, unit_gradient
from .progress import progress_bar

# Length of the change, as a share of the diagonal of the box of all inputs: 1.5 on 32x32 images of
# three channels in [0, 1].
BUDGET = 1.5 / 3072**0.5
MOMENTUM = 0.8
# Multiples of that length, and the median gain, in units of the model's scale, that ends the growth.
BUDGETS = (1.0, 2.0, 4.0, 8.0)
ENOUGH_GAIN = 0.5
# Images that are driven far already give way to those that are not; in units of the model's scale.
MARGIN_CAP = 3.0


@dataclass(frozen=True, eq=False)
class Reach:
    """What the changes do to held-out images.

    Attributes:
        classes: those that were to be reached, J of them.
        budgets: bounds on the change's length, as multiples of the usual one, B of them.
        gain: float64 [B, J], how much the change lifts the class's margin, as a mean over images of
            other classes and in units of `scale`.
        rate: float64 [B, J], share of these images that are predicted as the class, of those that
            were not before.
        scale: the usual margin of the model on clean images that it gets right.
        change: float32 [J, ...], the changes of the last budget.
        seconds: of the search.
    """

    classes: tuple[int, ...]
    budgets: tuple[float, ...]
    gain: Tensor
    rate: Tensor
    scale: float
    change: Tensor = field(repr=False)
    seconds: float


class ImagesInTurn:
    """The images of all classes but one, of one alone, or of all, in a random order and over again."""

    def __init__(
        self, labels: Tensor, without: int | None, seed: int, *, only: int | None = None
    ) -> None:
        index = torch.arange(len(labels)) if without is None else (labels != without).nonzero()
        if only is not None:
            index = (labels == only).nonzero()
        generator = torch.Generator().manual_seed(seed)
        self.index = index.flatten()[torch.randperm(len(index), generator=generator)]
        self._next = 0

    def take(self, count: int) -> Tensor:
        """Indices of the next images, beginning again after the last."""
        positions = torch.arange(self._next, self._next + count) % len(self.index)
        self._next += count
        return self.index[positions]


class UniversalChanges:
    """Changes of the input under one bound on their lengths, and the ascent that moves them."""

    def __init__(self, box: InputBox, changes: Tensor, length: float) -> None:
        self.box = box
        self.change = changes
        self.length = length
        self.velocity = torch.zeros_like(changes)

    def apply(self, inputs: Tensor, images: int) -> Tensor:
        """Inputs [J * images, ...] with change j on the j-th group of images."""
        return self.box.clamp(inputs + self.change.repeat_interleave(images, 0))

    def ascend(self, gradient: Tensor) -> None:
        """A step along the gradients [J * images, ...], averaged over each group."""
        images = len(gradient) // len(self.change)
        mean = gradient.unflatten(0, (len(self.change), images)).float().mean(1)
        self.velocity = MOMENTUM * self.velocity + unit_gradient(mean)
        change = self.change + self.length / 6 * self.velocity
        norm = change.flatten(1).norm(dim=1).reshape((-1,) + (1,) * (change.dim() - 1))
        self.change = change * (self.length / norm.clamp_min(1e-20)).clamp(max=1)


class _Group:
    """Classes that share forward passes, with their changes and the images to make them on."""

    def __init__(
        self,
        classes: tuple[int, ...],
        fit: tuple[Tensor, Tensor],
        box: InputBox,
        images: int,
        seed: int,
        device: torch.device,
    ) -> None:
        self.classes = classes
        self.changes = UniversalChanges(
            box, torch.zeros(len(classes), *box.shape, device=device), 0
        )
        self._inputs = fit[0]
        self._turns = [ImagesInTurn(fit[1], k, seed) for k in classes]
        self._goal = torch.tensor(classes, device=device).repeat_interleave(images)
        self._images = images

    def ascend(self, model: DifferentiableModel, steps: int, cap: float) -> None:
        """So many steps for each change."""
        for _ in range(steps):
            index = torch.cat([turn.take(self._images) for turn in self._turns])
            at = self.changes.apply(model.place(self._inputs[index].float()), self._images)
            self.changes.ascend(model.margin_gradient(at, self._goal, cap)[1])


def lift(before: Tensor, after: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """How much the margin of class k grew on images of other classes, and what share became k.

    The share is one of those that were not taken for k before; none where there are none.
    """
    others = labels != k
    wanted = torch.full((int(others.sum()),), k)
    lift = class_margin(after[others], wanted) - class_margin(before[others], wanted)
    movable = after[others & (before.argmax(1) != k)]
    moved = (movable.argmax(1) == k).double().sum() / max(1, len(movable))
    return lift.mean(), moved


def logits_of(
    model: DifferentiableModel, box: InputBox, inputs: Tensor, change: Tensor, batch_size: int
) -> Tensor:
    """float32 [N, C] on the CPU, of inputs with one change."""
    with torch.no_grad():
        batches = [
            model.logits(box.clamp(model.place(batch.float()) + change)).cpu()
            for batch in inputs.split(batch_size)
        ]
    return torch.cat(batches)


def margin_scale(logits: Tensor, labels: Tensor) -> float:
    """The median margin of the images that the model gets right; 1 where there is none."""
    margin = class_margin(logits, labels)
    right = margin[margin > 0]
    return float(right.median()) if len(right) else 1.0


def reach(
    model: DifferentiableModel,
    box: InputBox,
    fit: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    classes: Sequence[int],
    *,
    budgets: Sequence[float] = BUDGETS,
    steps: int = 20,
    images: int = 16,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool | None = None,
) -> Reach:
    """Finds the change for every class and measures it on held-out images.

    Args:
        model: the classifier.
        box: the inputs that it may be given.
        fit: clean inputs [N, ...] and labels [N] to make the changes on.
        held_out: others to measure them on; both have images of 2 classes or more.
        classes: to reach.
        budgets: of the change's length, ascending, as multiples of the usual one; those after the
            first with a median gain of `ENOUGH_GAIN` are left out.
        steps: of normalised-gradient ascent with momentum, for the first budget; half as many go on
            from there for each of the others.
        images: in each step, for each class.
        batch_size: inputs in a pass; as many classes share it as fit in.
        seed: of the order of the images.
        progress: whether to show a progress bar; None shows it on a terminal.

    Raises:
        NoGradientError: the model has no gradients.
        InputError: the model rejects changed inputs, or gives NaN or infinity for them.
    """
    begin = time.perf_counter()
    usual = BUDGET * box.diagonal
    images = min(images, batch_size)
    at_once = batch_size // images
    groups = [
        _Group(tuple(classes[i : i + at_once]), fit, box, images, seed, model.device)
        for i in range(0, len(classes), at_once)
    ]
    gains: list[Tensor] = []
    rates: list[Tensor] = []
    with model.open():
        nothing = torch.zeros(1, *box.shape, device=model.device)
        before = logits_of(model, box, held_out[0], nothing, batch_size)
        model.check_gradient(fit[0][:images], fit[1][:images])
        scale = margin_scale(before, held_out[1])
        for budget in budgets:
            rounds = steps if not gains else -(-steps // 2)
            with progress_bar(f"reach {budget:g}x", len(classes) * rounds, progress) as advance:
                for group in groups:
                    group.changes.length = budget * usual
                    group.ascend(model, rounds, MARGIN_CAP * scale)
                    advance(len(group.classes) * rounds)
            found = [
                lift(before, logits_of(model, box, held_out[0], change, batch_size), held_out[1], k)
                for group in groups
                for k, change in zip(group.classes, group.changes.change, strict=True)
            ]
            gains.append(torch.stack([lift for lift, _ in found]) / scale)
            rates.append(torch.stack([rate for _, rate in found]))
            if float(gains[-1].median()) >= ENOUGH_GAIN:
                break
    return Reach(
        tuple(classes),
        tuple(budgets[: len(gains)]),
        torch.stack(gains),
        torch.stack(rates),
        scale,
        torch.cat([group.changes.change.cpu() for group in groups]),
        time.perf_counter() - begin,
    )
