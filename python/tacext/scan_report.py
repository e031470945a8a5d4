"""What a scan reports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from .detection import NormTest, Verdict
from .observation import Metric
from .ops import MinimalPerturbation
from .verdict import Evidence

Depth = Literal["norms", "fast", "thorough"]


@dataclass(frozen=True)
class ScanTimings:
    """Seconds a scan spent in each stage."""

    forward: float
    margins: float
    solve: float
    look: float
    test: float


@dataclass(frozen=True, eq=False)
class ScanReport:
    """The outcome of a scan.

    Attributes:
        verdict: "backdoored", "clean" or "inconclusive".
        suspects: the classes that the scan holds to be poisoned, most suspicious first.
        doubtful: the classes that stand out beside them, but not enough: p is above alpha, and below
            20 alpha (10 alpha where the norms decide; .3 at most), or the norms alone would flag them. So
            are suspects behind a latent patch that holds, whatever p is. `repair` looks after them, too.
        p_value: of the verdict: of the most suspicious class, corrected for the choice among all C,
            or of the shuffle, a patch or a wave where that is smaller.
        reason: the verdict in one sentence.
        warnings: what makes this scan less trustworthy than it could be.
        test: the statistics of the norms.
        evidence: what the second look saw and the joint test; of a scan without data, what the
            ascent from noise saw; None where the norms alone were judged.
        perturbations: s_k for every class with norms, multipliers and certificates. Without data
            they are those of one synthetic input for each class.
        head: the name of the layer that was analysed.
        num_classes, latent_dim, samples: C, D and N.
            N is 0 of a scan without data.
        samples_advised: how many clean samples may turn an inconclusive verdict into another; None
            where more would not.
        accuracy: on the data, against its labels; NaN without.
        confidence: the mean probability that the model gives to its own answers; far above the
            accuracy where the data is of another kind than it was trained on.
        metric: the metric of `norm`; scale: its scale, float64 [D], or None for "l2".
        quantile: of the samples in every entry of M; 1 is the maximum. Below 1 s_k sends at least
            that share past each other class, and so at least 1 - (C - 1)(1 - quantile) to k.
        margins: M, [C, C].
        alpha: the false-alarm rate asked for.
        depth: "norms", "fast" or "thorough", as asked for.
        timings: seconds in each stage.
        limited: the classes in front of which a latent patch at the head stands, of a repair or as anybody
            put it there; () where there is none. Norms are of latents that it has not touched.
        trust_patch: whether a latent patch was said to be of a repair of the caller's own, as asked for.
        model_norms: the length of each parameter and buffer, by which `repair` knows the model; () where
            it is not known.
    """

    verdict: Verdict
    suspects: tuple[int, ...]
    doubtful: tuple[int, ...]
    p_value: float
    reason: str
    warnings: tuple[str, ...]
    test: NormTest = field(repr=False)
    evidence: Evidence | None = field(repr=False)
    perturbations: MinimalPerturbation = field(repr=False)
    head: str
    num_classes: int
    latent_dim: int
    samples: int
    samples_advised: int | None
    accuracy: float
    confidence: float
    metric: Metric
    quantile: float
    scale: Tensor | None = field(repr=False)
    margins: Tensor = field(repr=False)
    alpha: float
    depth: Depth
    timings: ScanTimings = field(repr=False)
    limited: tuple[int, ...] = ()
    trust_patch: bool = False
    model_norms: tuple[float, ...] = field(default=(), repr=False)

    @property
    def norm(self) -> Tensor:
        """r_k in the metric of the scan, float64 [C]; infinite where unreachable."""
        return self.perturbations.norm

    @property
    def perturbation(self) -> Tensor:
        """s_k, float64 [C, D]."""
        return self.perturbations.perturbation

    @property
    def certificate(self) -> float:
        """The largest KKT residual of any optimal class."""
        return self.perturbations.certificate
