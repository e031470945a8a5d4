"""The statistics of a scan: is one class's minimal perturbation abnormally small?

The norms r_k of a clean head scatter around a common level; the poisoned class lies below it. The
test is Grubbs' for one low outlier, on log r_k: the norms are positive and what counts is their
ratio. Its p-value is corrected for having looked at all classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy  # its parts load when they are first used

from .errors import compared, counted

Verdict = Literal["backdoored", "clean", "inconclusive"]

# "Clean" is said only where a class at three quarters of the usual norm would have been flagged.
# The poisoned classes of published models lie at 0.7 to 0.9 of it (docs/method.md), so that even
# this is no promise; where the norms scatter more, the test says nothing.
DETECTABLE_RATIO_FOR_CLEAN = 0.75

# A p-value above alpha but below this many times alpha is no reason to call a model clean.
DOUBT_FACTOR = 10.0
LARGEST_DOUBT = 0.3

# Norms of a symmetric head differ by rounding alone: below 1 % there is no scatter to compare with,
# and a class that is reached with more than nine tenths of the usual change is no backdoor.
SMALLEST_DEVIATION = 0.01
LARGEST_SUSPECT_RATIO = 0.9

# The p-value is that of log-normal norms. Where those of the other classes are visibly not (Shapiro
# and Wilk's test), it means nothing, whatever it is.
LAW_P_VALUE = 0.01

# Grubbs' test needs a spread of the others: two of them have none worth the name.
FEWEST_CLASSES = 4

_FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class NormTest:
    """What the norms say.

    Attributes:
        norm: [C], as they were judged; NaN where a class was not solved.
        verdict: "backdoored", "clean" or "inconclusive".
        suspects: the classes whose norm is abnormally small, most suspicious first.
        doubtful: those whose norm stands out among the rest, but not enough, in the same order.
        p_value: of the smallest norm, corrected for the choice among the classes, and of the two
            kinds where there are both; 1.0 where nothing could be tested.
        class_p_values: [C], the same for every class by itself; NaN where it was not tested.
        anomaly_index: [C], (median - r_k) / (1.4826 MAD), the textbook index, for comparison.
        usual_norm: geometric mean of the norms of all classes that are no suspects.
        detectable_ratio: a class below this share of the usual norm would have been flagged.
        reason: the verdict in one sentence.
        balanced: [C], the norms in the balanced metric, tested beside the others; None without.
            `class_p_values` are those of both; the index, `usual_norm` and `detectable_ratio` of
            `norm` alone.
        applies: whether norms scatter as those of clean models do, without which p-values mean nothing.
        hidden: whether a latent patch hides the norms, which are not known then.
    """

    norm: _FloatArray
    verdict: Verdict
    suspects: tuple[int, ...]
    p_value: float
    class_p_values: _FloatArray
    anomaly_index: _FloatArray
    detectable_ratio: float
    usual_norm: float
    reason: str
    doubtful: tuple[int, ...] = ()
    balanced: _FloatArray | None = None
    applies: bool = True
    hidden: bool = False

    @property
    def null_band(self) -> tuple[float, float]:
        """From the norm below which norms alone flag a class to as far above the usual one.

        Below it lies a class of a clean model in a share alpha of all models. NaN if not tested.
        """
        low, high = self.usual_norm * self.detectable_ratio, math.inf
        if low > 0:
            high = self.usual_norm * (self.usual_norm / low)
        return (low, high) if math.isfinite(high) else (math.nan, math.nan)


def anomaly_index(norm: _FloatArray) -> _FloatArray:
    """(median - r_k) / (1.4826 MAD), [C]; non-finite norms are left out and get NaN."""
    usable = np.isfinite(norm)
    index = np.full(norm.shape, np.nan)
    if not usable.any():
        return index
    median = np.median(norm[usable])
    spread = 1.4826 * np.median(np.abs(norm[usable] - median))
    with np.errstate(divide="ignore", invalid="ignore"):
        index[usable] = (median - norm[usable]) / spread
    index[usable & (norm == median)] = 0.0
    return index


def _low_outlier_p_values(log_norm: _FloatArray, tests: int) -> _FloatArray:
    """One-sided p-value of each value against all others, times the number of values, and of tests.

    Leave-one-out t: (mean of the others - x) / (their deviation * sqrt(1 + 1/(n-1))) has n - 2
    degrees of freedom for normal data. The factor n is Bonferroni's; for the smallest value it is
    Grubbs' test.
    """
    count = len(log_norm)
    if count < 3:
        return np.ones(count)
    # Taking x out of n values moves their mean by d / (n - 1) and their sum of squares by
    # d^2 n / (n - 1), with d = x - mean: all C tests from two sums.
    d = log_norm - log_norm.mean()
    others_squares = np.maximum(0.0, (d**2).sum() - d**2 * count / (count - 1))
    deviation = np.maximum(np.sqrt(others_squares / (count - 2)), SMALLEST_DEVIATION)
    below_the_others = -d * count / (count - 1)
    t = below_the_others / (deviation * math.sqrt(1 + 1 / (count - 1)))
    p_values: _FloatArray = np.minimum(1.0, tests * count * scipy.stats.t.sf(t, count - 2))
    return p_values


def _law_p_value(log_norm: _FloatArray) -> float:
    """Of Shapiro and Wilk's test for normality; 1.0 where the scatter is mere rounding."""
    if np.std(log_norm) < SMALLEST_DEVIATION:
        return 1.0
    # SciPy vouches for 5,000 values at most: an even choice of the sorted ones keeps the shape.
    values = np.sort(log_norm)
    values = values[:: -(-len(values) // 5000)]
    return float(scipy.stats.shapiro(values).pvalue)


def _detectable_ratio(log_norm: _FloatArray, alpha: float) -> float:
    """The ratio to the usual norm at which a low outlier reaches alpha, given this scatter."""
    count = len(log_norm)
    if count < FEWEST_CLASSES:
        return 0.0
    deviation = max(np.std(np.delete(log_norm, log_norm.argmin()), ddof=1), SMALLEST_DEVIATION)
    critical = (
        scipy.stats.t.isf(alpha / count, count - 2) * deviation * math.sqrt(1 + 1 / (count - 1))
    )
    return min(float(np.exp(-critical)), LARGEST_SUSPECT_RATIO)


def judge_norms(
    norm: _FloatArray, alpha: float = 0.01, balanced: _FloatArray | None = None
) -> NormTest:
    """Judges the norms r_k of all classes of a head.

    Args:
        norm: float64 [C], infinite where a class is unreachable, NaN where it was not solved.
        alpha: the false-alarm rate of the whole test, over all classes together, for a clean model
            whose norms are log-normal.
        balanced: the same in the balanced metric, [C], which no rescaling of latents changes. Each
            of the two is tested at half of alpha, and a model is clean by both or by neither.

    Returns:
        NormTest. Suspects are found one after the other: while the smallest norm is abnormal among
        the classes that are left, it is set aside and the rest is tested again.
    """
    if balanced is None:
        return _judge(norm, alpha, 1)
    plain, other = _judge(norm, alpha, 2), _judge(balanced, alpha, 2)
    if math.isnan(plain.usual_norm):
        return replace(plain, balanced=balanced)
    tests = sorted((plain, other), key=lambda test: test.p_value)  # the plain one first of equals
    verdicts = [test.verdict for test in tests]
    gravest: tuple[Verdict, ...] = ("backdoored", "inconclusive")
    verdict: Verdict = next((v for v in gravest if v in verdicts), "clean")
    decides = next(test for test in tests if test.verdict == verdict)
    reason = plain.reason if verdict == "clean" else decides.reason
    if reason != plain.reason:
        reason += ", when latents are rescaled to weigh the same in the head"
    telling = [test for test in tests if test.applies] or tests
    suspects = tuple(dict.fromkeys(k for test in tests for k in test.suspects))
    doubtful = dict.fromkeys(k for test in tests for k in test.doubtful if k not in suspects)
    return replace(
        plain,
        verdict=verdict,
        suspects=suspects,
        doubtful=tuple(doubtful),
        p_value=telling[0].p_value,
        class_p_values=np.fmin(telling[0].class_p_values, telling[-1].class_p_values),
        reason=reason,
        balanced=balanced,
        applies=any(test.applies for test in tests),
    )


def _judge(norm: _FloatArray, alpha: float, tests: int) -> NormTest:
    """Of one kind of norms, which is one of so many tests that share alpha."""
    class_p_values = np.full(norm.shape, np.nan)
    usable = np.flatnonzero(np.isfinite(norm) & (norm > 0))
    index = anomaly_index(norm)
    stuck = np.flatnonzero(norm == 0)
    nothing_to_compare = None
    if len(stuck):
        nothing_to_compare = (
            f"class {stuck[0]} needs no change, so that the norms cannot be compared"
        )
    elif len(usable) < FEWEST_CLASSES:
        nothing_to_compare = (
            f"norms of {counted(len(usable), 'class', 'classes')}; with fewer than "
            f"{FEWEST_CLASSES} there is nothing to compare with"
        )
    if nothing_to_compare is not None:
        return NormTest(
            norm, "inconclusive", (), 1.0, class_p_values, index, 0.0, math.nan, nothing_to_compare
        )

    log_norm = np.log(norm)
    smallest = int(usable[log_norm[usable].argmin()])
    class_p_values[usable] = _low_outlier_p_values(log_norm[usable], tests)
    suspects: list[int] = []
    left = usable
    while len(left) >= FEWEST_CLASSES:
        p_values = _low_outlier_p_values(log_norm[left], tests)
        lowest = int(log_norm[left].argmin())
        usual = float(np.exp(np.delete(log_norm[left], lowest).mean()))
        if p_values[lowest] >= alpha or norm[left[lowest]] > LARGEST_SUSPECT_RATIO * usual:
            break
        suspects.append(int(left[lowest]))
        class_p_values[left[lowest]] = p_values[lowest]
        left = np.delete(left, lowest)

    p_value = float(class_p_values[smallest])
    ratio = _detectable_ratio(log_norm[left], alpha / tests)
    usual = float(np.exp(log_norm[left].mean()))
    law = _law_p_value(log_norm[left])
    doubt = min(DOUBT_FACTOR * alpha, LARGEST_DOUBT)
    doubtful = _stand_out(left, log_norm, doubt, tests)
    verdict: Verdict = "inconclusive"
    if law < LAW_P_VALUE:
        suspects, doubtful = [], []
        reason = (
            f"the norms do not scatter as those of clean models do (p = {law:.1g}), so that the test "
            f"does not apply; the smallest is that of class {smallest}"
        )
    elif suspects:
        verdict, first = "backdoored", suspects[0]
        reason = (
            f"class {first} is reached with {norm[first] / usual:.2f} of the usual perturbation"
        )
    elif p_value < doubt:
        reason = f"class {smallest} stands out, but not enough: {compared(p_value, alpha)}"
    elif ratio < DETECTABLE_RATIO_FOR_CLEAN:
        visible = f"only one below {ratio:.2f} of the usual would have"
        if ratio < 0.01:
            visible = "hardly any could"
        reason = f"no norm stands out, but the norms scatter so much that {visible}"
    else:
        verdict = "clean"
        reason = f"no norm stands out; one below {ratio:.2f} of the usual would have"
    return NormTest(
        norm,
        verdict,
        tuple(suspects),
        p_value,
        class_p_values,
        index,
        ratio,
        usual,
        reason,
        tuple(doubtful),
        applies=law >= LAW_P_VALUE,
    )


def _stand_out(
    left: npt.NDArray[np.intp], log_norm: _FloatArray, level: float, tests: int
) -> list[int]:
    """The classes that are low outliers among these, set aside one after the other.

    Half of the classes cannot all be outliers of the other half.
    """
    found: list[int] = []
    most = len(log_norm) // 2
    while len(left) >= FEWEST_CLASSES and len(found) < most:
        lowest = int(log_norm[left].argmin())
        if _low_outlier_p_values(log_norm[left], tests)[lowest] >= level:
            break
        found.append(int(left[lowest]))
        left = np.delete(left, lowest)
    return found
