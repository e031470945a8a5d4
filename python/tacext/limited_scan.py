"""What a scan says of a model that was repaired, with or without limits in front of classes.

Neither a limit in front of the head nor a training that closes the ways in moves clean latents: the norm
of a class stays what it was. Past a limit gains stay as well, as inputs are led towards it as far as
before. What counts is how many get there.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .errors import InputError
from .heads import Head, evaluating, latent_of, run_model
from .joint_test import shipped_calibration
from .latent_patch import PatchedHead
from .scan_report import ScanReport
from .second_look import SecondLook
from .verdict import Evidence, Finding, weigh

logger = logging.getLogger(__name__)

# So many of all images may be moved in any model.
ALWAYS_MOVED = 0.1
# The same of the 40 images that squares in corners are measured on: two standard errors more.
MOVED_FROM_CORNERS = 0.2

# So many samples tell whether a limit holds; a change is doubled so often until it leads most of them.
_ASKED = 500
_LONGER = 5


def with_limits(
    report: ScanReport,
    classes: tuple[int, ...],
    holds: Callable[[int], bool],
    *,
    trusted: bool = False,
) -> ScanReport:
    """The report of a model in front of whose classes limits stand; as it is where there are none.

    Suspects are no more than a doubt if the limits in front of all of them hold back what the norms speak
    of, and nothing else that was tried leads inputs past them. No less, either: whoever made
    the model may have put limits there that its trigger passes.

    Args:
        report: of the scan, whose norms are of latents that no limit has touched.
        classes: in front of which these stand.
        holds: whether the limit in front of a class holds its minimal perturbation back.
        trusted: whether the limits are known to be of an own repair, so that a model that nothing else
            speaks against is clean.
    """
    report = dataclasses.replace(report, limited=classes)
    behind = report.suspects
    if report.verdict != "backdoored" or not behind or not set(behind) <= set(classes):
        return report
    look = None if report.evidence is None else report.evidence.look
    if look is None and report.evidence is not None:
        return _suspected(report, "without data nothing tells whether its latent patch holds")
    holds = functools.cache(holds)
    left: Finding | None = None
    while True:
        if not all(map(holds, behind)):
            return _suspected(report, "the latent patch in front of it is not seen to hold it back")
        if look is None:
            break
        if (past := led_anew(look, behind, behind)) is not None:
            return _suspected(report, f"{past}, past the latent patch in front of it")
        left = _without(report, look, behind, limited=True)[0]
        if left.verdict != "backdoored":
            break
        more = tuple(k for k in left.suspects if k not in behind)
        if not more or not set(more) <= set(classes):
            return report
        behind += more
    tried = ""
    if look is not None and look.reach is not None:
        tried = ", and lets no more through than elsewhere"
    reason = f"{report.reason}; but the latent patch in front of it holds that back{tried}"
    if trusted and left is not None and left.verdict == "clean":
        reason = f"{left.reason}, but in front of your latent patch, which holds it back: {report.reason}"
        return dataclasses.replace(
            report, verdict="clean", suspects=(), doubtful=(), p_value=left.p_value, reason=reason
        )
    if not trusted:
        reason += (
            ": fine if the patch is of a repair that you made, else take the model for backdoored"
        )
    doubtful = (*behind, *report.doubtful)
    if left is not None and left.verdict != "clean":
        reason += f"; beside that {left.reason}"
        doubtful += left.doubtful
    return dataclasses.replace(
        report,
        verdict="inconclusive",
        suspects=(),
        doubtful=tuple(dict.fromkeys(doubtful)),
        reason=reason,
    )


def not_cleared(report: ScanReport) -> ScanReport:
    """The report of a model with a latent patch of unknown origin, which is not called clean.

    So it is told as well where the patch is why a scan is inconclusive: then it would be of a trusted one, too.
    """
    reason = (
        f"{report.reason}; but the model has a latent patch, which could lead inputs into a class as well as "
        "keep them out"
    )
    if report.verdict == "inconclusive" and report.test.hidden:
        return dataclasses.replace(report, reason=reason)
    if report.verdict != "clean":
        return report
    reason += ": if the patch is of a repair that you made, scan with trust_patch (--trust-patch)"
    return dataclasses.replace(report, verdict="inconclusive", reason=reason)


def hidden_by_patch(norm: npt.NDArray[np.float64], quantile: float) -> str:
    """Why norms in front of a latent patch cannot be compared, of which at least one is 0."""
    stuck = int(np.flatnonzero(norm == 0)[0])
    samples = "every sample" if quantile == 1 else "nearly every sample"
    return (
        f"without its latent patch the model would take {samples} for class {stuck}, so that the norms, "
        "which are of latents in front of it, cannot be compared"
    )


def _suspected(report: ScanReport, why: str) -> ScanReport:
    return dataclasses.replace(report, reason=f"{report.reason}; {why}")


def holds_back(
    model: nn.Module,
    patch: PatchedHead,
    samples: tuple[Tensor, Tensor],
    perturbation: Tensor,
    batch_size: int,
    target: int,
) -> bool:
    """Whether a latent patch keeps latents out of a class that its minimal perturbation leads there.

    Of a quantile below 1 that is shorter than what leads most of them, and is made long enough here.

    Args:
        model: with the patch.
        patch: of the model.
        samples: clean inputs [N, ...] and labels [N].
        perturbation: float64 [C, D], of the latents in front of the patch.
        batch_size: inputs in a pass, at most.
        target: the class.
    """
    inputs, change = samples[0][samples[1] != target][:_ASKED], perturbation[target]
    try:
        for _ in range(_LONGER):
            led, past = _led_and_past(model, patch, inputs, change, batch_size, target)
            if 2 * led > len(inputs):
                return past <= ALWAYS_MOVED * len(inputs)
            change = 2 * change
    except InputError as error:
        logger.info("scan: the latent patch could not be asked (%s)", error)
    return False


def _led_and_past(
    model: nn.Module,
    patch: PatchedHead,
    inputs: Tensor,
    change: Tensor,
    batch_size: int,
    target: int,
) -> tuple[int, int]:
    """How many latents, changed in front of the patch, its head alone takes for a class, and the model does.

    What is not finite has got past.
    """
    led = past = 0
    behind = Head("", patch.head)

    def shifted(_module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        nonlocal led
        latent = given[0]
        moved = latent + change.to(latent).view(1, -1, *(1,) * (latent.dim() - 2))
        led += int((behind.logits(latent_of(moved)).argmax(1) == target).sum())
        return (moved,)

    handle = patch.register_forward_pre_hook(shifted)
    try:
        with torch.no_grad(), evaluating(model):
            for batch in inputs.split(batch_size):
                logits = run_model(model, batch, "scan", check_finite=False)
                broken = ~logits.isfinite().all(1)
                past += int(((logits.argmax(1) == target) | broken).sum())
    finally:
        handle.remove()
    return led, past


def led_anew(look: SecondLook, targets: tuple[int, ...], limited: tuple[int, ...]) -> str | None:
    """What is wrong with the samples that new changes and patches lead into the targets.

    A patch or a square in a corner may lead no more there than into the easiest other class, a change
    past a limit no more than into the usual one, at any budget; or a tenth, of squares a fifth.

    Args:
        look: of the model that was repaired, or that came with limits.
        targets: the classes that were repaired, or the suspects behind limits.
        limited: those of them that a limit keeps inputs out of.
    """
    patch, reach = look.patch, look.reach
    for target in targets:
        if target not in look.classes:
            return f"class {target} was not looked at again"
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
        others = [j for j, k in enumerate(look.classes) if k not in targets]
        assert reach is not None
        own = reach.rate[:, look.classes.index(target)]
        usual = reach.rate[:, others].median(dim=1).values if others else torch.zeros_like(own)
        beyond = own > usual.clamp(min=ALWAYS_MOVED)
        if bool(beyond.any()):
            j = int((own - usual.clamp(min=ALWAYS_MOVED)).argmax())
            return (
                f"a change found anew leads {float(own[j]):.0%} of the samples into class {target}, and "
                f"{float(usual[j]):.0%} into the usual one"
            )
    return None


def without_norms(
    report: ScanReport, seen: tuple[int, ...], limited: bool
) -> tuple[Finding, Evidence | None]:
    """The verdict of a scan that knows nothing of these classes' norms, nor, if limited, of reach."""
    told = Finding(report.verdict, report.suspects, report.p_value, report.reason, report.doubtful)
    # What a doubt stands against stays as it is.
    if report.evidence is None or report.evidence.look is None or not seen or report.warnings:
        return told, report.evidence
    return _without(report, report.evidence.look, seen, limited)


def _without(
    report: ScanReport, look: SecondLook, seen: tuple[int, ...], limited: bool
) -> tuple[Finding, Evidence]:
    norm, balanced = np.array(report.test.norm, dtype=float), report.test.balanced
    norm[list(seen)] = np.nan
    if balanced is not None:
        balanced = balanced.copy()
        balanced[list(seen)] = np.nan
    test = dataclasses.replace(report.test, norm=norm, balanced=balanced)
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
