"""What a guard learns of clean latents, and how it makes sure of its false-alarm rate.

Everything that a sample is judged by is estimated from other samples: the clean samples are dealt
into folds, each fold is scored by what the others say, and the ranks among these scores are the
p-values (cross-conformal prediction, Vovk 2015). A score is a little lower where its sample was
judged by all, so that the promised rate is kept from few samples on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .guard_scoring import (
    PARTS,
    GuardScorer,
    calibration_table,
    guard_parts,
    join_parts,
    threshold_at,
)
from .latents import LatentMoments

# Chosen on the detection bench together with the parts of the score (docs/guard.md).
NEAR_RANK, FAR_RANK, ALIGNED_RANK = 8, 32, 16
FOLDS, FOLDS_OF_FEW, _FEW = 10, 20, 1000  # few samples: let each be judged by nearly all
EXACT_KNOTS = 1024
_SPREAD_FLOOR = 0.1  # of the usual spread, as in the standardized metric
_EVEN_FLOOR = 0.02  # of the mean variance: what is left beside the basis
_PRIOR_SAMPLES = 2.0  # so many samples at the mean of all are added to each class
_LOCATION_PRIOR, _DEVIATION_PRIOR = 5.0, 20.0  # likewise, of the usual location and deviation
_PART_TAIL = 0.01  # the unit of each part: what one in a hundred clean samples exceeds
_ROUNDS = 8  # of the subspace iteration
_WIDE = 256  # latents; of fewer the whole spectrum takes less time


@dataclass(frozen=True, eq=False)
class Geometry:
    """Where clean latents lie; see `GuardScorer` for what each tensor is. float32."""

    mean: Tensor
    inverse_spread: Tensor
    basis: Tensor
    near_weight: Tensor
    far_weight: Tensor
    direction: Tensor

    @classmethod
    def of(cls, latent: Tensor, predicted: Tensor, perturbation: Tensor) -> Geometry:
        """From clean latents [N, D], the classes they are taken for, and s of all classes [C, D]."""
        phi, classes = latent.double(), len(perturbation)
        count = torch.bincount(predicted, minlength=classes).double()
        total = torch.zeros(classes, phi.shape[1], dtype=torch.float64)
        total.index_add_(0, predicted, phi)
        mean = (total + _PRIOR_SAMPLES * phi.mean(0)) / (count + _PRIOR_SAMPLES)[:, None]
        free = max(1, len(phi) - int((count > 0).sum()))
        residual = phi - mean[predicted]
        spread = (residual.square().sum(0) / free).sqrt()
        usual = spread.square().mean().sqrt()
        spread = spread.clamp(min=max(_SPREAD_FLOOR * float(usual), 1e-30))
        y = residual / spread
        variance, basis = _principal(y, FAR_RANK, free)
        even = float(y.square().sum()) / free
        near, far = (_precision(variance, r, even, phi.shape[1]) for r in (NEAR_RANK, FAR_RANK))
        weight = _precision(variance, ALIGNED_RANK, even, phi.shape[1])
        # The linear filter for a shift of y along s / spread: P s / sqrt(s P s).
        shift = torch.nan_to_num(perturbation.double(), 0, 0, 0) / spread
        turned = shift * weight[0] + (shift @ basis.T * weight[1:]) @ basis
        length = (turned * shift).sum(1, keepdim=True).clamp(min=0).sqrt()
        direction = torch.where(length > 0, turned / length.clamp(min=1e-300), 0.0)
        parts = (mean, 1 / spread, basis, near, far, direction)
        return cls(*(part.float().contiguous() for part in parts))

    def parts(self, latent: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The four numbers of each latent, and the predicted classes."""
        return guard_parts(latent, logits, **vars(self))


def _principal(y: Tensor, rank: int, free: int) -> tuple[Tensor, Tensor]:
    """The largest variances [R] of centred rows y [N, D], and orthonormal directions [R, D].

    Of wide latents by subspace iteration from a fixed start. What that leaves of the last directions
    is no matter: any basis with the variances along it will do.
    """
    rank = min(rank, *y.shape)
    if y.shape[1] <= _WIDE:
        variance, basis = torch.linalg.eigh(y.T @ y / free)
        return variance.flip(0)[:rank].clamp(min=0), basis.flip(1)[:, :rank].T
    start = torch.Generator().manual_seed(0)
    width = min(rank + 8, *y.shape)
    block = torch.randn(y.shape[1], width, dtype=y.dtype, generator=start)
    for _ in range(_ROUNDS):
        block = torch.linalg.qr(y.T @ (y @ block)).Q
    small = y @ block
    variance, turn = torch.linalg.eigh(small.T @ small / free)
    return variance.flip(0)[:rank].clamp(min=0), (block @ turn.flip(1)[:, :rank]).T


def _precision(variance: Tensor, rank: int, total: float, dim: int) -> Tensor:
    """Weights [R + 1] of |y|^2 and of the squares along the basis in y' P y.

    P is the inverse of a covariance with the known variances along the first `rank` directions and
    the same variance along all others.
    """
    used = min(rank, len(variance))
    left = (total - float(variance[:used].sum())) / max(1, dim - used)
    even = max(left, _EVEN_FLOOR * total / dim, 1e-30)
    weight = torch.zeros(len(variance) + 1, dtype=torch.float64)
    weight[0] = 1 / even
    weight[1 : used + 1] = 1 / variance[:used].clamp(min=_EVEN_FLOOR * total / dim) - 1 / even
    return weight


