"""The joint test of a scan: norms, max margins and reach of all classes, as one p-value.

Each kind of evidence is one number a class, larger where the class is more suspicious. A class is
compared with the others of its model by a moderated t statistic (Smyth, 2004): the spread of the
others is shrunk towards what clean models usually show, since ten classes alone say little of it.
The kinds are joined by Fisher's method, with Brown's (1975) correction for their correlation.
Suspects are found as in Rosner's (1983) generalized ESD test: also behind one another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from scipy import special, stats

_FloatArray = npt.NDArray[np.float64]

# Kinds of evidence, by where they come from; `Calibration.kinds` has a null for each.
KINDS = ("norm", "noise_margin", "clean_margin", "reach")

# A single p-value below this adds no more to the sum: far tails of a t law are not that well known.
SMALLEST_P = 1e-8


@dataclass(frozen=True)
class KindNull:
    """How one kind of evidence scatters over the classes of clean models.

    Attributes:
        spread: the usual standard deviation.
        weight: how many degrees of freedom that prior knowledge counts for (Smyth's d0).
    """

    spread: float
    weight: float


@dataclass(frozen=True)
class JointNull:
    """The law of Fisher's sum over some kinds of evidence, for the classes of clean models.

    Attributes:
        shape, scale: of the gamma distribution with its mean and variance (Brown).
    """

    shape: float
    scale: float


@dataclass(frozen=True, eq=False)
class Calibration:
    """Constants fitted on clean models (`benchmarks/detection/calibrate.py`).

    Attributes:
        version: of the table.
        models: how many clean models it was fitted on.
        kinds: the null of each kind.
        joint: the null of each combination of kinds, named by them in the order of `KINDS`.
    """

    version: int
    models: int
    kinds: Mapping[str, KindNull] = field(repr=False)
    joint: Mapping[tuple[str, ...], JointNull] = field(repr=False)


def calibration_from_json(text: str) -> Calibration:
    """Reads a table as `benchmarks/detection/calibrate.py` writes it."""
    table = json.loads(text)
    return Calibration(
        table["version"],
        table["models"],
        {name: KindNull(**values) for name, values in table["kinds"].items()},
        {tuple(name.split("+")): JointNull(**values) for name, values in table["joint"].items()},
    )


@dataclass(frozen=True, eq=False)
class JointTest:
    """What all evidence together says.

    Attributes:
        order: classes from the most to the least suspicious, as far as they were tested.
        step_p_values: of each class in `order`, with those before it left out.
        p_value: of the model: the smallest of these, corrected for their number.
        suspects: classes that are outliers at `alpha`, most suspicious first.
        class_p_values: [C], of every class against all others; not corrected for the choice.
        kind_p_values: [C] for each kind, likewise.
        alpha: the false-alarm rate asked for.
    """

    order: tuple[int, ...]
    step_p_values: tuple[float, ...]
    p_value: float
    suspects: tuple[int, ...]
    class_p_values: _FloatArray
    kind_p_values: Mapping[str, _FloatArray]
    alpha: float


def moderated_p_values(values: _FloatArray, null: KindNull) -> _FloatArray:
    """One-sided p-value of each class against all the others, [C]; large values are suspicious.

    t = (x - mean of the others) / (s sqrt(1 + 1/n)), where s^2 pools the others' variance, with
    n - 1 degrees of freedom, and the usual one, with `null.weight`.
    """
    count = len(values)
    others = count - 1
    d = values - values.mean()
    squares = np.maximum(0.0, (d**2).sum() - d**2 * count / others)
    freedom = others - 1 + null.weight
    spread = np.sqrt((squares + null.weight * null.spread**2) / freedom)
    t = d * count / others / (spread * math.sqrt(1 + 1 / others))
    p_values: _FloatArray = stats.t.sf(t, freedom)
    return p_values


def fisher_sums(p_values: Sequence[_FloatArray]) -> _FloatArray:
    """-2 sum log p over the kinds, [C]."""
    sums: _FloatArray = -2 * np.log(np.maximum(np.stack(list(p_values)), SMALLEST_P)).sum(0)
    return sums


def joint_p_values(sums: _FloatArray, null: JointNull) -> _FloatArray:
    """P(a clean class has such a sum or a larger one), [C]."""
    p_values: _FloatArray = special.gammaincc(null.shape, sums / null.scale)
    return p_values


def most_suspects(num_classes: int) -> int:
    """How many outliers are looked for behind one another."""
    return max(1, min(num_classes // 5, 3))


def judge_jointly(
    evidence: Mapping[str, _FloatArray], alpha: float, calibration: Calibration
) -> JointTest:
    """Tests all classes on all kinds of evidence at once.

    Args:
        evidence: float64 [C] for each kind, finite, larger where a class is more suspicious.
        alpha: the false-alarm rate of the whole test on a clean model.
        calibration: fitted on clean models, other than the one that is judged.

    Returns:
        JointTest.
    """
    kinds = tuple(kind for kind in KINDS if kind in evidence)
    null = calibration.joint[kinds]
    num_classes = len(evidence[kinds[0]])

    def of(classes: npt.NDArray[np.intp]) -> tuple[dict[str, _FloatArray], _FloatArray]:
        by_kind = {
            kind: moderated_p_values(evidence[kind][classes], calibration.kinds[kind])
            for kind in kinds
        }
        return by_kind, joint_p_values(fisher_sums(list(by_kind.values())), null)

    left = np.arange(num_classes)
    kind_p_values, class_p_values = of(left)
    order: list[int] = []
    steps: list[float] = []
    most = most_suspects(num_classes)
    joint = class_p_values
    for _ in range(most):
        top = int(joint.argmin())
        order.append(int(left[top]))
        # 1 - (1 - p)^n, that the smallest of n is so small
        steps.append(float(-np.expm1(len(left) * np.log1p(-joint[top]))))
        left = np.delete(left, top)
        _, joint = of(left)
    outliers = max((i + 1 for i, p in enumerate(steps) if most * p < alpha), default=0)
    return JointTest(
        tuple(order),
        tuple(steps),
        min(1.0, most * min(steps)),
        tuple(order[:outliers]),
        class_p_values,
        kind_p_values,
        alpha,
    )
