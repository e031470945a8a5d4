"""Source patch: one small patch that sends the images of one class elsewhere, and no others.

That is what a source-specific backdoor does, and nothing that is made for all images shows it. Trying
every pair of classes would take C^2 searches. But where a class is led away from its own answer by a
patch in a corner, while others have to stay, its images go by themselves where the trigger sends
them: C searches find the pairs, and only the few that got furthest are driven on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .differentiable import DifferentiableModel, InputBox, class_margin
from .patch_reach import SIDE, Patterns, corner_squares
from .progress import progress_bar
from .reach import MARGIN_CAP, ImagesInTurn, margin_scale

# Of a class with fewer images that the model gets right too few are left to measure on.
FEWEST_OF_A_CLASS = 8

# Steps away from the own class for every class and corner, with so many of its images and of others.
_AWAY_STEPS, _AWAY_OWN, _AWAY_OTHERS = 6, 3, 3


@dataclass(frozen=True)
class _Round:
    """So many pairs, those that got furthest, go on for so many steps towards the target."""

    pairs: int
    steps: int
    own: int
    others: int


_ROUNDS = (_Round(6, 6, 8, 8), _Round(2, 12, 8, 12))

# Images of other classes are to keep this margin, in units of the model's usual one.
_KEPT_MARGIN = 0.5
# How sharply an image counts as arrived, in the same unit.
_SOFTNESS = 0.25
# Images that tell how far a patch got, of its class; and of the others, to measure what it leaves alone.
_TOLD_BY = 12
_OTHERS_MEASURED = 200


@dataclass(frozen=True, eq=False)
class SourcePatch:
    """The patch that sends the images of one class into another best.

    All shares are of images that the model got right and that the patch was not made on.

    Attributes:
        source, target: the classes.
        share: of the images of the source, how many it sends into the target.
        images: how many these were.
        kept: share of the images of other classes than both that are taken for what they were before.
        others: how many these were.
        side: of the square, in pixels.
        corner: row and column of its first pixel.
        pattern: float32 [channels, side, side], what is in it.
        seconds: of the search.
        looked_at: the classes with images enough to look for patches that lead them astray.
    """

    source: int
    target: int
    share: float
    images: int
    kept: float
    others: int
    side: int
    corner: tuple[int, int]
    pattern: Tensor = field(repr=False)
    seconds: float
    looked_at: tuple[int, ...] = field(repr=False)

    @property
    def log_odds_ratio(self) -> float:
        """Logarithm of how much likelier it moves an image of the source to the target than others anywhere.

        With half an image added to each of the four counts (Haldane, 1956), so that none and all are
        as finite as so many images tell.
        """
        moved, disturbed = self.share * self.images, (1 - self.kept) * self.others
        odds = (moved + 0.5) / (self.images - moved + 0.5)
        return math.log(odds * (self.others - disturbed + 0.5) / (disturbed + 0.5))


class _Images:
    """Images that the model gets right, half of every class to make patches on, half to measure."""

    def __init__(
        self, model: DifferentiableModel, samples: tuple[Tensor, Tensor], batch_size: int
    ) -> None:
        inputs, labels = samples
        with torch.no_grad():
            parts = [model.logits(model.place(x.float())).cpu() for x in inputs.split(batch_size)]
        logits = torch.cat(parts)
        self.scale = margin_scale(logits, labels)
        right = logits.argmax(1) == labels
        make = torch.zeros_like(right)
        for k in labels.unique().tolist():
            own = (right & (labels == k)).nonzero().flatten()
            make[own[: -(-len(own) // 2)]] = True
        self.make = inputs[make], labels[make]
        self.measure = inputs[right & ~make], labels[right & ~make]
        count = torch.bincount(labels[right], minlength=model.head.num_classes)
        self.sources = tuple((count >= FEWEST_OF_A_CLASS).nonzero().flatten().tolist())


class _Pairs:
    """Patches side by side, each of a source class, and later with a target."""

    def __init__(
        self,
        sources: Sequence[int],
        corner: Tensor,
        side: int,
        images: _Images,
        box: InputBox,
        seed: int,
        device: torch.device,
    ) -> None:
        self.sources = list(sources)
        self.targets: list[int] | None = None
        self.patterns = Patterns.of_mean(corner, side, images.make[0].to(device), box)
        self._images = images
        labels = images.make[1]
        self._own = [ImagesInTurn(labels, None, seed, only=k) for k in sources]
        self._others = [ImagesInTurn(labels, k, seed) for k in sources]

    def ascend(self, model: DifferentiableModel, own: int, others: int, batch_size: int) -> None:
        """One step for each patch, away from the source or towards the target."""
        inputs, labels = self._images.make
        if own + others > batch_size:
            own = max(1, batch_size * own // (own + others))
            others = max(1, batch_size - own)
        size = own + others
        at_once = max(1, batch_size // size)
        for first in range(0, len(self.sources), at_once):
            rows = range(first, min(first + at_once, len(self.sources)))
            index = torch.cat(
                [
                    part
                    for j in rows
                    for part in (self._own[j].take(own), self._others[j].take(others))
                ]
            )
            at = model.place(inputs[index].float().clone())
            for group, j in zip(at.split(size), rows, strict=True):
                self.patterns.paste(j, group)
            goal = labels[index].to(model.device).unflatten(0, (len(rows), size))
            if self.targets is not None:
                goal[:, :own] = torch.tensor([self.targets[j] for j in rows])[:, None]
            gradient = self._gradient(model, at, goal, own)
            gradients = [self.patterns.cut(i, g) for i, g in zip(rows, gradient, strict=True)]
            self.patterns.ascend(slice(rows.start, rows.stop), torch.stack(gradients))

    def _gradient(self, model: DifferentiableModel, at: Tensor, goal: Tensor, own: int) -> Tensor:
        """Of the mean over own images and that over others, for each patch, [P, ...]."""
        away = self.targets is None
        weight = torch.ones(goal.shape, device=at.device) / (goal.shape[1] - own)
        weight[:, :own] = 1 / own
        is_own = torch.zeros(goal.shape, dtype=torch.bool, device=at.device)
        is_own[:, :own] = True
        scale = self._images.scale

        def value(logits: Tensor) -> tuple[Tensor, Tensor]:
            logits = logits.double()  # whose sum is finite where they are
            margin = class_margin(logits, goal.flatten())
            led = margin.clamp(max=MARGIN_CAP * scale)
            if away:  # above its own logit lies the mean of the others: whichever is nearest
                mine = logits.gather(1, goal.reshape(-1, 1))[:, 0]
                led = (logits.sum(1) - mine) / (logits.shape[1] - 1) - mine
            kept = margin.clamp(max=_KEPT_MARGIN * scale)
            return margin, torch.where(is_own.flatten(), led, kept) * weight.flatten()

        gradient = model.value_gradient(at, value)[1].float()
        mean: Tensor = gradient.unflatten(0, goal.shape).sum(1)
        return mean

    def logits(
        self, model: DifferentiableModel, row: int, inputs: Tensor, batch_size: int
    ) -> Tensor:
        """Of images [N, ...] with a patch on them, float32 [N, C] on the CPU."""
        found = [torch.zeros(0, model.head.num_classes)]
        with torch.no_grad():
            for batch in inputs.split(batch_size):
                at = self.patterns.paste(row, model.place(batch.float().clone()))
                found.append(model.logits(at).cpu())
        return torch.cat(found)

    def arrived(self, logits: Tensor) -> Tensor:
        """For every class the share of such images that are there, softly counted, [C]."""
        classes = range(logits.shape[1])
        wanted = (torch.full((len(logits),), k) for k in classes)
        margin = torch.stack([class_margin(logits, k) for k in wanted], 1)
        softness = _SOFTNESS * self._images.scale
        share: Tensor = (margin / softness).sigmoid().mean(0)
        return share

    def _told_by(self, source: int) -> Tensor:
        """Images of a class that tell how far a patch got while it is made."""
        inputs, labels = self._images.make
        return inputs[labels == source][:_TOLD_BY]

    def keep_best(self, model: DifferentiableModel, count: int, batch_size: int) -> None:
        """So many patches, each of another source, those whose images got furthest into one class.

        That class is their target from there on.
        """
        shares = []
        for row, source in enumerate(self.sources):
            share = self.arrived(self.logits(model, row, self._told_by(source), batch_size))
            share[source] = -1.0
            shares.append(share)
        if self.targets is None:
            self.targets = [int(share.argmax()) for share in shares]
        got = torch.stack([share[t] for share, t in zip(shares, self.targets, strict=True)])
        chosen: list[int] = []
        for row in got.argsort(descending=True, stable=True).tolist():
            if self.sources[row] not in [self.sources[j] for j in chosen] and len(chosen) < count:
                chosen.append(row)
        self.sources = [self.sources[j] for j in chosen]
        self.targets = [self.targets[j] for j in chosen]
        self._own = [self._own[j] for j in chosen]
        self._others = [self._others[j] for j in chosen]
        self.patterns.keep(torch.tensor(chosen))
        self.patterns.velocity.zero_()

    def measured(
        self, model: DifferentiableModel, row: int, batch_size: int
    ) -> tuple[Tensor, Tensor]:
        """Of images that a patch was not made on, which are sent to the target and which are kept."""
        assert self.targets is not None
        source, target = self.sources[row], self.targets[row]
        inputs, labels = self._images.measure
        own = self.logits(model, row, inputs[labels == source], batch_size)
        others = ((labels != source) & (labels != target)).nonzero().flatten()
        others = others[:: max(1, -(-len(others) // _OTHERS_MEASURED))]
        after = self.logits(model, row, inputs[others], batch_size)
        return own.argmax(1) == target, after.argmax(1) == labels[others]


def source_patch(
    model: DifferentiableModel,
    box: InputBox,
    samples: tuple[Tensor, Tensor],
    *,
    side: float = SIDE,
    batch_size: int = 128,
    seed: int = 0,
    progress: bool | None = None,
) -> SourcePatch | None:
    """Looks for a patch that sends one class into another and leaves all others where they are.

    Args:
        model: the classifier.
        box: the inputs that it may be given: images that have room for a patch.
        samples: clean inputs [N, channels, height, width] and labels [N], of every class in a random
            order.
        side: of the square, as a share of the shorter side of the images.
        batch_size: inputs in a pass; as many patches share it as fit in.
        seed: of the order of the images.
        progress: whether to show a progress bar; None shows it on a terminal.

    Returns:
        None where fewer than two classes have images enough that the model gets right.

    Raises:
        NoGradientError: the model has no gradients.
        InputError: the model rejects changed inputs, or gives NaN or infinity for them.
    """
    begin = time.perf_counter()
    pixels = max(1, round(side * min(box.shape[1:])))
    corners = corner_squares(box.shape[1:], pixels)[0]
    with model.open():
        images = _Images(model, samples, batch_size)
        if len(images.sources) < 2:
            return None
        sources = [k for k in images.sources for _ in corners]
        places = corners.repeat(len(images.sources), 1)
        pairs = _Pairs(sources, places, pixels, images, box, seed, model.device)
        pairs_of = [min(turn.pairs, len(images.sources)) for turn in _ROUNDS]
        work = _AWAY_STEPS * len(sources)
        work += sum(turn.steps * count for turn, count in zip(_ROUNDS, pairs_of, strict=True))
        with progress_bar("source patches", work, progress) as advance:
            for _ in range(_AWAY_STEPS):
                pairs.ascend(model, _AWAY_OWN, _AWAY_OTHERS, batch_size)
                advance(len(sources))
            for turn in _ROUNDS:
                pairs.keep_best(model, turn.pairs, batch_size)
                for _ in range(turn.steps):
                    pairs.ascend(model, turn.own, turn.others, batch_size)
                    advance(len(pairs.sources))
        pairs.keep_best(model, 1, batch_size)
        sent, kept = pairs.measured(model, 0, batch_size)
    assert pairs.targets is not None
    row, column = pairs.patterns.corner[0].tolist()
    return SourcePatch(
        pairs.sources[0],
        pairs.targets[0],
        float(sent.double().mean()),
        len(sent),
        float(kept.double().mean()) if len(kept) else 1.0,
        len(kept),
        pixels,
        (row, column),
        pairs.patterns.pattern[0].float().cpu(),
        time.perf_counter() - begin,
        images.sources,
    )