def _usual(parts: Tensor, predicted: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Location and deviation [C, 4] of the parts in every class, float64.

    Classes of few samples, or none, share those of all.
    """
    values, middle = parts.double(), parts.double().median(0).values
    location = middle.repeat(classes, 1)
    for k in predicted.unique().tolist():
        own = values[predicted == k]
        share = len(own) / (len(own) + _LOCATION_PRIOR)
        location[k] += share * (own.median(0).values - middle)
    square = (values - location[predicted]).square()
    count = torch.bincount(predicted, minlength=classes).double()
    total = torch.zeros(classes, values.shape[1], dtype=torch.float64)
    total.index_add_(0, predicted, square)
    prior = _DEVIATION_PRIOR * square.mean(0)
    deviation = ((total + prior) / (count + _DEVIATION_PRIOR)[:, None]).sqrt()
    return location, deviation.clamp(min=1e-30)


def _limit(parts: Tensor) -> Tensor:
    """What one in a hundred of the standardized parts [N, 4] exceeds, [4]."""
    rank = min(len(parts) - 1, int((1 - _PART_TAIL) * len(parts)))
    return parts.sort(0).values[rank].clamp(min=1e-3)


def perturbations_of(latent: Tensor, logits: Tensor, weight: Tensor, operation: str) -> Tensor:
    """s_k of every class [C, D] in the standardized metric, from clean latents and logits alone."""
    moments = LatentMoments.empty(latent.shape[1])
    moments.update(latent)
    solved = ops.minimal_perturbation(
        weight,
        ops.pairwise_margin_max(logits),
        scale=moments.standardized_scale(operation).to(weight.device),
    )
    return solved.perturbation


@dataclass(frozen=True, eq=False)
class CrossScores:
    """What clean samples score when others say what is usual.

    Attributes:
        score: float64 [N].
        scorer: what says so of any other latent, from all samples: the tensors of a `LatentScorer`.
    """

    score: Tensor
    scorer: dict[str, Tensor]


def cross_scores(latent: Tensor, logits: Tensor, perturbation: Tensor, seed: int) -> CrossScores:
    """Scores of clean latents [N, D] with logits [N, C], each fold scored by what the others say.

    Args:
        latent: float32, on the CPU.
        logits: likewise.
        perturbation: s_k, [C, D].
        seed: which deals the samples into folds.
    """
    samples, classes = logits.shape
    predicted = logits.argmax(1)
    generator = torch.Generator().manual_seed(seed)
    folds = FOLDS_OF_FEW if samples < _FEW else FOLDS
    fold = torch.randperm(samples, generator=generator) % folds
    parts = torch.zeros(samples, len(PARTS))
    for f in range(folds):
        own, rest = fold == f, fold != f
        geometry = Geometry.of(latent[rest], predicted[rest], perturbation)
        parts[own] = geometry.parts(latent[own], logits[own])[0]
    # The same once more: locations, deviations and limits, too, are of other samples.
    scores = torch.zeros(samples, dtype=torch.float64)
    for f in range(folds):
        own, rest = fold == f, fold != f
        scores[own] = join_parts(parts[own].double(), *_units(parts, predicted, rest, own, classes))
    location, inverse = _units_of(parts, predicted, classes)
    geometry = Geometry.of(latent, predicted, perturbation)
    units = {"location": location.float(), "inverse_deviation": inverse.float()}
    return CrossScores(scores, {**vars(geometry), **units})


def fit_scorer(
    latent: Tensor,
    logits: Tensor,
    perturbation: Tensor,
    false_positive_rate: float,
    seed: int,
    operation: str,
) -> GuardScorer:
    """A scorer for clean latents [N, D] with logits [N, C] and the perturbations s_k, [C, D].

    Raises:
        InputError: too few samples for the rate.
    """
    logits, samples = logits.float(), len(latent)
    found = cross_scores(latent, logits, perturbation, seed)
    knots, exceeding = calibration_table(found.score, EXACT_KNOTS)
    threshold = threshold_at(knots, exceeding, samples, false_positive_rate, operation)
    return GuardScorer(
        **found.scorer,
        knots=knots,
        exceeding=exceeding,
        threshold=threshold,
        samples=torch.tensor(samples),
    )


def _units_of(parts: Tensor, predicted: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Location and inverse deviation [C, 4], the latter such that a part rarely exceeds 1."""
    location, deviation = _usual(parts, predicted, classes)
    limit = _limit((parts - location[predicted]) / deviation[predicted])
    return location, 1 / (deviation * limit)


def _units(
    parts: Tensor, predicted: Tensor, rest: Tensor, own: Tensor, classes: int
) -> tuple[Tensor, Tensor]:
    """Those that the rest says, for each sample of its own."""
    location, inverse = _units_of(parts[rest], predicted[rest], classes)
    return location[predicted[own]], inverse[predicted[own]]
