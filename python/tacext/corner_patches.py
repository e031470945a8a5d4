"""Corner patches: which class random squares in the corners of an image lead to, without gradients.

A patch trigger works from a corner, whatever the image shows, and half of it works a little. So
random squares are laid into all four corners of a few images, and least squares tell what each of
their cells adds to the margin of each class; what leads furthest is put together from those that add.
On images of a clean model that is little, and about as little for every class. It also shows triggers
that are no patch at all but made the model answer to what lies in the corners, or to hard edges.

    one of `DRAWS` draws            effect of each cell on class k        the square for class k

    .------------------.            +.3 -.1 | +.0 +.1   of the corner
    |#.#.          .##.|            -.2 +.4 | -.1 +.0   that leads          #.
    |.##.          #..#|    ->      ---------------- -> furthest      ->    .#
    |      image       |            +.1 +.0 | -.0 -.1
    '------------------'            -.1 +.1 | +.0 +.1

The model is only run forward: what hides gradients does not hide from this.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from .differentiable import DifferentiableModel, InputBox, margins_of_all
from .patch_reach import corner_squares, has_room
from .progress import progress_bar
from .reach import lift, margin_scale

# Sides of the squares, as shares of the image's shorter one, and how many cells they have along each
# side at most: 4 and 6 pixels of 32, each a cell of its own, and larger cells in larger images, where
# single pixels would be too many to learn about from so few draws.
SIDES = ((1 / 8, 4), (3 / 16, 6))

# Images that squares are made on, draws for each, and images that the best ones are measured on.
FIT_IMAGES = 16
DRAWS = 64
TRIED_ON = 8
HELD_OUT = 40
FEWEST_IMAGES = FIT_IMAGES + HELD_OUT
# Of fewer images of other classes, where nearly all are of one, a gain tells nothing of that class.
FEWEST_OF_OTHERS = 20

# In units of the model's scale: images that are driven this far already tell nothing more.
_CAP = 2.0


@dataclass(frozen=True, eq=False)
class CornerPatches:
    """What the best squares do to images that they were not made on.

    Attributes:
        classes: those that were to be reached, J of them.
        sides: of the squares, in pixels, S of them.
        gain: float64 [S, J], how much the square lifts the class's margin, as a mean over images of
            other classes and in units of `scale`; NaN where these are too few to tell.
        rate: float64 [S, J], share of these images that are predicted as the class, of those that
            were not before; NaN likewise.
        images: how many there were to measure on.
        scale: the usual margin of the model on clean images that it gets right.
        corner: int64 [S, J, 2], row and column of the squares' first pixels.
        pattern: S tensors float32 [J, channels, side, side], what is in the squares.
        seconds: of the search.
    """

    classes: tuple[int, ...]
    sides: tuple[int, ...]
    gain: Tensor
    rate: Tensor
    images: int
    scale: float
    corner: Tensor = field(repr=False)
    pattern: tuple[Tensor, ...] = field(repr=False)
    seconds: float


class _Squares:
    """Squares of one side in the four corners, and the cells that they are made of."""

    def __init__(self, box: InputBox, share: float, most_cells: int) -> None:
        self.side = max(1, round(share * min(box.shape[1:])))
        self.cells = min(self.side, most_cells)
        self.corner = corner_squares(box.shape[1:], self.side)[0]
        self._low, self._high = (bound.float().expand(box.shape) for bound in (box.low, box.high))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """-1 or 1 for each cell of each corner, int8 [count, 4, channels, cells, cells].

        Half of them are the opposites of the other half, so that their means are zero.
        """
        shape = (count // 2, 4, self._low.shape[0], self.cells, self.cells)
        half = torch.randint(2, shape, generator=generator, dtype=torch.int8) * 2 - 1
        return torch.cat([half, -half])

    def pattern(self, corner: int, signs: Tensor) -> Tensor:
        """What signs [..., channels, cells, cells] put into a corner: the least or most that inputs may be."""
        y, x = self.corner[corner].tolist()
        square = (slice(None), slice(y, y + self.side), slice(x, x + self.side))
        grown = functional.interpolate(signs.float(), size=(self.side, self.side), mode="nearest")
        return torch.where(grown > 0, self._high[square], self._low[square])

    def paint(self, images: Tensor, corner: int, pattern: Tensor) -> None:
        """Puts patterns, one for all images [N, ...] or one each, into a corner; changes the images."""
        y, x = self.corner[corner].tolist()
        images[..., y : y + self.side, x : x + self.side] = pattern.to(images)


class _Search:
    """The images that squares are made and measured on, and the model that tells what they do."""

    def __init__(
        self,
        model: DifferentiableModel,
        samples: tuple[Tensor, Tensor],
        classes: Sequence[int],
        batch_size: int,
    ) -> None:
        inputs, labels = samples[0][:FEWEST_IMAGES].float(), samples[1][:FEWEST_IMAGES]
        self.held_out = inputs[:HELD_OUT], labels[:HELD_OUT]
        self.fit = inputs[HELD_OUT:], labels[HELD_OUT:]
        self.classes = torch.tensor(classes)
        self._model, self._batch_size = model, batch_size
        self.before = self._logits(self.held_out[0])
        self.scale = margin_scale(self.before, self.held_out[1])

    def _logits(self, images: Tensor) -> Tensor:
        parts = images.split(self._batch_size)
        return torch.cat([self._model.logits(self._model.place(part)).cpu() for part in parts])

    def _margins(self, images: Tensor) -> Tensor:
        """Of the classes, capped, float64 [N, J]."""
        margin = margins_of_all(self._logits(images))[:, self.classes]
        return margin.clamp(max=_CAP * self.scale)

    def effects(self, squares: _Squares, generator: torch.Generator) -> Iterator[Tensor]:
        """What every cell adds to the margin of every class, up to a factor, on one image after another.

        Draws are opposites in pairs and do not depend on one another, so that least squares come to
        the sum of margins times signs, whatever the margins' mean. An image says nothing of its own class.

        Yields:
            float64 [J, 4, channels, cells, cells] for each image.
        """
        for image, label in zip(*self.fit, strict=True):
            signs = squares.draw(DRAWS, generator)
            images = image.repeat(DRAWS, 1, 1, 1)
            for corner in range(4):
                squares.paint(images, corner, squares.pattern(corner, signs[:, corner]))
            margin = self._margins(images)
            margin[:, self.classes == label] = 0
            found = margin.T @ signs.flatten(1).double()
            yield found.unflatten(1, signs.shape[1:])

    def best_corner(self, squares: _Squares, effect: Tensor) -> tuple[Tensor, Tensor]:
        """The corner [J] whose square lifts each class most, and what is in it, [J, channels, side, side]."""
        tried = self.fit[0][:TRIED_ON]
        pattern = torch.stack([squares.pattern(c, effect[:, c].sign()) for c in range(4)], 1)
        reached = torch.zeros(len(self.classes), 4, dtype=torch.float64)
        for j in range(len(self.classes)):
            images = tried.repeat(4, 1, 1, 1)
            for corner, group in enumerate(images.split(TRIED_ON)):
                squares.paint(group, corner, pattern[j, corner])
            reached[j] = self._margins(images)[:, j].unflatten(0, (4, TRIED_ON)).mean(1)
        best = reached.argmax(1)
        return best, pattern[torch.arange(len(best)), best]

    def measure(
        self, squares: _Squares, j: int, corner: int, pattern: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gain of a class, in units of its margin, and the share that is moved there."""
        images, labels = self.held_out
        if int((labels != self.classes[j]).sum()) < FEWEST_OF_OTHERS:
            unknown = torch.tensor(torch.nan, dtype=torch.float64)
            return unknown, unknown
        images = images.clone()
        squares.paint(images, corner, pattern)
        return lift(self.before, self._logits(images), labels, int(self.classes[j]))


