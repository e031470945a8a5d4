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

from .differentiable import DifferentiableModel, InputBox, largest_one
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
        heaviest: whether the first place is among them, however far it got.
    """

    places: int
    classes: float
    steps: int
    images: int
    heaviest: bool = False


# Which place is best shows after a few steps on few images; where it does not yet, as in transformers, the
# place where reach's change weighs heaviest is the best guess, and goes on in any case. Which class a patch
# may conquer shows soon after: a backdoor is ahead from the second round on.
ROUNDS = (
    Round(HEAVY_PLACES + 4, 1.0, 4, 8),
    Round(2, 1.0, 4, 16, heaviest=True),
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
        rate: float64 [J], share of the images of other classes, and not taken for the class before,
            that are predicted as it; at least so many, as classes that fall behind are given up.
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


def corner_squares(size: Sequence[int], side: int) -> Tensor:
    """Of the squares in the four corners of the image, [1, 4, 2]."""
    last = torch.tensor([size[0] - side, size[1] - side])
    return torch.tensor([[[0, 0], [0, 1], [1, 0], [1, 1]]]) * last


class Patterns:
    """What is painted into some squares of the image, and the ascent that paints it.

    Attributes:
        corner: int64 [P, 2], row and column of the squares' first pixels.
        pattern: float32 [P, channels, side, side].
    """

    def __init__(self, corner: Tensor, pattern: Tensor, box: InputBox) -> None:
        self.corner, self.pattern = corner, pattern
        self.velocity = torch.zeros_like(pattern)
        self._low, self._high = (
            torch.stack([self.cut(j, whole) for j in range(len(corner))])
            for whole in (bound.to(pattern).expand(box.shape) for bound in (box.low, box.high))
        )

    @classmethod
    def of_mean(cls, corner: Tensor, side: int, inputs: Tensor, box: InputBox) -> Patterns:
        """The mean of the inputs [N, ...] in each square."""
        mean = inputs.float().mean(0)
        found = [mean[_square(at, side)] for at in corner]
        return cls(corner, torch.stack(found), box)

    def cut(self, j: int, image: Tensor) -> Tensor:
        """The j-th square of an image [channels, height, width]."""
        return image[_square(self.corner[j], self.pattern.shape[-1])]

    def paste(self, j: int, inputs: Tensor, pattern: Tensor | None = None) -> Tensor:
        """Inputs [N, ...] with the j-th pattern, or another in its place; changes the inputs."""
        square = _square(self.corner[j], self.pattern.shape[-1])
        pattern = self.pattern[j] if pattern is None else pattern
        inputs[(slice(None), *square)] = pattern.to(inputs)
        return inputs

    def ascend(self, part: slice, gradient: Tensor) -> None:
        """A step for some of them along gradients of their patterns' shape."""
        velocity = MOMENTUM * self.velocity[part] + largest_one(gradient)
        low, high = self._low[part], self._high[part]
        step = _STEP * (high - low) * velocity.clamp(-_FASTEST, _FASTEST)
        self.pattern[part] = (self.pattern[part] + step).maximum(low).minimum(high)
        self.velocity[part] = velocity

    def keep(self, rows: Tensor) -> None:
        """These alone, in this order."""
        self.corner = self.corner[rows]
        rows = rows.to(self.pattern.device)
        self.pattern, self.velocity = self.pattern[rows], self.velocity[rows]
        self._low, self._high = self._low[rows], self._high[rows]


def _square(corner: Tensor, side: int) -> tuple[slice, slice, slice]:
    y, x = corner.tolist()
    return slice(None), slice(y, y + side), slice(x, x + side)


class _Patches:
    """Some patches for every class, side by side, each with its images to be made on."""

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
        self.margin = torch.zeros(len(self.classes), dtype=torch.float64)  # before the last step
        self._left: dict[int, tuple[Tensor, Tensor]] = {}
        self._inputs = fit[0]
        self._turns = [ImagesInTurn(fit[1], k, seed) for k in self.classes]
        self._patterns = Patterns.of_mean(corner.flatten(0, 1), side, fit[0].to(device), box)

    def ascend(self, model: DifferentiableModel, cap: float, images: int, batch_size: int) -> None:
        """One step for each patch, with so many images; as many patches share a pass as fit in."""
        images = min(images, batch_size)
        at_once = batch_size // images
        for first in range(0, len(self.classes), at_once):
            rows = range(first, min(first + at_once, len(self.classes)))
            index = torch.cat([self._turns[j].take(images) for j in rows])
            at = model.place(self._inputs[index].float().clone())
            for group, j in zip(at.split(images), rows, strict=True):
                self._patterns.paste(j, group)
            goal = torch.tensor([self.classes[j] for j in rows], device=at.device)
            margin, gradient = model.margin_gradient(at, goal.repeat_interleave(images), cap)
            capped = margin.clamp(max=cap).unflatten(0, (len(rows), images))
            self.margin[first : first + len(rows)] = capped.mean(1).cpu()
            mean = gradient.float().unflatten(0, (len(rows), images)).mean(1)
            gradients = [self._patterns.cut(j, mean[i]) for i, j in enumerate(rows)]
            self._patterns.ascend(slice(rows.start, rows.stop), torch.stack(gradients))

    def keep_best(self, places: int, classes: int, *, first: bool = False) -> None:
        """So many classes, with so many patches for each: those that got furthest, and perhaps the first."""
        margin = self.margin.unflatten(0, (-1, self.places))
        ranked = margin.clone()
        if first:
            ranked[:, 0] = torch.inf
        order = ranked.argsort(dim=1, descending=True, stable=True)
        order += torch.arange(0, len(self.classes), self.places)[:, None]
        furthest = margin.amax(1).argsort(descending=True, stable=True)
        best = margin.argmax(1) + torch.arange(0, len(self.classes), self.places)
        for row in best[furthest[classes:]].tolist():
            pattern = self._patterns.pattern[row].float().cpu()
            self._left[self.classes[row]] = self._patterns.corner[row], pattern
        rows = order[furthest[:classes].sort().values, :places].flatten()
        self.places = places
        self.classes = [self.classes[j] for j in rows.tolist()]
        self._turns = [self._turns[j] for j in rows.tolist()]
        self.margin = self.margin[rows]
        self._patterns.keep(rows)

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
            corner_squares(box.shape[1:], pixels).expand(len(classes), -1, -1),
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
            patches.keep_best(turn.places, going_on, first=turn.heaviest)
            for _ in range(turn.steps):
                patches.ascend(model, cap, turn.images, batch_size)
                advance(len(patches.classes))
        best = patches.best()
        corner = torch.stack([best[k][0] for k in classes])
        pattern = torch.stack([best[k][1] for k in classes])
        painted = Patterns(corner, pattern, box)
        found: list[tuple[Tensor, Tensor]] = []
        for j, k in enumerate(classes):
            with torch.no_grad():
                after = [
                    model.logits(painted.paste(j, model.place(batch.float().clone()))).cpu()
                    for batch in inputs.split(batch_size)
                ]
            found.append(lift(before, torch.cat(after), labels, k))
    return PatchReach(
        classes,
        pixels,
        torch.stack([rate for _, rate in found]),
        torch.stack([gain for gain, _ in found]) / reached.scale,
        len(labels),
        corner,
        pattern,
        time.perf_counter() - begin,
    )
