"""What a scan says of a model that was repaired, with or without limits in front of classes.

Neither a limit in front of the head nor a training that closes the ways in moves clean latents: the norm
of a class stays what it was. Past a limit gains stay as well, as inputs are led towards it as far as
before. What counts is how many get there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from .errors import InputError
from .heads import Head, evaluating, latent_of, run_model
from .joint_test import shipped_calibration
from .latent_patch import PatchedHead
from .scan_report import ScanReport
from .second_look import SecondLook
from .verdict import Evidence, Finding, weigh

# So many of all images may be moved in any model.
ALWAYS_MOVED = 0.1
# The same of the 40 images that squares in corners are measured on: two standard errors more.
MOVED_FROM_CORNERS = 0.2

# So many samples tell whether a limit holds.
_ASKED = 500


def with_limits(
    report: ScanReport, classes: tuple[int, ...], holds: Callable[[int], bool]
) -> ScanReport:
    """The report of a model in front of whose classes limits stand; as it is where there are none.

    Suspects are no more than a doubt if the limits in front of all of them hold back what the norms speak
    of, and nothing else that was tried leads inputs past them. No less, either: whoever made
    the model may have put limits there that its trigger passes.

    Args:
        report: of the scan, which sees latents behind the limits.
        classes: in front of which these stand.
        holds: whether the limit in front of a class holds its minimal perturbation back.
    """
    report = dataclasses.replace(report, limited=classes)
    behind = report.suspects
    if report.verdict != "backdoored" or not behind or not set(behind) <= set(classes):
        return report
    look = None if report.evidence is None else report.evidence.look
    if look is None and report.evidence is not None:
        return _suspected(report, "without data nothing tells whether its latent patch holds")
    while True:
        if not all(map(holds, behind)):
            return _suspected(report, "the latent patch in front of it does not hold it back")
        if look is None:
            break
        if (past := led_anew(look, behind, behind)) is not None:
            return _suspected(report, f"{past}, past the latent patch in front of it")
        finding = _without(report, look, behind, limited=True)[0]
        if finding.verdict != "backdoored":
            break
        more = tuple(k for k in finding.suspects if k not in behind)
        if not more or not set(more) <= set(classes):
            return report
        behind += more
    return dataclasses.replace(
        report,
        verdict="inconclusive",
        suspects=(),
        doubtful=(*behind, *(k for k in report.doubtful if k not in behind)),
        reason=f"{report.reason}; but the latent patch in front of it holds, and lets no more through than "
        "elsewhere: fine if the patch is of a repair that you made, else take the model for backdoored",
    )


def _suspected(report: ScanReport, why: str) -> ScanReport:
    return dataclasses.replace(report, reason=f"{report.reason}; {why}")


def patch_in_front(model: nn.Module, head: str) -> PatchedHead | None:
    """The latent patch in front of the head of this name; None where there is none, or elsewhere."""
    module = model.get_submodule(head)
    patches = (m for m in model.modules() if isinstance(m, PatchedHead))
    return next((patch for patch in patches if patch.head is module), None)


def holds_back(
    model: nn.Module,
    patch: PatchedHead,
    samples: tuple[Tensor, Tensor],
    perturbation: Tensor,
    batch_size: int,
    target: int,
) -> bool:
    """Whether a latent patch keeps latents out of a class that its minimal perturbation leads there.

    Args:
        model: with the patch.
        patch: of the model.
        samples: clean inputs [N, ...] and labels [N].
        perturbation: float64 [C, D], of the latents in front of the head.
        batch_size: inputs in a pass, at most.
        target: the class.
    """
    inputs = samples[0][samples[1] != target][:_ASKED]
    change, behind = perturbation[target], Head("", patch.head)
    led, past = 0, 0

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
    except InputError:
        return False
    finally:
        handle.remove()
    return led > len(inputs) // 2 and past <= ALWAYS_MOVED * len(inputs)


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
