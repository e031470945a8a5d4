"""What a repair must have kept, and removed, before it is handed out.

Three questions, the cheap ones first: what accuracy was lost; whether what led into the targets
before still does; whether a thorough scan, which looks for new ways, has nothing left to say. A model
that passes has lost what was found in it; that it had nothing else is no more proven than by any scan.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from .data import DataLike
from .errors import InputError
from .input_adversary import InputAdversary
from .scan_report import ScanReport
from .scanning import scan

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
    """

    accepted: bool
    reason: str
    report: ScanReport | None = field(repr=False)


def check_repair(
    original: nn.Module,
    repaired: nn.Module,
    data: DataLike,
    held_out: tuple[Tensor, Tensor],
    before: ScanReport,
    adversary: InputAdversary | None,
    correct: tuple[int, int],
    max_accuracy_drop: float,
    *,
    head: str,
    batch_size: int,
    seed: int = 0,
    progress: bool | None = None,
) -> Gate:
    """Judges a repaired model.

    Args:
        original: the model before.
        repaired: the model after, both in evaluation mode.
        data: clean samples for a scan.
        held_out: inputs [N, ...] and labels [N] that were not trained on.
        before: the scan of the model before.
        adversary: what led into the targets before, and was trained against; None where it was not.
            Norms alone tell nothing then: longer perturbations are what latents were trained for.
        correct: how many held-out samples the model got right before and after.
        max_accuracy_drop: what may be lost.
        head: the name of its last layer.
        batch_size: inputs in a pass, at most.
        seed: of the scan.
        progress: whether to show progress bars; None shows them on a terminal.
    """
    drop = (correct[0] - correct[1]) / len(held_out[1])
    if drop > max_accuracy_drop + 1e-9:
        reason = f"it loses {drop:.2%} of accuracy on held-out samples, and {max_accuracy_drop:.2%} is allowed"
        return Gate(False, reason, None)
    if adversary is None:
        reason = (
            "shifted latents alone were trained against, and whether the backdoor is gone nothing "
            "else tells; leave gamma at its default, give a model with gradients, or accept it unseen"
        )
        return Gate(False, reason, None)
    was, left = (adversary.moved(m, *held_out, batch_size) for m in (original, repaired))
    for target, old, new in zip(adversary.targets, was.tolist(), left.tolist(), strict=True):
        for kind, a, b in zip(("change", "patch"), old, new, strict=False):
            if b > max(_ALWAYS_MOVED, _MOST_LEFT * a):
                reason = f"the {kind} that led {a:.0%} of the samples into class {target} still leads {b:.0%}"
                return Gate(False, reason, None)
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
        return Gate(False, f"it cannot be scanned again ({error})", None)
    return _gate_of_scan(report, adversary.targets)


def _gate_of_scan(report: ScanReport, targets: tuple[int, ...]) -> Gate:
    found = f"a scan of the repaired model says {report.verdict}"
    if report.verdict == "clean":
        return Gate(True, found, report)
    told = report.evidence is not None and not report.warnings
    suspect = report.evidence.joint.most_suspicious if report.evidence is not None else None
    if report.verdict == "inconclusive" and told and suspect not in targets:
        return Gate(True, f"{found}, of another class than was repaired: {report.reason}", report)
    return Gate(False, f"{found}: {report.reason}", report)
