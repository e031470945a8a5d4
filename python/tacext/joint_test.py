"""The joint test of a scan: all evidence of all classes, as one p-value.

Each kind of evidence is one number a class, larger where the class is more suspicious. A class is
compared with the others of its model by a moderated t statistic (Smyth, 2004): the spread of the
others is shrunk towards what clean models usually show, since ten classes alone say little of it.
The kinds are joined as Fisher's method does, but by the squares of the logarithms: a backdoor that
one kind shows clearly is not drowned by another that sees nothing. The law of such scores is a
gamma distribution with two constants fitted on clean models: not on all their classes but on the
most suspicious one of each, so that it holds in the tail where it is used, whatever correlates. As
few models leave that tail uncertain, the p-value is not that of the gamma law but of an F law, as a
gamma law with an estimated scale has; how many degrees of freedom a model is worth is a choice, two,
that simulations bear out.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources

import numpy as np
import numpy.typing as npt
import scipy  # its parts load when they are first used

from .errors import NotFiniteError

_FloatArray = npt.NDArray[np.float64]

# Kinds of evidence, by where they come from; `Calibration.kinds` has a null for each.
KINDS = ("norm", "balanced", "reach", "share", "patch", "corner", "margin", "prototype")
# Those that a scan joins, and what part of alpha each test has beside the others that can be made:
# how far inputs get, how many of them, what is seen without gradients, and without any data. An
# attacker who holds one of the first two down shows in the other, one who hides gradients in the third.
# Each is made with both norms: the plain one tells more of models that were left as training made
# them, the balanced one cannot be changed by rescaling latents.
COMBINATIONS: Mapping[tuple[str, ...], float] = {
    ("norm", "reach"): 0.075,
    ("balanced", "reach"): 0.075,
    ("norm", "share", "patch"): 0.175,
    ("balanced", "share", "patch"): 0.175,
    ("norm", "corner"): 0.25,
    ("balanced", "corner"): 0.25,
    ("margin", "prototype"): 1.0,
}

# A single p-value below this adds no more to the score: far tails of a t law are not that well known.
SMALLEST_P = 1e-8

# One target may hide behind another: the most suspicious of the others is left out of the
# comparison, where enough of them are left.
FEWEST_CLASSES_TO_TRIM = 8


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
    """The law of the joint score of some kinds of evidence, for the classes of clean models.

    Attributes:
        shape, scale: of a gamma distribution, such that the largest of C draws behaves as the
            largest score of a clean model's C classes.
        models: how many clean models the scale is known from.
    """

    shape: float
    scale: float
    models: int


# Shares of a few hundred images are known no better than so.
_SMALLEST_SHARE = 2e-3


def logit_of_share(share: float) -> float:
    """log(share / (1 - share)), of none and all as of the smallest and largest that can be told."""
    return float(scipy.special.logit(min(max(share, _SMALLEST_SHARE), 1 - _SMALLEST_SHARE)))


@dataclass(frozen=True)
class NormalNull:
    """The law of one number of a clean model: a t distribution, as mean and spread are estimated.

    The logit of the share that `shuffle` moves, or of the largest share that any class's patch does;
    the log odds ratio of the best of the patches of single classes; the selectivity of the best wave.

    Attributes:
        mean, spread: of the numbers.
        models: how many they were estimated from.
    """

    mean: float
    spread: float
    models: int

    def p_value(self, value: float) -> float:
        """P(a clean model gives such a number or a larger one)."""
        z = (value - self.mean) / self.spread
        return float(scipy.stats.t.sf(z / math.sqrt(1 + 1 / self.models), self.models - 1))


@dataclass(frozen=True, eq=False)
class Calibration:
    """Constants fitted on clean models (`benchmarks/detection/calibrate.py`).

    Attributes:
        version: of the table.
        models: how many clean models it was fitted on.
        kinds: the null of each kind.
        joint: the null of each of `COMBINATIONS`.
        shuffle, patch: the nulls of the shuffle and of the patch that moves most images.
        source: that of the patch that leads one class astray.
        wave: that of the most selective wave.
    """

    version: int
    models: int
    kinds: Mapping[str, KindNull] = field(repr=False)
    joint: Mapping[tuple[str, ...], JointNull] = field(repr=False)
    shuffle: NormalNull = field(repr=False)
    patch: NormalNull = field(repr=False)
    source: NormalNull = field(repr=False)
    wave: NormalNull = field(repr=False)


def calibration_from_json(text: str) -> Calibration:
    """Reads a table as `benchmarks/detection/calibrate.py` writes it."""
    table = json.loads(text)
    return Calibration(
        table["version"],
        table["models"],
        {name: KindNull(**values) for name, values in table["kinds"].items()},
        {tuple(name.split("+")): JointNull(**values) for name, values in table["joint"].items()},
        NormalNull(**table["shuffle"]),
        NormalNull(**table["patch"]),
        NormalNull(**table["source"]),
        NormalNull(**table["wave"]),
    )


@functools.cache
def shipped_calibration() -> Calibration:
    """The table that comes with tacext."""
    return calibration_from_json(
        resources.files(__package__).joinpath("calibration.json").read_text("utf-8")
    )


@dataclass(frozen=True, eq=False)
class JointTest:
    """What all evidence together says.

    Attributes:
        kinds: the kinds of evidence that were joined.
        p_value: of the most suspicious class, corrected for the choice among all.
        suspects: classes that are outliers at `alpha`, most suspicious first.
        doubtful: those that are beside them at the level of doubt alone, in the same order.
        most_suspicious: the class with the smallest p-value.
        class_p_values: [C], of every class against the others, each corrected for the choice.
        kind_p_values: [C] for each kind, not corrected; NaN where it was not measured.
        alpha: the false-alarm rate asked for.
    """

    kinds: tuple[str, ...]
    p_value: float
    suspects: tuple[int, ...]
    doubtful: tuple[int, ...]
    most_suspicious: int
    class_p_values: _FloatArray
    kind_p_values: Mapping[str, _FloatArray]
    alpha: float


def moderated_p_values(values: _FloatArray, null: KindNull) -> _FloatArray:
    """One-sided p-value of each class against the others, [C]; large values are suspicious.

    t = (x - mean of the others) / (s sqrt(1 + 1/n)), where s^2 pools the others' variance, with
    n - 1 degrees of freedom, and the usual one, with `null.weight`. From `FEWEST_CLASSES_TO_TRIM`
    on the largest of the others is left out. NaN where the value is.
    """
    p_values = np.full(len(values), np.nan)
    known = np.flatnonzero(np.isfinite(values))
    x = values[known] - (values[known].mean() if len(known) else 0.0)
    trimmed = len(known) >= FEWEST_CLASSES_TO_TRIM
    others = len(known) - 1 - trimmed
    if others < 1:
        return p_values
    # Sums over all but the class itself and, if trimmed, but the largest of the rest.
    left_out = np.zeros(len(x))
    if trimmed:
        first, second = x.argsort()[-1:-3:-1]
        left_out[:] = x[first]
        left_out[first] = x[second]
    mean = (x.sum() - x - left_out) / others
    squares = np.maximum(0.0, (x**2).sum() - x**2 - left_out**2 - others * mean**2)
    freedom = others - 1 + null.weight
    spread = np.sqrt((squares + null.weight * null.spread**2) / freedom)
    p_values[known] = scipy.stats.t.sf((x - mean) / (spread * math.sqrt(1 + 1 / others)), freedom)
    return p_values


def joint_scores(p_values: Sequence[_FloatArray]) -> _FloatArray:
    """sqrt(sum (2 log p)^2) over the kinds, [C]; what was not measured adds nothing."""
    known = np.nan_to_num(np.stack(list(p_values)), nan=1.0)
    scores: _FloatArray = np.linalg.norm(2 * np.log(np.maximum(known, SMALLEST_P)), axis=0)
    return scores


def joint_p_values(scores: _FloatArray, null: JointNull, classes: int) -> _FloatArray:
    """P(the largest of the `classes` scores of a clean model is such or larger), for each score.

    An F law, whose heavier tail stands for what n models leave unknown of the gamma law.
    """
    ratio = scores / (null.shape * null.scale)
    single = scipy.stats.f.sf(ratio, 2 * null.shape, 2 * null.models)
    p_values: _FloatArray = -np.expm1(classes * np.log1p(-np.minimum(single, 1 - 1e-16)))
    return p_values


def judge_jointly(
    evidence: Mapping[str, _FloatArray],
    alpha: float,
    calibration: Calibration,
    doubt: float = 0.0,
) -> JointTest:
    """Tests all classes on all kinds of evidence at once.

    Args:
        evidence: float64 [C] for each kind, larger where a class is more suspicious; NaN where it
            was not measured, which counts as no suspicion; infinity, which would count as that,
            is refused. Of `COMBINATIONS` those that it has all
            kinds of are tested, and share alpha.
        alpha: the false-alarm rate of the whole test on a clean model.
        calibration: fitted on clean models, other than the one that is judged.
        doubt: the p-value below which a class that is no suspect is doubtful.

    Returns:
        JointTest. Suspects are found one after the other: while the most suspicious class is an
        outlier, it is set aside and the rest is tested again; and doubtful classes after them.
    """
    chosen = {kinds: part for kinds, part in COMBINATIONS.items() if set(kinds) <= set(evidence)}
    parts = sum(chosen.values())
    kinds = tuple(kind for kind in KINDS if any(kind in combination for combination in chosen))
    total = len(evidence[kinds[0]])
    for kind in kinds:
        if np.isinf(evidence[kind]).any():
            raise NotFiniteError.of(
                "scan",
                "model",
                expected=f"finite evidence of {kind}",
                got="infinity",
                way_out="divide the weight and the bias of its head by one number",
            )

    def of(left: npt.NDArray[np.intp]) -> tuple[dict[str, _FloatArray], _FloatArray]:
        by_kind = {
            kind: moderated_p_values(evidence[kind][left], calibration.kinds[kind])
            for kind in kinds
        }
        corrected = [
            joint_p_values(
                joint_scores([by_kind[kind] for kind in combination]),
                calibration.joint[combination],
                total,
            )
            * (parts / part)
            for combination, part in chosen.items()
        ]
        return by_kind, np.minimum(1.0, np.min(corrected, axis=0))

    left = np.arange(total)
    kind_p_values, class_p_values = of(left)
    most_suspicious = int(class_p_values.argmin())
    suspects: list[int] = []
    doubtful: list[int] = []
    joint = class_p_values
    # Half of the classes cannot all be outliers of the other half.
    while len(suspects) + len(doubtful) < len(class_p_values) // 2:
        top = int(joint.argmin())
        # Behind a class that is no outlier nobody is told to be one.
        if joint[top] < alpha and not doubtful:
            suspects.append(int(left[top]))
        elif joint[top] < doubt:
            doubtful.append(int(left[top]))
        else:
            break
        left = np.delete(left, top)
        _, joint = of(left)
    return JointTest(
        kinds,
        float(class_p_values[most_suspicious]),
        tuple(suspects),
        tuple(doubtful),
        most_suspicious,
        class_p_values,
        kind_p_values,
        alpha,
    )