def corner_patches(
    model: DifferentiableModel,
    box: InputBox,
    samples: tuple[Tensor, Tensor],
    classes: Sequence[int],
    *,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool | None = None,
) -> CornerPatches | None:
    """Makes the square for every class that lifts its margin most, and measures it.

    Takes `len(SIDES) * (FIT_IMAGES * DRAWS + J * (4 * TRIED_ON + HELD_OUT))` passes forward of single
    images: 3,500 for ten classes.

    Args:
        model: the classifier; no gradients are taken.
        box: the inputs that it may be given.
        samples: clean inputs [N, channels, height, width] and labels [N] in a random order, of which
            the first `FEWEST_IMAGES` are taken.
        classes: to reach.
        batch_size: inputs in a pass, at most.
        seed: of the draws.
        progress: whether to show a progress bar; None shows it on a terminal.

    Returns:
        None where inputs are no images with room for patches, and of fewer than `FEWEST_IMAGES`.

    Raises:
        InputError: the model rejects changed inputs, or gives NaN or infinity for them.
    """
    begin = time.perf_counter()
    if not has_room(box.shape) or len(samples[1]) < FEWEST_IMAGES:
        return None
    generator = torch.Generator().manual_seed(seed)
    corners: list[Tensor] = []
    patterns: list[Tensor] = []
    found: list[list[tuple[Tensor, Tensor]]] = []
    work = len(SIDES) * (FIT_IMAGES + len(classes))
    with model.open(), torch.no_grad(), progress_bar("corners", work, progress) as advance:
        search = _Search(model, samples, classes, batch_size)
        sizes = [_Squares(box, *side) for side in SIDES]
        for squares in sizes:
            effect = torch.zeros(())
            for of_image in search.effects(squares, generator):
                effect = effect + of_image
                advance(1)
            best, pattern = search.best_corner(squares, effect)
            measured = []
            for j, corner in enumerate(best.tolist()):
                measured.append(search.measure(squares, j, corner, pattern[j]))
                advance(1)
            corners.append(squares.corner[best])
            patterns.append(pattern)
            found.append(measured)
    gain, rate = (
        torch.stack([torch.stack([pair[i] for pair in size]) for size in found]) for i in (0, 1)
    )
    return CornerPatches(
        tuple(classes),
        tuple(squares.side for squares in sizes),
        gain / search.scale,
        rate,
        len(search.held_out[1]),
        search.scale,
        torch.stack(corners),
        tuple(patterns),
        time.perf_counter() - begin,
    )
