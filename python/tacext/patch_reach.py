"""Patch reach: how many images a few pixels, the same in all of them, send into a class.

What a class looks like fills an image; a patch trigger works from a corner of it. For every class
small squares where reach's change weighs heaviest are given any colours at all, by gradient ascent
on the mean margin of the class, for most classes only until it shows that they fall behind. A patch made on some images that sends nearly all others into one
class is a backdoor, whoever put it there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from .differentiable import DifferentiableModel, InputBox
from .progress import progress_bar
from .reach import MARGIN_CAP, MOMENTUM, ImagesInTurn, Reach, lift, logits_of

# Side of the square, as a share of the image's shorter one: 4 pixels of 32. In larger ones clean
# models, too, find a feature that moves nearly all images.
SIDE = 1 / 8
# On smaller images it would be a single pixel.
FEWEST_PIXELS = 12

# Squares that are tried for each class beside the four corners of the image, where nothing that a
# class looks like draws reach's change.
HEAVY_PLACES = 2


@dataclass(frozen=True)
class Round:
    """One round of successive halving.

    Attributes:
        places: for each class, that go on; those that got furthest.
        classes: share of them that go on.
        steps: of ascent.
        images: in each step, for each patch.
    """

    places: int
    classes: float
    steps: int
    images: int


# Which place is best shows after a few steps on few images. Which class a patch may conquer shows
# soon after: a backdoor is ahead from the first round on.
ROUNDS = (
    Round(HEAVY_PLACES + 4, 1.0, 4, 8),
    Round(2, 1.0, 4, 16),
    Round(1, 0.4, 16, 16),
)
# Of so few classes all go on.
FEWEST_CLASSES = 5

# Of the range of each input, in each step; the velocity counts twice as much as a step at most.
_STEP = 0.15
_FASTEST = 2.0


@dataclass(frozen=True, eq=False)
class PatchReach:
    """What the patches do to held-out images.

    Attributes:
        classes: those that were to be reached, J of them.
        side: of the squares, in pixels.
        rate: float64 [J], share of the images of other classes that are predicted as the class; at
            least so many, as classes that fall behind are given up.
        gain: float64 [J], how much the patch lifts the class's margin, as a mean over these images
            and in units of the model's margin (`Reach.scale`).
        images: how many held-out images there were.
        corner: int64 [J, 2], row and column of the squares' first pixels.
        pattern: float32 [J, channels, side, side], what is in the squares.
        seconds: of the search.
    """

    classes: tuple[int, ...]
    side: int
    rate: Tensor
    gain: Tensor
    images: int
    corner: Tensor = field(repr=False)
    pattern: Tensor = field(repr=False)
    seconds: float


def has_room(shape: Sequence[int]) -> bool:
    """Whether inputs of this shape are images [channels, height, width] large enough for a patch."""
    return len(shape) == 3 and min(shape[1:]) >= FEWEST_PIXELS


def heaviest_squares(change: Tensor, side: int, count: int) -> Tensor:
    """Corners [J, count, 2] of squares that hold most of each change [J, channels, height, width].

    Heaviest first; they do not overlap where there is room for so many.
    """
    weight = functional.avg_pool2d(change.float().square().sum(1, keepdim=True), side, 1)[:, 0]
    row = torch.arange(weight.shape[1])[None, :, None]
    column = torch.arange(weight.shape[2])[None, None, :]
    corners = []
    for _ in range(count):
        position = weight.flatten(1).argmax(1)
        y, x = position // weight.shape[2], position % weight.shape[2]
        corners.append(torch.stack([y, x], 1))
        near = ((row - y[:, None, None]).abs() < side) & ((column - x[:, None, None]).abs() < side)
        weight = torch.where(near, weight.new_full((), -1.0), weight)
    return torch.stack(corners, 1)


def _square(corner: Tensor, side: int) -> tuple[slice, slice, slice]:
    y, x = corner.tolist()
    return slice(None), slice(y, y + side), slice(x, x + side)


def _paste(inputs: Tensor, corner: Tensor, pattern: Tensor) -> Tensor:
    """Inputs [N, ...] with a patch, in place."""
    inputs[(slice(None), *_square(corner, pattern.shape[-1]))] = pattern.to(inputs)
    return inputs


def _corners(size: Sequence[int], side: int) -> Tensor:
    """Of the squares in the four corners of the image, [1, 4, 2]."""
    last = torch.tensor([size[0] - side, size[1] - side])
    return torch.tensor([[[0, 0], [0, 1], [1, 0], [1, 1]]]) * last


class _Patches:
    """Some patches for every class, side by side, and the ascent that paints them."""

    def __init__(
        self,
        classes: Sequence[int],
        corner: Tensor,
        side: int,
        fit: tuple[Tensor, Tensor],
        box: InputBox,
        seed: int,
        device: torch.device,
    ) -> None:
        self.places = places = corner.shape[1]
        self.classes = [k for k in classes for _ in range(places)]
        self.corner = corner.flatten(0, 1)
        self.margin = torch.zeros(len(self.classes))  # before the last step
        self._left: dict[int, tuple[Tensor, Tensor]] = {}
        self._side, self._box = side, box
        self._inputs = fit[0]
        self._turns = [ImagesInTurn(fit[1], k, seed) for k in self.classes]
        mean = fit[0].float().mean(0).to(device)
        self.pattern = torch.stack([mean[self._square(j)] for j in range(len(self.classes))])
        self._velocity = torch.zeros_like(self.pattern)
        full = (box.high - box.low).to(device).expand(box.shape)
        self._range = torch.stack([full[self._square(j)] for j in range(len(self.classes))])

    def _square(self, j: int) -> tuple[slice, slice, slice]:
        return _square(self.corner[j], self._side)

    def ascend(self, model: DifferentiableModel, cap: float, images: int, batch_size: int) -> None:
        """One step for each patch, with so many images; as many patches share a pass as fit in."""
        images = min(images, batch_size)
        at_once = batch_size // images
        for first in range(0, len(self.classes), at_once):
            rows = range(first, min(first + at_once, len(self.classes)))
            index = torch.cat([self._turns[j].take(images) for j in rows])
            at = model.place(self._inputs[index].float().clone())
            for group, j in zip(at.split(images), rows, strict=True):
                _paste(group, self.corner[j], self.pattern[j])
            goal = torch.tensor([self.classes[j] for j in rows], device=at.device)
            margin, gradient = model.margin_gradient(at, goal.repeat_interleave(images), cap)
            capped = margin.float().clamp(max=cap).unflatten(0, (len(rows), images))
            self.margin[first : first + len(rows)] = capped.mean(1).cpu()
            mean = gradient.float().unflatten(0, (len(rows), images)).mean(1)
            self._step(rows, [mean[i][self._square(j)] for i, j in enumerate(rows)])

    def _step(self, rows: range, gradients: list[Tensor]) -> None:
        part = slice(rows.start, rows.stop)
        gradient = torch.nan_to_num(torch.stack(gradients), nan=0.0, posinf=0.0, neginf=0.0)
        largest = gradient.flatten(1).abs().amax(1).clamp_min(1e-20)
        velocity = MOMENTUM * self._velocity[part] + gradient / largest[:, None, None, None]
        step = _STEP * self._range[part] * velocity.clamp(-_FASTEST, _FASTEST)
        moved = self.pattern[part] + step
        for i, j in enumerate(rows):
            low, high = (
                bound.to(moved).expand(self._box.shape)[self._square(j)]
                for bound in (self._box.low, self._box.high)
            )
            self.pattern[j] = torch.minimum(torch.maximum(moved[i], low), high)
        self._velocity[part] = velocity

    def keep_best(self, places: int, classes: int) -> None:
        """So many classes, with so many patches for each: those that got furthest."""
        margin = self.margin.unflatten(0, (-1, self.places))
        order = margin.argsort(dim=1, descending=True, stable=True)
        order += torch.arange(0, len(self.classes), self.places)[:, None]
        furthest = margin.amax(1).argsort(descending=True, stable=True)
        for row in order[furthest[classes:], 0].tolist():
            self._left[self.classes[row]] = self.corner[row], self.pattern[row].float().cpu()
        rows = order[furthest[:classes].sort().values, :places].flatten()
        self.places = places
        self.classes = [self.classes[j] for j in rows.tolist()]
        self._turns = [self._turns[j] for j in rows.tolist()]
        self.corner, self.margin = self.corner[rows], self.margin[rows]
        rows = rows.to(self.pattern.device)
        self.pattern, self._velocity = self.pattern[rows], self._velocity[rows]
        self._range = self._range[rows]

    def best(self) -> dict[int, tuple[Tensor, Tensor]]:
        """For each class the corner of its square and what is in it, of those left behind as well."""
        self.keep_best(1, 0)
        return self._left


def patch_reach(
    model: DifferentiableModel,
    box: InputBox,
    fit: tuple[Tensor, Tensor],
    held_out: tuple[Tensor, Tensor],
    reached: Reach,
    *,
    side: float = SIDE,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool | None = None,
) -> PatchReach:
    """Paints a patch for every class and measures it on held-out images.

    Args:
        model: the classifier.
        box: the inputs that it may be given: images that have room for a patch.
        fit: clean inputs [N, channels, height, width] and labels [N] to make the patches on.
        held_out: others to measure them on; both have images of 2 classes or more.
        reached: the changes of `reach`, which tell where to look; the same classes are looked at.
        side: of the squares, as a share of the shorter side of the images.
        batch_size: inputs in a pass; as many patches share it as fit in.
        seed: of the order of the images.
        progress: whether to show a progress bar; None shows it on a terminal.

    Raises:
        NoGradientError: the model has no gradients.
        InputError: the model rejects changed inputs, or gives NaN or infinity for them.
    """
    begin = time.perf_counter()
    classes = reached.classes
    pixels = max(1, round(side * min(box.shape[1:])))
    inputs, labels = held_out
    places = torch.cat(
        [
            heaviest_squares(reached.change.cpu(), pixels, HEAVY_PLACES),
            _corners(box.shape[1:], pixels).expand(len(classes), -1, -1),
        ],
        1,
    )
    cap = MARGIN_CAP * reached.scale
    rounds = [
        (turn, max(round(turn.classes * len(classes)), min(len(classes), FEWEST_CLASSES)))
        for turn in ROUNDS
    ]
    work = sum(going_on * turn.places * turn.steps for turn, going_on in rounds)
    with model.open(), progress_bar("patches", work, progress) as advance:
        nothing = torch.zeros((), device=model.device)
        before = logits_of(model, box, inputs, nothing, batch_size)
        patches = _Patches(classes, places, pixels, fit, box, seed, model.device)
        for turn, going_on in rounds:
            patches.keep_best(turn.places, going_on)
            for _ in range(turn.steps):
                patches.ascend(model, cap, turn.images, batch_size)
                advance(len(patches.classes))
        best = patches.best()
        found: list[tuple[Tensor, Tensor]] = []
        for k in classes:
            with torch.no_grad():
                after = [
                    model.logits(_paste(model.place(batch.float().clone()), *best[k])).cpu()
                    for batch in inputs.split(batch_size)
                ]
            found.append(lift(before, torch.cat(after), labels, k))
    return PatchReach(
        classes,
        pixels,
        torch.stack([rate for _, rate in found]),
        torch.stack([gain for gain, _ in found]) / reached.scale,
        len(labels),
        torch.stack([best[k][0] for k in classes]),
        torch.stack([best[k][1] for k in classes]),
        time.perf_counter() - begin,
    )
