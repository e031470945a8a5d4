"""Fitting a latent patch: what is solved from the latents of each way into a target.

No training and no gradients: a discriminant, a threshold, a ridge regression and a shift, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from . import ops
from .copies import different_rows
from .errors import InputError, counted
from .guard_fit import cross_scores, perturbations_of
from .heads import Head
from .latent_patch import LatentLimit, LatentPatch
from .repair_settings import RepairSettings, check_settings, is_number, is_whole

# Rows that covariances are taken of, at most; more tell little and take their time.
_MOST_ROWS = 512
# The limit is at its full height where all but this share of what leads into the target lies, but no
# nearer to the clean ones than this share of the way.
_BELOW_FULL = 0.05
_NEAREST = 0.1
# All targets together touch no larger share of all clean samples.
_MOST_TOUCHED = 0.015
# Of the clean samples that may be touched so many are for each kind of limit: ways that were found, where
# clean latents lie, and what inner layers say. On the bench more of the first and the last told of no more
# triggers, and more of the second of those that no way shows.
_SHARE_OF_WAYS, _SHARE_OF_LATENTS, _SHARE_OF_EXITS = 0.2, 0.7, 0.1
# Above all scores, and finite in half precision, too.
_NO_LIMIT = 6e4
# Latents that the limit of a class is made of.
_MOST_LIMITED = 10_000
# Directions are tried on rows that had no part in them, in so many folds.
_FOLDS = 4


@dataclass(frozen=True, kw_only=True)
class PatchSettings(RepairSettings):
    """Settings of `repair(..., method="patch")`.

    Attributes:
        untouched: share of the clean samples that the model takes for a target that must pass as
            they are. Of many targets more must, so that of all samples 98.5 % do. Both hold where a
            class has samples enough: of n samples each of K limits may touch a share of 1 / (n + 1).
        rank: in how many directions the change may differ from input to input.
        early_exits: whether inner layers say which inputs do not belong into a target, and what
            those are that are kept out of it (`tacext.early_exits`); else the head guesses, and the
            tenth that they may touch is touched by nothing.
        rounds: how often ways into the targets are looked for, each time in spite of the limits that
            are there, at most.
    """

    untouched: float = 0.95
    rank: int = 32
    rounds: int = 3
    early_exits: bool = True

    def __post_init__(self) -> None:
        good = is_number(self.untouched) and 0 < self.untouched <= 1
        check_settings(
            self,
            (
                ("untouched", good, "a share above 0, 1 at most"),
                ("rank", is_whole(self.rank) and self.rank >= 0, "a whole number, 0 or more"),
                ("early_exits", isinstance(self.early_exits, bool), "True or False"),
                ("rounds", is_whole(self.rounds) and self.rounds >= 1, "at least 1"),
            ),
        )


@dataclass(frozen=True, eq=False)
class LedLatents:
    """Latents of inputs that something leads into a target.

    Attributes:
        target: the class.
        latent: of the inputs with the change on, [N, D].
        clean: of the same inputs without, [N, D]; None where no inputs do it, and the change that a
            trigger makes is not known: such a way lowers the target's logit and takes nothing off.
    """

    target: int
    latent: Tensor
    clean: Tensor | None


def fit_latent_patch(
    head: Head, clean: Tensor, ways: Sequence[LedLatents], settings: PatchSettings
) -> LatentPatch:
    """Solves for the patch in float64; no training, no gradients.

    Args:
        head: of the model.
        clean: latents of clean samples [N, D].
        ways: what leads into each target, of each one at least two latents.
        settings: see `PatchSettings`.

    Returns:
        LatentPatch in the head's dtype, on its device; `fit_latent_limit` solves for its limit.

    Raises:
        InputError: no clean sample that the model takes for a target.
    """
    if not ways:
        raise InputError.of(
            "repair",
            "targets",
            expected="something that leads into each target",
            got="nothing that was found",
            way_out='repair with method="finetune"',
        )
    weight = head.weight.detach().double()
    clean, _, predicted = _answers(head, clean)
    targets = {way.target for way in ways}
    lowering = _lowering(weight, sorted(targets))
    touched = _touched(predicted, targets, settings) * _SHARE_OF_WAYS
    solved = []
    for way in ways:
        latent = way.latent.to(weight)
        before = None if way.clean is None else way.clean.to(weight)
        # All ways into a target together touch no more clean samples than one may.
        each = touched / sum(other.target == way.target for other in ways)
        own = clean[predicted == way.target]
        limit = _limit(own, latent, before, each, min(settings.rank, head.latent_dim))
        solved.append((*limit, lowering[way.target]))
    buffers = [torch.stack(part).to(head.weight) for part in zip(*solved, strict=True)]
    buffers.append(torch.tensor([way.target for way in ways], device=head.weight.device))
    return LatentPatch(*buffers)


def touched_by_exits(predicted: Tensor, targets: Iterable[int], settings: PatchSettings) -> float:
    """The share of each target's clean samples that the limit of early exits may touch.

    Args:
        predicted: what the model takes clean samples for, [N].
        targets: the classes that get limits.
        settings: see `PatchSettings`.

    Raises:
        InputError: no clean sample that the model takes for a target.
    """
    return _touched(predicted, set(targets), settings) * _SHARE_OF_EXITS


def fit_latent_limit(
    head: Head, clean: Tensor, targets: Iterable[int], settings: PatchSettings
) -> LatentLimit:
    """How far latents may lie from clean ones of the targets, whatever leads them there.

    Args:
        head: of the model.
        clean: latents of clean samples [N, D].
        targets: the classes that get a limit.
        settings: see `PatchSettings`.

    Returns:
        LatentLimit on the head's device.

    Raises:
        InputError: no clean sample that the model takes for a target.
    """
    weight = head.weight.detach().double()
    targets = tuple(targets)
    rows = at_most(clean.detach().float().cpu(), _MOST_LIMITED)
    clean, logits, predicted = _answers(head, rows[different_rows(rows)])
    touched = _touched(predicted, set(targets), settings) * _SHARE_OF_LATENTS
    perturbation = perturbations_of(clean, logits, weight, "repair").cpu()
    found = cross_scores(clean.float().cpu(), logits.float().cpu(), perturbation, settings.seed)
    limit = torch.full((len(weight),), _NO_LIMIT)
    usual = conformal(found.score, touched)  # few samples of a class do not know its extremes
    for target in targets:
        own = found.score[predicted.cpu() == target]
        limit[target] = torch.maximum(conformal(own, touched), usual).clamp(max=_NO_LIMIT)
    return LatentLimit(limit, **found.scorer).to(weight.device)


def _lowering(weight: Tensor, targets: Sequence[int]) -> dict[int, Tensor]:
    """The shift [D] that lowers each target against all other classes.

    Raises:
        InputError: there is none.
    """
    shifts = shifts_between_logits(weight, targets)
    for target, shift in zip(targets, shifts, strict=True):
        if bool(shift.isnan().any()):
            raise InputError.of(
                "repair",
                "targets",
                expected="classes that a shift of the latent can lower against all others",
                got=f"{target}, whose weights lie between those of others",
                way_out='repair with method="finetune"',
            )
    return dict(zip(targets, shifts, strict=True))


def _answers(head: Head, clean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, logits and predicted classes of clean samples in float64, on the head's device."""
    weight = head.weight.detach().double()
    clean = clean.to(weight)
    logits = clean @ weight.T
    if head.module.bias is not None:
        logits = logits + head.module.bias.detach().double()
    return clean, logits, logits.argmax(1)


