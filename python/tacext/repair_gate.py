"""What a repair must have kept, and removed, before it is handed out.

Three questions, the cheap ones first: what accuracy was lost; whether what led into the targets
before still does; whether a thorough scan, which looks for new ways, has nothing left to say. A model
that passes has lost what was found in it; that it had nothing else is no more proven than by any scan.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from .data import DataLike
from .errors import InputError
from .input_adversary import Effects, InputAdversary
from .joint_test import moderated_p_values, shipped_calibration
from .scan_report import ScanReport
from .scanning import scan
from .second_look import reach_evidence
from .verdict import Finding, patch_p_value, weigh

# Of what the old changes and patches moved, so much may still move; a tenth of all images may in any
# model.
_MOST_LEFT = 0.5
_ALWAYS_MOVED = 0.1


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
    """

    accepted: bool
    reason: str
    report: ScanReport | None = field(repr=False)
    robust_accuracy: float


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
        seed: of the scan.
        progress: whether to show progress bars; None shows them on a terminal.
    """
    left = None if adversary is None else adversary.effects(repaired, *held_out, batch_size)
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
            "shifted latents alone were trained against, and whether the backdoor is gone nothing "
            "else tells; leave gamma at its default, give a model with gradients, or accept it unseen"
        )
    rates = zip(adversary.targets, was.moved.tolist(), left.moved.tolist(), strict=True)
    for target, old, new in rates:
        for kind, a, b in zip(("change", "patch"), old, new, strict=False):
            if b > max(_ALWAYS_MOVED, _MOST_LEFT * a):
                return no(
                    f"the {kind} that led {a:.0%} of the samples into class {target} still leads {b:.0%}"
                )
    try:
        report = scan(
            repaired,
            data,
            head=head,
            metric=before.metric,
            quantile=before.quantile,
            alpha=before.alpha,
            batch_size=batch_size,
            seed=seed,
            progress=progress,
        )
    except InputError as error:
        return no(f"it cannot be scanned again ({error})")
    seen = tuple(t for t in adversary.targets if _stood_out(t, before, adversary, report))
    accepted, reason = judge_scan(report, adversary.targets, seen, limited=limited)
    return Gate(accepted, reason, report, robust)


def judge_scan(
    report: ScanReport, targets: tuple[int, ...], seen: tuple[int, ...], *, limited: bool = False
) -> tuple[bool, str]:
    """Whether a scan of a repaired model has nothing left to say of what was repaired, and why.

    Args:
        report: of the repaired model.
        targets: the classes that were repaired.
        seen: those of them that stood out in what inputs show, before. Their norms are not asked: a latent near the class is no danger where no input comes to lie there, and neither
            a patch in front of the head nor a training that closes the way moves clean latents.
        limited: whether a patch does so. Then inputs are led as far towards the class as before, and
            what counts is how many get there: no more than get into some other class.
    """
    if limited:
        for target in seen:
            rate, others = _led(report, target)
            if rate > max(_ALWAYS_MOVED, others):
                return False, (
                    f"changes found anew lead {rate:.0%} of the samples into class {target}, and into no "
                    f"other more than {others:.0%}"
                )
    finding = _without_norms(report, seen, limited)
    found = f"a scan of the repaired model says {finding.verdict}"
    if seen and finding.verdict != report.verdict:
        found += f" of what inputs show (and {report.verdict} with the norms of what was repaired)"
    if finding.verdict == "clean":
        return True, found
    told = report.evidence is not None and not report.warnings
    suspect = report.evidence.joint.most_suspicious if report.evidence is not None else None
    if finding.verdict == "inconclusive" and told and suspect not in set(targets) - set(seen):
        of = "of another class than was repaired" if suspect not in targets else "not more"
        return True, f"{found}, {of}: {finding.reason}"
    return False, f"{found}: {finding.reason}"


def _stood_out(
    target: int, before: ScanReport, adversary: InputAdversary, after: ScanReport
) -> bool:
    """Whether changes or patches led into a target of the original as into no class of a clean model.

    So says a thorough scan of the original; where that was fast, the adversary, whose changes are
    compared with those into the other classes of the repaired model, which hardly touched them.
    """
    calibration, turn = shipped_calibration(), adversary.targets.index(target)
    patches = [(adversary.patched, turn)] if adversary.patched is not None else []
    gain, classes = adversary.found.gain, adversary.found.classes
    look = None if before.evidence is None else before.evidence.look
    if look is not None and target in look.classes:
        gain, classes = look.reach.gain, look.classes
        if look.patch is not None and target in look.patch.classes:
            patches.append((look.patch, look.patch.classes.index(target)))
    else:
        look = None if after.evidence is None else after.evidence.look
        if look is not None and target in look.classes:
            budgets = min(len(gain), len(look.reach.gain))
            mixed = look.reach.gain[:budgets].clone()
            mixed[:, look.classes.index(target)] = gain[:budgets, turn]
            gain, classes = mixed, look.classes
    by_patch = [patch_p_value(float(p.rate[j]), p.images, calibration) for p, j in patches]
    by_change = moderated_p_values(reach_evidence(gain.numpy()), calibration.kinds["reach"])
    p_value = float(np.nan_to_num(by_change[classes.index(target)], nan=1.0))
    return min([p_value, *by_patch]) < after.alpha


def _led(report: ScanReport, target: int) -> tuple[float, float]:
    """Shares of samples that a change leads into a class, and into the easiest other one."""
    look = None if report.evidence is None else report.evidence.look
    if look is None or target not in look.classes:
        return 0.0, 0.0
    rate = look.reach.rate[-1].tolist()
    own = rate.pop(look.classes.index(target))
    return own, max(rate, default=0.0)


def _without_norms(report: ScanReport, seen: tuple[int, ...], limited: bool) -> Finding:
    """The verdict of a scan that knows nothing of these classes' norms, nor, if limited, of reach."""
    told = Finding(report.verdict, report.suspects, report.p_value, report.reason)
    # What a doubt stands against stays as it is.
    if report.evidence is None or report.evidence.look is None or not seen or report.warnings:
        return told
    norm = np.array(report.test.norm, dtype=float)
    norm[list(seen)] = np.nan
    test = dataclasses.replace(report.test, norm=norm)
    if set(report.test.suspects) <= set(seen):
        test = dataclasses.replace(test, verdict="clean", suspects=())
    look = report.evidence.look
    if limited:
        gain = look.reach.gain.clone()
        gain[:, [look.classes.index(t) for t in seen if t in look.classes]] = torch.nan
        look = dataclasses.replace(look, reach=dataclasses.replace(look.reach, gain=gain))
    finding, _ = weigh(test, look, report.alpha, shipped_calibration())
    return finding
