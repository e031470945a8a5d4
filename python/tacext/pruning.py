"""Pruning that takes a backdoor out channel by channel: TAC-weighted, and weighed against the damage.

What an `InputAdversary` puts on images pushes the suspect's margin up through some channels:
activation times gradient is the reconstructed trigger-activated change, taken apart channel by
channel. The same product on clean images is what a channel is worth. In rounds the channels that take
most from the suspect for the least loss are made constant, and the adversary follows. First-order
shares err, so more is pruned than accuracy allows, and what was worth most in truth is brought back.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from .attacked_samples import AttackedSamples
from .channels import ChannelLayer, Masked, channel_means, mask, maskable_layers
from .errors import InputError
from .heads import Head
from .input_adversary import FEWEST_LED, InputAdversary
from .progress import progress_bar
from .repair_settings import RepairSettings, check_settings, is_number, is_whole

logger = logging.getLogger(__name__)

# Many channels saturate together, so that a first-order share promises too much: half of it counts.
_TRUSTED = 0.5
# What pruning aims to lose: a share of what is allowed, as few images measure it and others will judge,
# and no more than so much. The second aim is for a backdoor that the first leaves there.
_AIMS = ((0.5, 0.01), (0.8, 0.02))
# Of what changes and patches moved so much may be left; where the second aim leaves more, pruning has
# missed, and all is taken back.
_MOST_LEFT = 0.25
# Times as much may be lost before channels are brought back.
_OVERDRAFT = 4.0
_ROUNDING = 1e-9
# While channels are brought back, the attacks count more: what they measure now is exact.
_RESTORING = 2.0
# Changes and patches that move so few images have nothing more to tell.
_GONE = 0.02


@dataclass(frozen=True, kw_only=True)
class PruneSettings(RepairSettings):
    """Settings of `repair(..., method="prune")`.

    Attributes:
        gamma: what a loss on attacked images counts beside the loss on clean ones; more prunes more.
        rounds: how often the channels are scored anew, at most.
        share: of all channels, pruned in a round, at most.
        samples: clean images that a round scores the channels on.
        replacement: what a pruned channel gives: "mean", its mean over clean images, or "zero".
    """

    gamma: float = 0.1
    rounds: int = 6
    share: float = 1 / 60
    samples: int = 128
    replacement: Literal["mean", "zero"] = "mean"

    def __post_init__(self) -> None:
        check_settings(
            self,
            (
                ("gamma", is_number(self.gamma) and self.gamma > 0, "above 0"),
                ("rounds", is_whole(self.rounds) and self.rounds >= 1, "at least 1"),
                ("share", is_number(self.share) and 0 < self.share <= 1, "above 0, at most 1"),
                ("samples", is_whole(self.samples) and self.samples >= 2, "at least 2"),
                ("replacement", self.replacement in ("mean", "zero"), "'mean' or 'zero'"),
            ),
        )


@dataclass(frozen=True)
class PrunedChannel:
    """A channel that was made constant.

    Attributes:
        layer: its name in `model.named_modules()`.
        channel: the index in it.
        score: what the suspect's margin on attacked images loses without it, to first order.
        damage: what the margin of the model's own answer loses on clean ones, likewise.
    """

    layer: str
    channel: int
    score: float
    damage: float


@dataclass(frozen=True)
class PruneStep:
    """What a model with some channels pruned does.

    Attributes:
        channels: all that are constant, in order of choice.
        accuracy: on a part of the samples, always the same.
        norms: length of the shortest perturbation into each target, in the l2 metric; NaN where none
            leads there. It hardly tells a pruned backdoor: clean accuracy needs latents that others
            can be pushed to.
        moved: for every target, the shares of images that its change and its patch lead there, those
            found at first; empty without an adversary.
    """

    channels: tuple[PrunedChannel, ...]
    accuracy: float
    norms: tuple[float, ...]
    moved: tuple[tuple[float, ...], ...]

    @property
    def most_moved(self) -> float:
        """The largest of the shares; NaN without an adversary."""
        return max((rate for rates in self.moved for rate in rates), default=math.nan)


@dataclass(frozen=True)
class PruneHistory:
    """What was pruned.

    Attributes:
        before: the model as it was, without pruned channels.
        rounds: after every round; the last may have pruned more than accuracy allows.
        after: the model as it was left. No channels where pruning missed the backdoor.
        candidates: how many channels there were to choose from.
    """

    before: PruneStep
    rounds: tuple[PruneStep, ...]
    after: PruneStep
    candidates: int

    @property
    def channels(self) -> tuple[PrunedChannel, ...]:
        """Those that are constant now."""
        return self.after.channels


def prune(
    model: nn.Module,
    head: Head,
    inputs: Tensor,
    labels: Tensor,
    shifts: Tensor,
    targets: tuple[int, ...],
    adversary: InputAdversary | None,
    settings: PruneSettings,
    *,
    max_accuracy_drop: float,
    quantile: float = 1.0,
    progress: bool | None = None,
) -> PruneHistory:
    """Prunes the model in place, until the backdoor is seen to be gone or accuracy runs out.

    Where changes and patches lead few images into a target to begin with, or afterwards more than
    a quarter of what they did before, all channels are brought back.

    Args:
        model: a copy that may be changed.
        head: of this copy.
        inputs: clean samples [N, ...].
        labels: their classes [N].
        shifts: s_t, float64 [T, D], in the l2 metric; used where there is no adversary.
        targets: the T classes to be repaired.
        adversary: what drives inputs into them; it is copied. Without it shifted latents alone say
            which channels lead there, and they say little.
        settings: see `PruneSettings`.
        max_accuracy_drop: how much accuracy may be lost. Pruning aims for half of it, .01 at most,
            and where the backdoor stays then, for .8 of it, .02 at most.
        quantile: of the margins that the shifts were solved from.
        progress: whether to show a progress bar; None shows it on a terminal.

    Raises:
        InputError: a model without channels to prune.
    """
    layers = maskable_layers(model, head, inputs[:2])
    if not layers:
        raise InputError.of(
            "repair",
            "model",
            expected="convolutions or linear layers before the head, each used once",
            got="none",
            way_out="repair it with method='finetune'",
        )
    samples = AttackedSamples(
        model,
        head,
        inputs,
        labels,
        shifts,
        targets,
        adversary,
        quantile=quantile,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    return _Pruning(samples, layers, settings).run(max_accuracy_drop, progress)


class _Pruning:
    """The channels that are pruned, and how they are chosen."""

    def __init__(
        self, samples: AttackedSamples, layers: Sequence[ChannelLayer], settings: PruneSettings
    ) -> None:
        self.samples, self.layers, self.settings = samples, layers, settings
        self.places = [(layer, c) for layer in layers for c in range(layer.channels)]
        self.constant = torch.zeros(len(self.places))
        if settings.replacement == "mean":
            few = samples.inputs[: 4 * settings.samples]
            self.constant = channel_means(samples.model, layers, few, settings.batch_size)
        self.pruned: dict[int, tuple[PrunedChannel, Masked]] = {}

    def run(self, max_accuracy_drop: float, progress: bool | None) -> PruneHistory:
        """Prunes too much, and brings back what was too much."""
        before = self._measure()
        aims = [min(share * max_accuracy_drop, most) for share, most in _AIMS]
        rounds = [before]
        with progress_bar("pruning", self.settings.rounds, progress) as advance:
            for round_ in range(self.settings.rounds):
                drop = before.accuracy - rounds[-1].accuracy
                gone = rounds[-1].most_moved <= _GONE and before.most_moved >= FEWEST_LED
                if gone or drop > _OVERDRAFT * aims[0]:
                    break
                chosen = self._choose(round_)
                if not chosen:
                    break
                for j, channel in chosen.items():
                    self.pruned[j] = channel, self._mask(j)
                rounds.append(self._measure())
                logger.info("prune: round %d: %s", round_ + 1, rounds[-1])
                advance(1)
        for aim in aims:
            after = self._bring_back(rounds[-1], before.accuracy - aim)
            # Without an adversary both are NaN, and nobody can tell.
            told = not before.most_moved < FEWEST_LED
            if told and not after.most_moved > _MOST_LEFT * before.most_moved:
                break
        else:
            self._undo(list(self.pruned))
            after = before
        return PruneHistory(before, tuple(rounds[1:]), after, len(self.places))

    def _mask(self, j: int) -> Masked:
        layer, channel = self.places[j]
        return mask(layer, channel, float(self.constant[j]))

    def _undo(self, channels: Sequence[int]) -> None:
        for j in channels:
            self.pruned[j][1].undo()

    def _measure(self, without: Sequence[int] = ()) -> PruneStep:
        channels = tuple(channel for j, (channel, _) in self.pruned.items() if j not in without)
        return PruneStep(channels, *self.samples.measure())

    def _choose(self, round_: int) -> dict[int, PrunedChannel]:
        """The channels to prune next, by their index in `places`."""
        index = self._index(round_)
        clean = self.samples.contributions(self.layers, self.samples.clean(index))
        parts = [
            self.samples.contributions(self.layers, samples)
            for samples in self.samples.attacked(index, step=True)
        ]
        if not parts:  # every image is taken for a target already
            return {}
        worth = clean.of_constant(self.constant)
        push = torch.cat([part.of_constant(self.constant) for part in parts])
        attacked = torch.cat([part.objective for part in parts])
        free = torch.ones(len(self.places), dtype=torch.bool)
        free[list(self.pruned)] = False
        order = most_for_least(
            (clean.objective, worth),
            (attacked, _TRUSTED * push),
            self.settings.gamma,
            free,
            max(1, round(self.settings.share * len(self.places))),
        )
        score, damage = push.mean(0).tolist(), worth.mean(0).tolist()
        return {
            j: PrunedChannel(self.places[j][0].name, self.places[j][1], score[j], damage[j])
            for j in order
        }

    def _index(self, round_: int) -> Tensor:
        count = min(self.settings.samples, len(self.samples.labels))
        return (torch.arange(count) + round_ * count) % len(self.samples.labels)

    def _bring_back(self, pruned: PruneStep, wanted: float) -> PruneStep:
        """Brings as few channels back as the accuracy wanted needs, as far as halving finds them.

        Args:
            pruned: what was measured with all of them pruned.
            wanted: the accuracy.
        """
        for j in self.pruned:
            self._mask(j)
        if pruned.accuracy >= wanted - _ROUNDING:
            return pruned
        order = self.worth_most
        few, enough = 0, len(order)  # all of them are enough
        while enough - few > 1:
            middle = (few + enough) // 2
            self._undo(order[:middle])
            reached = self.samples.accuracy() >= wanted - _ROUNDING
            for j in order[:middle]:
                self._mask(j)
            few, enough = (few, middle) if reached else (middle, enough)
        self._undo(order[:enough])
        return self._measure(order[:enough])

    @functools.cached_property
    def worth_most(self) -> list[int]:
        """The pruned channels, those first whose return is worth most; of each it is measured alone."""
        index = self._index(0)
        clean, attacked = self.samples.clean(index), self.samples.attacked(index, step=False)

        def margins() -> tuple[Tensor, Tensor]:
            of_targets = [self.samples.margins(part) for part in attacked]
            return self.samples.margins(clean), torch.cat([torch.zeros(0), *of_targets])

        m, a = margins()
        worth, push = [], []
        pruned = list(self.pruned)
        for j in pruned:
            self._undo([j])
            with_it = margins()
            self._mask(j)
            worth.append(m - with_it[0])
            push.append(a - with_it[1])
        order = most_for_least(
            (m, torch.stack(worth, 1)),
            (a, torch.stack(push, 1)),
            _RESTORING * self.settings.gamma,
            torch.ones(len(pruned), dtype=torch.bool),
            len(pruned),
            at_a_loss=True,
        )
        return [pruned[k] for k in order]


def most_for_least(
    clean: tuple[Tensor, Tensor],
    attacked: tuple[Tensor, Tensor],
    gamma: float,
    free: Tensor,
    most: int,
    *,
    at_a_loss: bool = False,
) -> list[int]:
    """Channels in the order in which they lower the loss most, to first order.

    The loss is softplus(-m) on clean margins m plus gamma softplus(a) on the targets' margins a, each
    a mean. A chosen channel takes its contributions from all margins before the next is chosen.

    Args:
        clean: margins [N] and contributions [N, channels].
        attacked: margins [M] and contributions [M, channels].
        gamma: weight of the attacked ones.
        free: [channels], which may be chosen.
        most: channels to choose, at most.
        at_a_loss: whether to go on when no channel lowers the loss.
    """
    (m, worth), (a, push) = clean, attacked
    free = free.clone()
    chosen: list[int] = []

    def loss(m: Tensor, a: Tensor) -> Tensor:
        of_attacks = functional.softplus(a).sum(0) / max(1, len(a))
        return functional.softplus(-m).mean(0) + gamma * of_attacks

    for _ in range(min(most, int(free.sum()))):
        after = loss(m[:, None] - worth, a[:, None] - push)
        after = torch.where(free & after.isfinite(), after, math.inf)
        best = int(after.argmin())
        lower = float(after[best]) < float(loss(m, a))
        if not (lower or (at_a_loss and bool(after[best].isfinite()))):
            break
        chosen.append(best)
        free[best] = False
        m, a = m - worth[:, best], a - push[:, best]
    return chosen