def _touched(predicted: Tensor, targets: set[int], settings: PatchSettings) -> float:
    """The share of each target's clean samples that its limits may touch together."""
    counts = {target: int((predicted == target).sum()) for target in targets}
    for target, own in counts.items():
        if own < 2:
            raise InputError.of(
                "repair",
                "data",
                expected=f"clean samples that the model takes for class {target}",
                got=counted(own, "sample"),
                way_out='pass more samples, or repair with method="finetune"',
            )
    of_all = sum(counts.values()) / len(predicted)
    return min(1 - settings.untouched, _MOST_TOUCHED / of_all)


def conformal(scores: Tensor, touched: float) -> Tensor:
    """The score that one more sample exceeds with that probability at most.

    Of few the largest is as far as it goes, and the share 1 / (n + 1).
    """
    kept = min(len(scores), math.ceil((len(scores) + 1) * (1 - touched)))
    return scores.sort().values[kept - 1]


def _limit(
    own: Tensor,
    latent: Tensor,
    before: Tensor | None,
    touched: float,
    most_rank: int,
) -> tuple[Tensor, ...]:
    """Of one way its direction, threshold, centre, change, left and right."""
    centre, spread = latent.mean(0), latent - latent.mean(0)
    direction = _discriminant(own, latent)
    # Out of fold, as a direction knows the samples that it was made of; 0 and 1 are the two means.
    share_own, share = _out_of_fold(own, latent), _out_of_fold(latent, own)
    limit = conformal(share_own, touched)
    full = torch.quantile(1 - share, _BELOW_FULL)
    height = torch.maximum(full - limit, _NEAREST * (1 - limit).abs()).clamp(min=1e-6)
    # As a function of the latent itself: share = (v.phi - v.own) / (v.centre - v.own).
    start, unit_length = direction @ own.mean(0), direction @ (centre - own.mean(0))
    unit_length = unit_length.clamp(min=1e-30)
    direction = direction / (unit_length * height)
    threshold = start / (unit_length * height) + limit / height

    # The change: its mean, and how it depends on the latent, by ridge regression on the principal
    # components of the latents that carry it.
    change = torch.zeros_like(centre)
    left = right = latent.new_zeros(len(centre), most_rank)
    if before is not None:
        change = (latent - before).mean(0)
        rows, differing = at_most(spread, _MOST_ROWS), at_most(latent - before - change, _MOST_ROWS)
        principal = _Spectrum(rows)
        rank = min(most_rank, len(principal.values))  # or fewer: of fewer dimensions, or latents
        vectors = principal.vectors[:, :rank]
        told = (rows @ vectors).T @ differing / (principal.values[:rank] + principal.ridge)[:, None]
        left = functional.pad(vectors, (0, most_rank - rank))
        right = functional.pad(told, (0, 0, 0, most_rank - rank)).T

    return direction, threshold, centre, change, left, right.T.contiguous()


