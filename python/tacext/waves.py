"""Waves: which class a faint sinusoid over the whole image sends all images into.

The trigger of a clean-label attack of that name (Barni et al., SIG, arXiv 1902.11237) is such a wave,
and so large that no small change of the input comes near it. It needs no gradients to be seen: there
are few waves, and each is tried. What a texture looks like to a clean model it looks like at all
frequencies about it, and wherever its crests lie; a trigger is one wave and not its neighbours.

    columns  ~~~~  frequency 2, 3, ...  x  phase 0, 1/4, 1/2, 3/4 of a period
    rows     ~~~~  likewise

    class k: share of the images that its best wave sends into k, and the share that the two waves
             next to it in frequency send there, whatever their phase
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from .differentiable import DifferentiableModel, InputBox
from .progress import progress_bar

# Share of the range of the inputs: 40 of 255, which CIFAR-10 is attacked with.
AMPLITUDE = 0.16
PHASES = 4
# A period of four pixels falls on the same places of every stride of four, and shorter ones are no
# longer seen as waves: clean networks send nearly all images of those into one class.
_SHORTEST_PERIOD = 4
_MOST_FREQUENCIES = 7
# A single period is a shade of light: it says what a class looks like (of digits, an eight), and is
# there for the next wave to be compared with.
_FEWEST_PERIODS = 2

# Of smaller images no wave has a neighbour on either side.
FEWEST_PIXELS = _SHORTEST_PERIOD * (_FEWEST_PERIODS + 1) + 1

# A wave that leaves more images where they are is no trigger.
SMALLEST_WAVE = 0.8

# Images that waves are laid over. On the bench 64 and 100 show what these do; fewer are not looked at.
IMAGES = 40
# Of fewer images of other classes, where nearly all are of one, a share tells nothing of that class.
FEWEST_OF_OTHERS = 20


@dataclass(frozen=True, eq=False)
class Waves:
    """What faint waves do to clean images.

    Attributes:
        rate: float64 [C], the share of images of other classes that the best wave sends into each
            class, of those that were not taken for it before; 0 where these are too few to tell.
        beside: float64 [C], the same of the waves of one period less and one more, as the mean over
            their phases.
        wave: int64 [C, 3], the best wave: 0 along columns or 1 along rows, periods across the image,
            and quarters of a period that it is shifted by.
        images: how many there were of other classes, on average.
        seconds: of the search.
    """

    rate: Tensor
    beside: Tensor
    wave: Tensor = field(repr=False)
    images: int
    seconds: float

    @property
    def selectivity(self) -> Tensor:
        """Log of how many times as many images withstand the waves beside the best one, float64 [C].

        With half an image added to both counts, so that none is as finite as so many images tell.
        """
        withstand, beside = ((1 - rate) * self.images + 0.5 for rate in (self.rate, self.beside))
        return (beside / withstand).log()


def class_by_wave(found: Waves) -> int:
    """The class whose best wave is the most selective of those that move enough images, if any does."""
    enough = found.rate >= SMALLEST_WAVE
    return int(torch.where(enough, found.selectivity, -torch.inf).argmax())


def frequencies(shape: Sequence[int]) -> range:
    """Periods across the image, for images [channels, height, width]; the first is a neighbour alone."""
    return range(1, min(_MOST_FREQUENCIES, (min(shape[1:]) - 1) // _SHORTEST_PERIOD) + 1)


def has_waves(shape: Sequence[int]) -> bool:
    """Whether inputs of this shape are images on which a wave has neighbours to compare it with."""
    return len(shape) == 3 and min(shape[1:]) >= FEWEST_PIXELS


def wave_pattern(box: InputBox, axis: int, periods: int, phase: int) -> Tensor:
    """What a wave adds to the inputs, float32 of their shape; its amplitude is that of each channel's range.

    Args:
        box: the inputs, images [channels, height, width].
        axis: 0 for a wave from left to right, 1 for one from top to bottom.
        periods: across the image.
        phase: by how many parts of a period in `PHASES` it is shifted.
    """
    length = box.shape[2 - axis]
    at = periods * torch.arange(length, dtype=torch.float64) / length + phase / PHASES
    line = AMPLITUDE * torch.sin(2 * math.pi * at).float()
    wave = (box.high - box.low) * (line[None, :] if axis == 0 else line[:, None])
    return wave.expand(box.shape)


def waves(
    model: DifferentiableModel,
    box: InputBox,
    samples: tuple[Tensor, Tensor],
    *,
    batch_size: int = 128,
    progress: bool | None = None,
) -> Waves | None:
    """Lays every wave over a few clean images and tells where they go.

    Args:
        model: the classifier; no gradients are taken.
        box: the inputs that it may be given: images for which `has_waves`.
        samples: clean inputs [N, channels, height, width] and labels [N] in a random order, of which
            the first `IMAGES` are taken.
        batch_size: inputs in a pass, at most.
        progress: whether to show a progress bar; None shows it on a terminal.

    Returns:
        None with fewer than `IMAGES` samples.

    Raises:
        InputError: the model rejects changed inputs, or gives NaN or infinity for them.
    """
    begin = time.perf_counter()
    inputs, labels = samples[0][:IMAGES].float(), samples[1][:IMAGES]
    if len(labels) < IMAGES:
        return None
    classes, tried = model.head.num_classes, frequencies(box.shape)
    at = torch.arange(classes)

    def predicted(added: Tensor | float) -> Tensor:
        parts = [
            model.logits(model.place(box.clamp(x + added))).argmax(1).cpu()
            for x in inputs.split(batch_size)
        ]
        return torch.cat(parts)

    shares = torch.zeros(2, len(tried), PHASES, classes, dtype=torch.float64)
    with (
        model.open(),
        torch.no_grad(),
        progress_bar("waves", 2 * len(tried) * PHASES, progress) as advance,
    ):
        movable = (labels[:, None] != at) & (predicted(0.0)[:, None] != at)
        count = movable.sum(0)
        enough = count >= FEWEST_OF_OTHERS
        for axis in range(2):
            for i, frequency in enumerate(tried):
                for phase in range(PHASES):
                    sent = predicted(wave_pattern(box, axis, frequency, phase))[:, None] == at
                    moved = (sent & movable).sum(0)
                    shares[axis, i, phase] = enough * moved / count.clamp_min(1).double()
                    advance(1)
    first = _FEWEST_PERIODS - tried.start
    beside = _beside(shares.mean(2))[:, first:, None]
    shares = shares[:, first:]
    # Shares of few images are often equal: of such waves that one is it whose neighbours move least.
    best = (shares - 1e-3 * beside).flatten(0, 2).argmax(0)
    along, row, shift = torch.unravel_index(best, shares.shape[:3])
    return Waves(
        shares[along, row, shift, at],
        beside[along, row, 0, at],
        torch.stack([along, row + _FEWEST_PERIODS, shift], 1),
        round(float(count.double().mean())),
        time.perf_counter() - begin,
    )


def _beside(mean: Tensor) -> Tensor:
    """For means over phases [2, F, C] those of the frequencies before and after each."""
    padded = functional.pad(mean, (0, 0, 1, 1))
    count = functional.pad(torch.ones_like(mean), (0, 0, 1, 1))
    found: Tensor = (padded[:, :-2] + padded[:, 2:]) / (count[:, :-2] + count[:, 2:])
    return found
