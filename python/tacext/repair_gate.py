"""What a repair must have kept, and removed, before it is handed out.

Three questions, the cheap ones first: what accuracy was lost; whether what led into the targets
before still does; whether a thorough scan, which looks for new ways, has nothing left to say. A model
that passes has lost what was found in it; that it had nothing else is no more proven than by any scan.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from .corner_patches import CornerPatches
from .data import DataLike
from .errors import InputError
from .input_adversary import FEWEST_LED, Effects, InputAdversary
from .joint_test import moderated_p_values, shipped_calibration
from .limited_scan import ALWAYS_MOVED, MOVED_FROM_CORNERS, led_anew, without_norms
from .repair_methods import count_right
from .scan_report import ScanReport
from .scanning import scan_looking_at
from .second_look import SecondLook, corner_evidence, reach_evidence
from .verdict import SOURCE_SHARE, Evidence, Finding, patch_p_value, telling_waves
from .waves import class_by_wave, wave_pattern

# A p-value above this leaves no doubt of a patch or a shuffle.
_DOUBT = 0.3

# An outcome is scanned at this alpha at least: a scan that was to raise fewer false alarms than usual
# would also overlook more of what a repair has left.
LEAST_ALPHA = 0.01

# Of what the old changes and patches moved, so much may still move.
_MOST_LEFT = 0.5


@dataclass(frozen=True)
class Gate:
    """Whether a repaired model is accepted.

    Attributes:
        accepted: whether it kept its accuracy and the backdoor was seen to be gone.
        reason: in one sentence.
        report: of the thorough scan of the repaired model; None where something had decided already,
            or where nothing was asked for.
        robust_accuracy: on held-out samples that carry what led into the targets, a mean over targets
            and ways; NaN where it was not measured.
        unseen: targets into which nothing was seen to lead inputs. A limit in front of them is
            let through all the same, as it can touch no other inputs than those taken for them.
        norms_alone: targets whose norms, which a limit cannot move, are all that stands against a
            limit in front of them.
    """

    accepted: bool
    reason: str
    report: ScanReport | None = field(repr=False)
    robust_accuracy: float
    unseen: tuple[int, ...] = ()
    norms_alone: tuple[int, ...] = ()


def check_repair(
    repaired: nn.Module,
    data: DataLike,
    held_out: tuple[Tensor, Tensor],
    before: ScanReport,
    adversary: InputAdversary | None,
    was: Effects | None,
    correct: tuple[int, int],
    max_accuracy_drop: float,
    *,
    head: str,
    limited: bool,
    batch_size: int,
    blind: str = "",
    seed: int = 0,
    progress: bool | None = None,
) -> Gate:
    """Judges a repaired model.

    Args:
        repaired: the model after, in evaluation mode.
        data: clean samples for a scan.
        held_out: inputs [N, ...] and labels [N] that were not trained on.
        before: the scan of the model before.
        adversary: what led into the targets before, and was trained against; None where it was not.
            Norms alone tell nothing then: longer perturbations are what latents were trained for.
        was: its effects on the model before, on the held-out samples.
        correct: how many held-out samples the model got right before and after.
        max_accuracy_drop: what may be lost.
        head: the name of its last layer.
        limited: whether a limit keeps inputs out of the targets, and the way there is as it was.
        batch_size: inputs in a pass, at most.
        blind: why nothing could be sought that leads into the targets, if that was tried.
        seed: of the scan.
        progress: whether to show progress bars; None shows them on a terminal.
    """
    try:
        left = None if adversary is None else adversary.effects(repaired, *held_out, batch_size)
    except InputError as error:  # logits that are not finite
        return Gate(
            False, f"it cannot be run on what led into the targets ({error})", None, math.nan
        )
    robust = math.nan if left is None else float(left.right.mean())

    def no(reason: str, report: ScanReport | None = None) -> Gate:
        return Gate(False, reason, report, robust)

    drop = (correct[0] - correct[1]) / len(held_out[1])
    if drop > max_accuracy_drop + 1e-9:
        return no(
            f"it loses {drop:.2%} of accuracy on held-out samples, and {max_accuracy_drop:.2%} is allowed"
        )
    if adversary is None or was is None or left is None:
        return no(
            "shifted latents alone were known to lead there, so that nothing tells whether the backdoor is gone"
            + (f" ({blind})" if blind else "; leave gamma at its default, or accept it unseen")
        )
    unseen = set[int]()
    for target, moved in zip(adversary.targets, was.moved.amax(1).tolist(), strict=True):
        if moved < FEWEST_LED and target not in before.suspects:
            unseen.add(target)
            if limited:
                continue
            return no(
                f"class {target} was no suspect, and nothing was found that led into it before (at most "
                f"{moved:.0%} of the samples), so that nothing shows whether it still does"
            )
    rates = zip(adversary.targets, was.moved.tolist(), left.moved.tolist(), strict=True)
    for target, old, new in rates:
        for kind, a, b in zip(("change", "patch"), old, new, strict=False):
            if target not in unseen and b > max(ALWAYS_MOVED, _MOST_LEFT * a):
                return no(
                    f"the {kind} that led {a:.0%} of the samples into class {target} still leads {b:.0%}"
                )
    still = (
        _still_led_by_source(repaired, held_out, before, adversary.targets, batch_size)
        or _still_led_by_wave(repaired, held_out, before, adversary, batch_size)
        or _still_led_from_corner(repaired, held_out, before, adversary.targets, batch_size)
    )
    if still is not None:
        return no(still)
    try:
        report = scan_looking_at(
            adversary.targets,
            repaired,
            data,
            head=head,
            metric=before.metric,
            quantile=before.quantile,
            alpha=max(before.alpha, LEAST_ALPHA),
            batch_size=batch_size,
            trust_patch=True,
            for_gate=True,
            seed=seed,
            progress=progress,
        )
    except InputError as error:
        return no(f"it cannot be scanned again ({error})")
    seen = tuple(t for t in adversary.targets if _stood_out(t, before, adversary, report))
    for target in adversary.targets:
        if target not in before.suspects and target not in seen:
            unseen.add(target)
            if limited:
                continue
            return no(
                f"class {target} was no suspect, and nothing led into it before as into no class of a "
                "clean model, so that there is nothing to see that a repair has changed",
                report,
            )
    asked = set(adversary.targets) - set(seen) - unseen
    try:
        accepted, reason = judge_scan(report, adversary.targets, seen, limited=limited)
        alone = limited and not accepted and bool(asked)
        if alone:
            alone = judge_scan(report, adversary.targets, adversary.targets, limited=True)[0]
    except InputError as error:
        return no(f"what a scan of it shows cannot be judged ({error})", report)
    norms_alone = tuple(sorted(asked)) if alone else ()
    return Gate(accepted, reason, report, robust, tuple(sorted(unseen)), norms_alone)


def _still_led_by_source(
    repaired: nn.Module,
    held_out: tuple[Tensor, Tensor],
    before: ScanReport,
    targets: tuple[int, ...],
    batch_size: int,
) -> str | None:
    """What is wrong where the patch that led one class into a target before still does."""
    look = None if before.evidence is None else before.evidence.look
    found = None if look is None else look.source
    if found is None or found.target not in targets or found.share <= ALWAYS_MOVED:
        return None
    own = held_out[0][held_out[1] == found.source]
    if not len(own):
        return None
    share = _share_led(repaired, own, found.corner, found.pattern, found.target, batch_size)
    if share <= max(ALWAYS_MOVED, _MOST_LEFT * found.share):
        return None
    return (
        f"the patch that led {found.share:.0%} of the samples of class {found.source} into class "
        f"{found.target} still leads {share:.0%}"
    )


def _still_led_by_wave(
    repaired: nn.Module,
    held_out: tuple[Tensor, Tensor],
    before: ScanReport,
    adversary: InputAdversary,
    batch_size: int,
) -> str | None:
    """What is wrong where the wave that told of a backdoor still leads into the target."""
    found = telling_waves(before.evidence, _DOUBT)
    if found is None or (k := class_by_wave(found)) not in adversary.targets:
        return None
    others = held_out[0][held_out[1] != k].float()
    wave = wave_pattern(adversary.box, *found.wave[k].tolist())
    led = adversary.box.clamp(others + wave.to(others.device))
    reached = torch.full((len(led),), k)
    share = count_right(repaired, led, reached, batch_size) / max(1, len(led))
    rate = float(found.rate[k])
    if share <= max(ALWAYS_MOVED, _MOST_LEFT * rate):
        return None
    return f"the wave that led {rate:.0%} of the samples into class {k} still leads {share:.0%}"


def _share_led(
    repaired: nn.Module,
    images: Tensor,
    place: Sequence[int],
    pattern: Tensor,
    target: int,
    batch_size: int,
) -> float:
    """The share of images [N, ...] that a square at this place sends into the target; 0 of none."""
    (row, column), side = place, pattern.shape[-1]
    led = images.clone()
    led[..., row : row + side, column : column + side] = pattern.to(led)
    reached = torch.full((len(led),), target)
    return count_right(repaired, led, reached, batch_size) / max(1, len(led))


def _still_led_from_corner(
    repaired: nn.Module,
    held_out: tuple[Tensor, Tensor],
    before: ScanReport,
    targets: tuple[int, ...],
    batch_size: int,
) -> str | None:
    """What is wrong where a square that told of a backdoor still leads into its target."""
    look = None if before.evidence is None else before.evidence.look
    found = None if look is None else look.corners
    if found is None:
        return None
    sizes = range(len(found.sides))
    led = functools.cache(
        functools.partial(_share_led_from_corner, repaired, held_out, found, batch_size)
    )
    for target in targets:
        p_value = _corner_p_value(found, target)
        if p_value is None or p_value >= _DOUBT:
            continue
        for size in sizes:
            rate, share = float(found.rate[size, found.classes.index(target)]), led(size, target)
            if share <= max(ALWAYS_MOVED, _MOST_LEFT * rate):
                continue
            # So many as squares lead into a class that nothing is wrong with tell of no backdoor.
            others = (led(i, k) for i in sizes for k in found.classes if k not in targets)
            if share > MOVED_FROM_CORNERS or share > max(others, default=0.0):
                return (
                    f"the square in a corner that led {rate:.0%} of the samples into class {target} "
                    f"still leads {share:.0%}"
                )
    return None


def _share_led_from_corner(
    repaired: nn.Module,
    held_out: tuple[Tensor, Tensor],
    found: CornerPatches,
    batch_size: int,
    size: int,
    target: int,
) -> float:
    """The share of the samples of other classes that the square of a size for the target sends into it."""
    j, images = found.classes.index(target), held_out[0][held_out[1] != target]
    place, pattern = found.corner[size, j].tolist(), found.pattern[size][j]
    return _share_led(repaired, images, place, pattern, target, batch_size)


def _corner_p_value(found: CornerPatches, target: int) -> float | None:
    """Of the squares of a class among those of all, corrected for the choice; None where it is unknown."""
    if target not in found.classes:
        return None
    p_values = moderated_p_values(
        corner_evidence(found.gain.numpy()), shipped_calibration().kinds["corner"]
    )
    p_value = float(p_values[found.classes.index(target)])
    return None if np.isnan(p_value) else min(1.0, len(p_values) * p_value)


def judge_scan(
    report: ScanReport, targets: tuple[int, ...], seen: tuple[int, ...], *, limited: bool = False
) -> tuple[bool, str]:
    """Whether a scan of a repaired model has nothing left to say of what was repaired, and why.

    Args:
        report: of the repaired model.
        targets: the classes that were repaired.
        seen: those of them that stood out in what inputs show, before. Their norms are not asked: a
            latent near the class is no danger where no input comes to lie there, and neither a patch
            in front of the head nor a training that closes the way moves clean latents.
        limited: whether a limit does so. Then inputs are led as far towards the class as before, and
            what counts is how many get there.
    """
    look = None if report.evidence is None else report.evidence.look
    if look is None or look.reach is None:
        return False, f"a scan of the repaired model could not look for new ways: {report.reason}"
    wrong = led_anew(look, targets, seen if limited else ())
    if wrong:
        return False, wrong
    finding, evidence = without_norms(report, seen, limited)
    found = f"a scan of the repaired model says {finding.verdict}"
    if seen and finding.verdict != report.verdict:
        found += f" of what inputs show (and {report.verdict} with the norms of what was repaired)"
    if finding.verdict == "clean":
        return True, found
    doubted = _classes_in_doubt(finding, evidence, look, report.num_classes, targets)
    told = finding.verdict == "inconclusive" and not report.warnings
    if told and not doubted & set(targets):
        return True, f"{found}, of other classes than were repaired: {finding.reason}"
    return False, f"{found}: {finding.reason}"


def _classes_in_doubt(
    finding: Finding,
    evidence: Evidence | None,
    look: SecondLook,
    num_classes: int,
    targets: tuple[int, ...],
) -> set[int]:
    """Those that an inconclusive verdict may be about."""
    if evidence is None:
        return set(range(num_classes))
    # A shuffle is about all classes at once; that of a few targets has nothing to do with them.
    if _in_doubt(evidence.shuffle_p_value) and 2 * len(targets) > num_classes:
        return set(range(num_classes))
    # All classes that the scan names count, and not only the first of them.
    doubted = {evidence.joint.most_suspicious, *evidence.joint.doubtful, *finding.doubtful}
    p_value = evidence.source_p_value
    if look.source is not None and p_value is not None and _in_doubt(p_value / SOURCE_SHARE):
        doubted.add(look.source.target)
    if (found := telling_waves(evidence, _DOUBT)) is not None:
        doubted.add(class_by_wave(found))
    if look.patch is not None and _in_doubt(evidence.patch_p_value):
        doubted.add(look.patch.classes[int(look.patch.rate.argmax())])
    return doubted


def _in_doubt(p_value: float | None) -> bool:
    return p_value is not None and p_value < _DOUBT


def _stood_out(
    target: int, before: ScanReport, adversary: InputAdversary, after: ScanReport
) -> bool:
    """Whether changes, patches or a wave led into a target of the original as into no class of a clean model.

    So says a thorough scan of the original; where that was fast, the adversary, whose changes are
    compared with those into the other classes of the repaired model, which hardly touched them.
    """
    found = telling_waves(before.evidence, before.alpha)
    if found is not None and class_by_wave(found) == target:
        return True
    calibration, turn = shipped_calibration(), adversary.targets.index(target)
    patches = [(adversary.patched, turn)] if adversary.patched is not None else []
    gain, classes = adversary.found.gain, adversary.found.classes
    look = None if before.evidence is None else before.evidence.look
    in_corners: list[float] = []
    if look is not None and look.corners is not None:
        p_value = _corner_p_value(look.corners, target)
        in_corners = [] if p_value is None else [p_value]
    if look is not None and look.reach is not None and target in look.classes:
        gain, classes = look.reach.gain, look.classes
        if look.patch is not None and target in look.patch.classes:
            patches.append((look.patch, look.patch.classes.index(target)))
    else:
        look = None if after.evidence is None else after.evidence.look
        if look is not None and look.reach is not None and target in look.classes:
            budgets = min(len(gain), len(look.reach.gain))
            mixed = look.reach.gain[:budgets].clone()
            mixed[:, look.classes.index(target)] = gain[:budgets, turn]
            gain, classes = mixed, look.classes
    # The law of patches is that of the best of all classes; reach is corrected for the choice here.
    by_patch = [patch_p_value(float(p.rate[j]), p.images, calibration) for p, j in patches]
    by_change = moderated_p_values(reach_evidence(gain.numpy()), calibration.kinds["reach"])
    p_value = len(classes) * float(np.nan_to_num(by_change[classes.index(target)], nan=1.0))
    kinds = 2 + len(in_corners)
    return kinds * min([p_value, *by_patch, *in_corners]) < after.alpha
