"""What a repair must have kept, and removed, before it is handed out."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, nn

from .scan_report import ScanReport
from .scanning import scan


@dataclass(frozen=True)
class Gate:
    """Whether a repaired model is accepted.

    Attributes:
        accepted: whether it kept its accuracy and lost the suspects.
        reason: in one sentence.
        report: of the scan of the repaired model; None where the accuracy had decided already, or
            where nothing was asked for.
    """

    accepted: bool
    reason: str
    report: ScanReport | None = field(repr=False)


def check_repair(
    repaired: nn.Module,
    samples: tuple[Tensor, Tensor],
    before: ScanReport,
    targets: tuple[int, ...],
    accuracy_drop: float,
    max_accuracy_drop: float | None,
    *,
    head: str,
    progress: bool | None = None,
) -> Gate:
    """Judges a repaired model: first by its accuracy, then by another scan like the first.

    Args:
        repaired: the model, in evaluation mode.
        samples: clean inputs [N, ...] and labels [N].
        before: the scan of the model before.
        targets: the classes that were repaired.
        accuracy_drop: on held-out samples.
        max_accuracy_drop: what may be lost; None accepts whatever came out, unseen.
        head: the name of its last layer.
        progress: whether to show progress bars; None shows them on a terminal.

    Raises:
        InputError: as `scan`.
    """
    if max_accuracy_drop is None:
        return Gate(True, "accepted unseen, as asked for", None)
    if accuracy_drop > max_accuracy_drop:
        reason = (
            f"it loses {accuracy_drop:.1%} of accuracy on held-out samples, and "
            f"{max_accuracy_drop:.1%} is allowed"
        )
        return Gate(False, reason, None)
    report = scan(
        repaired,
        samples,
        head=head,
        metric=before.metric,
        quantile=before.quantile,
        alpha=before.alpha,
        depth=before.depth,
        progress=progress,
    )
    left = [k for k in report.suspects if k in targets]
    if left:
        names = ", ".join(map(str, left))
        return Gate(False, f"a scan still finds class {names}: {report.reason}", report)
    return Gate(True, f"a scan of the repaired model says {report.verdict}", report)
