"""From all evidence of a scan to one verdict.

What decides are the joint test of all classes, the most selective wave, and of a scan that asks
gradients, for backdoors in which no class stands out the shuffle, the patch that moves most images, and
for those of single classes the patch that leads one class astray. They share alpha. Where inputs are no
images and gradients are not asked, the norms decide (`detection`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .detection import LARGEST_DOUBT, NormTest, Verdict
from .errors import compared
from .joint_test import Calibration, JointTest, judge_jointly, logit_of_share
from .max_margin import MaxMargin
from .patch_reach import FEWEST_PIXELS
from .second_look import FEWEST_IMAGES_OF_SHARES, MOST_CLASSES, SecondLook, evidence_of
from .source_patch import FEWEST_OF_A_CLASS
from .waves import FEWEST_PIXELS as FEWEST_PIXELS_OF_WAVES
from .waves import SMALLEST_WAVE, Waves, class_by_wave

# Of alpha, for the shuffle, the patch of one class, the wave and the patch of all; the joint test has the rest. Where a
# shuffle is found, its p-value is far below any threshold. So is that of a patch that moves all images, whatever those into
# other classes do; one that moves 97 % is for the joint test to compare.
_SHUFFLE_SHARE = 0.1
SOURCE_SHARE = 0.03
WAVE_SHARE = 0.03
_PATCH_SHARE = 0.01

# A p-value above alpha but below this many times alpha is no reason to call a model clean: of the bench
# that the factor was chosen on, with 45 clean models, one of five single-target backdoors that were
# missed lay there, and six of the clean ones; of 60 six do now.
THOROUGH_DOUBT_FACTOR = 20.0

# A shuffle below this share leaves most classes where they are, whatever its p-value.
SMALLEST_SHUFFLE = 0.4

# A patch that leaves most images of the class, or of so few, is no backdoor of it.
SMALLEST_SOURCE = 0.5
FEWEST_OF_SOURCE = 4

# Nor is a patch a backdoor that leaves so many images where they are.
SMALLEST_PATCH = 0.8
# Beside the class that a patch moves most images into, others are named whose patch moves as many
# as would be significant and lifts their margin half as much: two targets, not a class like it.
_GAIN_TO_BE_NAMED = 0.5

# A patch that moves so many images is told of where its class is a suspect.
_MOVES_MOST = 0.5

# Kinds of evidence whose names need a word more in a sentence.
_NAMES = {"balanced": "balanced norm"}

_MOST_MOVES_TOLD = 4
_WAVE_RUNS = ("from left to right", "from top to bottom")

_NO_SOURCES = (
    f"; backdoors of single classes were not looked for, which takes at most {MOST_CLASSES} classes, and "
    f"of each {FEWEST_OF_A_CLASS} images that the model gets right"
)
_NO_WAVES = f"; no waves were tried, which takes images of {FEWEST_PIXELS_OF_WAVES} pixels and at most {MOST_CLASSES} classes"
_NO_PATCHES = (
    f"; no patches or squares in corners were tried, which takes images of {FEWEST_PIXELS} pixels"
)
_NO_GRADIENTS = "; a scan that asks gradients sees more"


@dataclass(frozen=True)
class Finding:
    """A verdict and what led to it.

    Attributes:
        verdict: "backdoored", "clean" or "inconclusive".
        suspects: the classes held to be poisoned, most suspicious first.
        p_value: of the whole scan, corrected for all choices.
        reason: the verdict in one sentence.
        doubtful: classes beside them that stand out, but not enough to be held so; of a clean
            verdict none.
    """

    verdict: Verdict
    suspects: tuple[int, ...]
    p_value: float
    reason: str
    doubtful: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Evidence:
    """What changed inputs showed a scan and what the tests make of it.

    Attributes:
        look: the second look; None of a scan without data.
        margin: the largest margins from noise; None of a scan with data.
        joint: the test of all classes on all kinds of evidence.
        patch_p_value: of the patch that moves most images, 1 where that is far from all; None where
            no patch was tried.
        shuffle_p_value: of the shuffle, 1 where it leaves most classes where they are; None where
            none was looked for.
        source_p_value: of the patch that leads one class astray, 1 where it leaves most of its
            images; None where none was looked for.
        wave_p_value: of the most selective wave, 1 where it leaves most images; None where none was
            tried.
    """

    look: SecondLook | None
    margin: MaxMargin | None
    joint: JointTest
    patch_p_value: float | None
    shuffle_p_value: float | None
    source_p_value: float | None = None
    wave_p_value: float | None = None


def doubt_level(alpha: float) -> float:
    """The p-value of a scan that looked twice below which a class that is no suspect is in doubt."""
    return min(THOROUGH_DOUBT_FACTOR * alpha, LARGEST_DOUBT)


def finding_of_norms(test: NormTest) -> Finding:
    """The verdict of a scan that has only the norms."""
    return Finding(test.verdict, test.suspects, test.p_value, test.reason, test.doubtful)


def weigh(
    test: NormTest, look: SecondLook, alpha: float, calibration: Calibration
) -> tuple[Finding, Evidence]:
    """The verdict of a scan that looked twice.

    Args:
        test: of the norms of all classes.
        look: the second look.
        alpha: the false-alarm rate of the whole scan on a clean model.
        calibration: the nulls of all kinds of evidence.
    """
    shuffle_p, patch_p = _shuffle_p_value(look, calibration), _patch_p_value(look, calibration)
    source_p, wave_p = source_p_value(look, calibration), wave_p_value(look, calibration)
    tested = {
        "patch": (patch_p, _PATCH_SHARE),
        "shuffle": (shuffle_p, _SHUFFLE_SHARE),
        "source": (source_p, SOURCE_SHARE),
        "wave": (wave_p, WAVE_SHARE),
    }
    left = 1 - sum(share for p, share in tested.values() if p is not None)
    doubt = doubt_level(alpha)
    seen = evidence_of(test.norm, look, test.balanced)
    joint = judge_jointly(seen, left * alpha, calibration, left * doubt)
    evidence = Evidence(look, None, joint, patch_p, shuffle_p, source_p, wave_p)
    of_joint = min(1.0, joint.p_value / left)
    of_patch, of_shuffle, of_source, of_wave = (
        1.0 if p is None else min(1.0, p / share) for p, share in tested.values()
    )
    p_value = min(of_joint, of_patch, of_shuffle, of_source, of_wave)
    patched = _classes_by_patch(look, alpha, calibration) if of_patch < alpha else ()
    led = (look.source.target,) if look.source is not None and of_source < alpha else ()
    by_wave = () if look.waves is None else (class_by_wave(look.waves),)
    waved = by_wave if of_wave < alpha else ()
    in_doubt = [
        (of_wave, by_wave if of_wave < doubt else ()),
        (of_joint, joint.doubtful),
        (of_patch, (_class_by_patch(look),) if of_patch < doubt else ()),
        (of_source, (look.source.target,) if look.source is not None and of_source < doubt else ()),
    ]

    def beside(suspects: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(k for k in _by_p_value(in_doubt) if k not in suspects)

    shuffled = look.shuffle
    # A class that stands out comes before a shuffle, but one class led astray may be a part of it.
    standing_out = joint.suspects or patched or waved
    of_all = of_shuffle < alpha and not standing_out and of_shuffle <= of_source
    if (standing_out or led) and not of_all:
        named = [
            (of_joint, joint.suspects),
            (of_patch, patched),
            (of_source, led),
            (of_wave, waved),
        ]
        suspects = _by_p_value(named)
        k = suspects[0]
        where = _told_of_patch(look, k) or _told_of_corner(look, k)
        reason = f"class {k} stands out in {_kinds_that_tell(joint, k)}{where}"
        if led and of_source == min(p for p, classes in named if classes):
            reason = f"{_told_of_source(look)}: a backdoor of single classes"
        elif look.waves is not None and of_wave == p_value:
            reason = _told_of_wave(look.waves)
        return Finding("backdoored", suspects, p_value, reason, beside(suspects)), evidence
    if shuffled is not None and of_shuffle == p_value and p_value < doubt:
        moved = (
            f"one small change of the input sends {shuffled.share:.0%} of the images of every class "
            f"to another class of its own ({_moves(shuffled.destinations)})"
        )
        if of_all:
            targets = tuple(sorted({k for k in shuffled.destinations if k >= 0}))
            reason = f"{moved}: a backdoor from all classes to all"
            return Finding("backdoored", targets, p_value, reason, beside(targets)), evidence
        reason = f"{moved}, but clean models can do so: {compared(p_value, alpha)}"
        return Finding("inconclusive", (), p_value, reason, beside(())), evidence
    if p_value < doubt:
        by_how_much = compared(p_value, alpha)
        if look.source is not None and of_source == p_value:
            reason = f"{_told_of_source(look)}, but not surely enough: {by_how_much}"
        elif look.waves is not None and of_wave == p_value:
            reason = f"{_told_of_wave(look.waves)}, but not surely enough: {by_how_much}"
        else:
            k = joint.most_suspicious if of_joint == p_value else _class_by_patch(look)
            where = _told_of_patch(look, k) or _told_of_corner(look, k)
            reason = f"class {k} stands out, but not enough: {by_how_much}{where}"
        return Finding("inconclusive", (), p_value, reason, beside(())), evidence
    if test.verdict == "backdoored":
        reason = f"{test.reason}; what changed inputs show does not bear it out: p = {p_value:.2g}"
        return Finding("inconclusive", (), p_value, reason, test.suspects), evidence
    return Finding("clean", (), p_value, _told_of_nothing(joint, look, len(test.norm))), evidence


def _by_p_value(found: list[tuple[float, tuple[int, ...]]]) -> tuple[int, ...]:
    """The classes that several tests name, those of the smallest p-value first."""
    ordered = sorted(found, key=lambda test: test[0])
    return tuple(dict.fromkeys(k for _, classes in ordered for k in classes))


def _told_of_nothing(joint: JointTest, look: SecondLook, num_classes: int) -> str:
    seen = [f"no class stands out in {_listed([_NAMES.get(k, k) for k in joint.kinds], 'or')}"]
    if look.shuffle is not None:
        seen.append("no change shuffles the classes")
    if look.source is not None:
        known = len(look.source.looked_at)
        told = (
            "" if known == num_classes else f" ({known} of {num_classes} had images enough to tell)"
        )
        seen.append(f"no patch in a corner leads one class astray{told}")
    if look.waves is not None:
        seen.append("no faint wave that was tried is a trigger")
    looked_at = len(look.classes)
    part = (
        ""
        if looked_at == num_classes
        else f" ({looked_at} of {num_classes} classes were looked at)"
    )
    unseen = "" if look.waves is not None or look.notes else _NO_WAVES
    if look.reach is None:
        unseen += _NO_GRADIENTS
    elif look.patch is None:
        unseen += _NO_PATCHES
    elif look.source is None:
        unseen += _NO_SOURCES
    return _listed(seen, "and") + part + unseen


def _shuffle_p_value(look: SecondLook, calibration: Calibration) -> float | None:
    if look.shuffle is None:
        return None
    # Most classes that stay where they are are no shuffle, however rare that is.
    enough = look.shuffle.share >= SMALLEST_SHUFFLE
    if not enough:
        return 1.0
    return calibration.shuffle.p_value(logit_of_share(look.shuffle.share))


def source_p_value(look: SecondLook, calibration: Calibration) -> float | None:
    """P(a clean model's best patch of one class is so selective); see `Evidence`."""
    if look.source is None:
        return None
    found = look.source
    if found.share < SMALLEST_SOURCE or found.images < FEWEST_OF_SOURCE:
        return 1.0
    return calibration.source.p_value(found.log_odds_ratio)


def wave_p_value(look: SecondLook, calibration: Calibration) -> float | None:
    """P(a clean model's most selective wave is so selective); see `Evidence`."""
    if look.waves is None:
        return None
    k = class_by_wave(look.waves)
    if float(look.waves.rate[k]) < SMALLEST_WAVE:
        return 1.0
    return calibration.wave.p_value(float(look.waves.selectivity[k]))


def telling_waves(evidence: Evidence | None, level: float) -> Waves | None:
    """The waves of a scan, if the most selective of them is significant, or in doubt, at this level."""
    if evidence is None or evidence.look is None or evidence.wave_p_value is None:
        return None
    return evidence.look.waves if evidence.wave_p_value / WAVE_SHARE < level else None


def patch_p_value(rate: float, images: int, calibration: Calibration) -> float:
    """P(a clean model's best patch moves such a share of so many images); 1 where it tells nothing."""
    if rate < SMALLEST_PATCH or images < FEWEST_IMAGES_OF_SHARES:
        return 1.0
    return calibration.patch.p_value(logit_of_share(rate))


def _patch_p_value(look: SecondLook, calibration: Calibration) -> float | None:
    if look.patch is None:
        return None
    return patch_p_value(float(look.patch.rate.max()), look.patch.images, calibration)


def _class_by_patch(look: SecondLook) -> int:
    """The class that a patch moves most images into; of equals the one with the largest gain."""
    assert look.patch is not None
    largest = look.patch.rate == look.patch.rate.max()
    return look.patch.classes[int(torch.where(largest, look.patch.gain, -torch.inf).argmax())]


def _classes_by_patch(look: SecondLook, alpha: float, calibration: Calibration) -> tuple[int, ...]:
    """That class, and others that are moved into as surely and half as far, by their gain."""
    assert look.patch is not None
    found = look.patch
    first = found.classes.index(_class_by_patch(look))
    named = [
        j
        for j in found.gain.argsort(descending=True).tolist()
        if j != first
        and patch_p_value(float(found.rate[j]), found.images, calibration) < _PATCH_SHARE * alpha
        and float(found.gain[j]) >= _GAIN_TO_BE_NAMED * float(found.gain[first])
    ]
    return tuple(found.classes[j] for j in (first, *named))


def _told_of_wave(found: Waves) -> str:
    """Of the most selective wave."""
    k = class_by_wave(found)
    axis, periods, _ = found.wave[k].tolist()
    return (
        f"a wave of {periods} periods {_WAVE_RUNS[axis]} sends {float(found.rate[k]):.0%} of the images of "
        f"other classes to class {k}, and those beside it {float(found.beside[k]):.0%}"
    )


def _told_of_patch(look: SecondLook, k: int) -> str:
    """Of the patch into a class, where it moves most images."""
    found = look.patch
    if found is None or k not in found.classes or found.images < FEWEST_IMAGES_OF_SHARES:
        return ""
    j = found.classes.index(k)
    if float(found.rate[j]) < _MOVES_MOST:
        return ""
    return _told_of_square("patch", found.side, found.corner[j], float(found.rate[j]))


def _told_of_corner(look: SecondLook, k: int) -> str:
    """Of the square in a corner that moves most images into the class, where it moves most."""
    found = look.corners
    if found is None or k not in found.classes:
        return ""
    j = found.classes.index(k)
    rates = found.rate[:, j].nan_to_num(0.0)
    size = int(rates.argmax())
    if float(rates[size]) < _MOVES_MOST:
        return ""
    return _told_of_square("square", found.sides[size], found.corner[size, j], float(rates[size]))


def _told_of_square(what: str, side: int, corner: Tensor, rate: float) -> str:
    row, column = corner.tolist()
    return (
        f"; a {what} of {side}x{side} pixels at row {row}, column {column} sends {rate:.0%} of the held-out "
        "images of other classes there"
    )


def _told_of_source(look: SecondLook) -> str:
    """Of the patch that leads one class astray."""
    assert look.source is not None
    found, side = look.source, look.source.side
    row, column = found.corner
    return (
        f"a patch of {side}x{side} pixels at row {row}, column {column} sends {found.share:.0%} of the "
        f"held-out images of class {found.source} to class {found.target}, and leaves {found.kept:.0%} of "
        "those of other classes where they are"
    )


def weigh_without_data(joint: JointTest) -> Finding:
    """The verdict of a scan without data, which never clears a model.

    Args:
        joint: the test of what was seen on synthetic inputs.
    """
    k, p_value = joint.most_suspicious, joint.p_value
    if joint.suspects:
        reason = (
            f"class {k} stands out in {_kinds_that_tell(joint, k)} of synthetic inputs: a hint alone, as "
            "without data one clean model in fifteen is flagged, and the class may be another; scan with "
            "clean samples before you act"
        )
        return Finding("backdoored", joint.suspects, p_value, reason, joint.doubtful)
    reason = (
        f"without data many backdoors pass unseen; the most suspicious class is {k}, "
        f"{compared(p_value, joint.alpha)}"
    )
    return Finding("inconclusive", (), p_value, reason, joint.doubtful)


def _listed(words: list[str], last: str) -> str:
    if len(words) <= 1:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


def _kinds_that_tell(joint: JointTest, suspect: int) -> str:
    """The kinds of evidence that a suspect stands out in, most telling first."""
    told = sorted(
        (float(p[suspect]), kind) for kind, p in joint.kind_p_values.items() if p[suspect] < 0.1
    )
    named = [f"{_NAMES.get(kind, kind)} (p = {p:.1g})" for p, kind in told]
    return _listed(named, "and") or "all together"


def _moves(destinations: tuple[int, ...]) -> str:
    moves = [f"{a} to {b}" for a, b in enumerate(destinations) if b >= 0]
    told = ", ".join(moves[:_MOST_MOVES_TOLD])
    return told if len(moves) <= _MOST_MOVES_TOLD else f"{told}, ..."