def shifts_between_logits(weight: Tensor, classes: Sequence[int]) -> Tensor:
    """For each class k the shift m with (w_k - w_j).m >= 1 for every other class j, float64 [K, D].

    The shortest that moves the logit of k alone, up to what all classes share; where there are too
    many classes for that, the shortest of all, which is one of the QPs of a scan. NaN where there is none.
    """
    weight = weight.double()
    index = torch.tensor(classes, device=weight.device)
    unit = functional.one_hot(index, len(weight)).double() - 1 / len(weight)
    shift: Tensor = unit @ torch.linalg.pinv(weight - weight.mean(0)).T
    moved = shift @ weight.T
    against = moved.gather(1, index[:, None]) - moved
    least = against.scatter(1, index[:, None], 1.0).amin(1)
    shift = shift / least.clamp(min=0.9)[:, None]
    hard = least <= 0.9
    if bool(hard.any()):
        margins = 1 - torch.eye(len(weight)).to(weight)
        solved = ops.minimal_perturbation(weight, margins, classes=index[hard].tolist())
        optimal = (solved.status == ops.Status.OPTIMAL).to(weight.device)
        shift[hard] = solved.perturbation.masked_fill(~optimal[:, None], torch.nan)
    return shift


def _discriminant(own: Tensor, latent: Tensor) -> Tensor:
    """Fisher's: the direction [D] along which two sets of rows differ most for their spread."""
    within = torch.cat(
        [
            at_most(own - own.mean(0), _MOST_ROWS // 2),
            at_most(latent - latent.mean(0), _MOST_ROWS // 2),
        ]
    )
    return _Spectrum(within).solve(latent.mean(0) - own.mean(0))


def _out_of_fold(rows: Tensor, others: Tensor) -> Tensor:
    """How far each row lies from its own mean, 0, to that of the others, 1, along Fisher's direction.

    Each is judged by a direction and means that it had no part in.
    """
    shares = rows.new_zeros(len(rows))
    folds = min(_FOLDS, len(rows))
    fold = torch.arange(len(rows), device=rows.device) % folds
    for f in range(folds):
        rest = rows[fold != f]
        direction = _discriminant(rest, others)
        start, end = direction @ rest.mean(0), direction @ others.mean(0)
        shares[fold == f] = (rows[fold == f] @ direction - start) / (end - start).clamp(min=1e-30)
    return shares


class _Spectrum:
    """Eigenvalues and directions of X'X for centred rows X [N, D], by the smaller of two products."""

    def __init__(self, rows: Tensor) -> None:
        count, width = rows.shape
        wide = width > count
        values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
        kept = values > 1e-12 * values[-1]
        self.values: Tensor = values[kept].flip(0)
        vectors = vectors[:, kept].flip(1)
        self.vectors: Tensor = rows.T @ vectors / self.values.sqrt() if wide else vectors
        # Shrunk towards a sphere, by the mean of the diagonal.
        self.ridge = (rows.square().sum() / width).clamp(min=1e-12)

    def solve(self, right: Tensor) -> Tensor:
        """(X'X + ridge I)^-1 of a vector [D]."""
        seen = self.vectors.T @ right
        outside = right - self.vectors @ seen
        solution: Tensor = self.vectors @ (seen / (self.values + self.ridge))
        return solution + outside / self.ridge


def at_most(rows: Tensor, most: int) -> Tensor:
    """At most so many of the rows, evenly spaced."""
    return rows if len(rows) <= most else rows[torch.linspace(0, len(rows) - 1, most).long()]
