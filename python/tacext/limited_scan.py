"""What a scan says of a model that was repaired, with or without limits in front of classes.

Neither a limit in front of the head nor a training that closes the ways in moves clean latents: the norm
of a class stays what it was. Past a limit gains stay as well, as inputs are led towards it as far as
before. What counts is how many get there.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from .joint_test import shipped_calibration
from .scan_report import ScanReport
from .second_look import SecondLook
from .verdict import Evidence, Finding, weigh

# So many of all images may be moved in any model.
ALWAYS_MOVED = 0.1
# The same of the 40 images that squares in corners are measured on: two standard errors more.
MOVED_FROM_CORNERS = 0.2


def with_limits(report: ScanReport, classes: tuple[int, ...]) -> ScanReport:
    """The report of a model in front of whose classes limits stand; as it is where there are none.

    A suspect that norms and gains alone make, while nothing that was tried leads inputs past its limit,
    is no more than a doubt. No less, either: whoever made the model may have put one there that
    holds nothing back.
    """
    report = dataclasses.replace(report, limited=classes)
    behind = bool(report.suspects) and set(report.suspects) <= set(classes)
    if report.verdict != "backdoored" or not behind:
        return report
    if report.evidence is not None:
        look = report.evidence.look
        if look is None or led_anew(look, classes, classes) is not None:
            return report
        if _without(report, look, classes, limited=True)[0].verdict == "backdoored":
            return report
    tried = "" if report.evidence is None else ", and nothing that was tried leads inputs past it"
    return dataclasses.replace(
        report,
        verdict="inconclusive",
        suspects=(),
        doubtful=(*report.suspects, *report.doubtful),
        reason=f"{report.reason}; but that is behind a latent patch{tried}: clean, if the patch is of a repair "
        "that you made",
    )


def led_anew(look: SecondLook, targets: tuple[int, ...], limited: tuple[int, ...]) -> str | None:
    """What is wrong with the samples that new changes and patches lead into the targets.

    A patch or a square in a corner may lead no more there than into the easiest other class, a change
    past a limit no more than into the usual one, at any budget; or a tenth, of squares a fifth.

    Args:
        look: of the repaired model.
        targets: the classes that were repaired.
        limited: those that a limit keeps inputs out of.
    """
    patch, reach = look.patch, look.reach
    for target in targets:
        if patch is not None and target in patch.classes:
            rate = float(patch.rate[patch.classes.index(target)])
            rest = [
                float(r) for k, r in zip(patch.classes, patch.rate, strict=True) if k not in targets
            ]
            if rate > max(ALWAYS_MOVED, max(rest, default=0.0)):
                return f"a patch found anew leads {rate:.0%} of the samples into class {target}"
        if look.corners is not None and target in look.corners.classes:
            rates = look.corners.rate.nan_to_num(0.0).amax(0).tolist()
            rest = [r for k, r in zip(look.corners.classes, rates, strict=True) if k not in targets]
            rate = rates[look.corners.classes.index(target)]
            if rate > max(MOVED_FROM_CORNERS, max(rest, default=0.0)):
                return f"a square in a corner found anew leads {rate:.0%} of the samples into class {target}"
    for target in limited if reach is not None else ():
        if target not in look.classes:
            return f"class {target} was not looked at again"
        others = [j for j, k in enumerate(look.classes) if k not in targets]
        assert reach is not None
        own = reach.rate[:, look.classes.index(target)]
        usual = reach.rate[:, others].median(dim=1).values if others else torch.zeros_like(own)
        beyond = own > usual.clamp(min=ALWAYS_MOVED)
        if bool(beyond.any()):
            j = int((own - usual).argmax())
            return (
                f"a change found anew leads {float(own[j]):.0%} of the samples into class {target}, and "
                f"{float(usual[j]):.0%} into the usual one"
            )
    return None


def without_norms(
    report: ScanReport, seen: tuple[int, ...], limited: bool
) -> tuple[Finding, Evidence | None]:
    """The verdict of a scan that knows nothing of these classes' norms, nor, if limited, of reach."""
    told = Finding(report.verdict, report.suspects, report.p_value, report.reason)
    # What a doubt stands against stays as it is.
    if report.evidence is None or report.evidence.look is None or not seen or report.warnings:
        return told, report.evidence
    return _without(report, report.evidence.look, seen, limited)


def _without(
    report: ScanReport, look: SecondLook, seen: tuple[int, ...], limited: bool
) -> tuple[Finding, Evidence]:
    norm = np.array(report.test.norm, dtype=float)
    norm[list(seen)] = np.nan
    test = dataclasses.replace(report.test, norm=norm)
    if set(report.test.suspects) <= set(seen):
        test = dataclasses.replace(test, verdict="clean", suspects=())
    unknown = [look.classes.index(t) for t in seen if t in look.classes]
    if limited and look.reach is not None:
        gain, rate = look.reach.gain.clone(), look.reach.rate.clone()
        gain[:, unknown] = rate[:, unknown] = torch.nan
        reach = dataclasses.replace(look.reach, gain=gain, rate=rate)
        look = dataclasses.replace(look, reach=reach)
    if limited and look.corners is not None:
        gain = look.corners.gain.clone()
        gain[:, unknown] = torch.nan
        look = dataclasses.replace(look, corners=dataclasses.replace(look.corners, gain=gain))
    return weigh(test, look, report.alpha, shipped_calibration())
