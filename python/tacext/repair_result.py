"""The outcome of a repair: what was tried, what came of it, and what the caller should know."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from .doubts import sensible_accuracy
from .finetuning import EpochLosses
from .pruning import PruneHistory
from .repair_methods import Method
from .repair_settings import RepairSettings
from .scan_report import ScanReport

NOTABLE_LOSS = 0.05  # of accuracy; a repair that costs more says so
_NOTABLE_CONFUSION = 0.15  # of accuracy under what led into the targets, likewise

# Clean inputs are what a model is for, and others the exception.
_CLEAN_COUNTS = 3.0


@dataclass(frozen=True, eq=False)
class Attempt:
    """One method that was tried, and what came of it.

    Attributes:
        method: "patch", "prune" or "finetune".
        accepted: whether the gate let it through.
        reason: why or why not, in one sentence.
        accuracy_after: on the held-out clean samples; NaN where the method failed.
        robust_accuracy: on those of them that carry what led into the targets before, a mean over
            changes and patches; NaN where there was nothing.
        report_after: the scan of the repaired model; None where there was none.
        seconds: of the repair, without the gate.
        limits_added: whether "auto" put limits in front of what was pruned or trained; the accuracies are
            with them, the scan without.
        unseen: targets into which nothing was seen to lead inputs, so that nothing shows that it no
            longer does: a patch in front of them is a precaution.
        norms_alone: targets whose norms are all that stands against a patch in front of them, which
            cannot move them; "auto" hands it out as a precaution where it has nothing better.
        targets: the classes that it was to repair; a patch may be tried again in front of more.
    """

    method: Method
    accepted: bool
    reason: str
    accuracy_after: float
    robust_accuracy: float
    report_after: ScanReport | None = field(repr=False)
    seconds: float
    limits_added: bool = False
    unseen: tuple[int, ...] = ()
    norms_alone: tuple[int, ...] = ()
    targets: tuple[int, ...] = ()


@dataclass(frozen=True)
class RepairResult:
    """The outcome of a repair.

    Attributes:
        model: the repaired copy, in evaluation mode, on the caller's device; where the repair was not
            accepted, a copy of the model as it was.
        accepted: whether the repair kept the accuracy asked for, what led into the targets before no
            longer does, and a thorough scan of the outcome does not find them (`repair_gate`).
        max_accuracy_drop: as asked for; None was accepted unseen.
        reason: why it was accepted or not, in one sentence.
        report_before: the scan that the repair is based on.
        report_after: the scan of the repaired model; None where there was none.
        targets: the classes that were to be repaired.
        method: "patch", "prune" or "finetune": of the model, or of the best that was tried.
        limits_added: whether "auto" put limits in front of a model that was pruned or trained, as a patch
            has them; `remove_latent_patch` takes them off.
        attempts: all methods that were tried, in that order.
        accuracy_before, accuracy_after: on the held-out clean samples, of the original and of what
            was repaired, whether that was accepted or not.
        robust_accuracy_before, robust_accuracy_after: on those of them that carry what led into the
            targets, a mean over changes and patches; NaN where there was nothing to carry.
        training_samples, holdout_samples: how the clean data was split.
        history: the losses of every epoch of a fine-tuning.
        pruning: what was pruned; None of other methods.
        warnings: what the caller should know before using the model.
        settings: of the method.
        seconds: wall time of all that was tried, without scans.
        precautions: of the targets of an accepted repair those into which nothing was seen to lead inputs:
            what stands in front of them is a precaution.
    """

    model: nn.Module = field(repr=False)
    accepted: bool
    max_accuracy_drop: float | None
    reason: str
    report_before: ScanReport = field(repr=False)
    report_after: ScanReport | None = field(repr=False)
    targets: tuple[int, ...]
    method: Method
    limits_added: bool
    attempts: tuple[Attempt, ...] = field(repr=False)
    accuracy_before: float
    accuracy_after: float
    robust_accuracy_before: float
    robust_accuracy_after: float
    training_samples: int
    holdout_samples: int
    history: tuple[EpochLosses, ...] = field(repr=False)
    pruning: PruneHistory | None = field(repr=False)
    warnings: tuple[str, ...]
    settings: RepairSettings
    seconds: float
    precautions: tuple[int, ...] = ()

    @property
    def way(self) -> str:
        """The method for people: "patch", or "finetune and limits"."""
        return f"{self.method} and limits" if self.limits_added else self.method


def merit_of(attempt: Attempt) -> tuple[bool, float]:
    """What the best attempt has most of: acceptance, then accuracy, with and without what led there."""
    robust = 0.0 if math.isnan(attempt.robust_accuracy) else attempt.robust_accuracy
    return attempt.accepted, _CLEAN_COUNTS * attempt.accuracy_after + robust


def reasons_of(attempts: Iterable[Attempt]) -> str:
    """Why each method was rolled back, a reason that several share once."""
    methods: dict[str, list[str]] = {}
    for attempt in attempts:
        methods.setdefault(attempt.reason, []).append(attempt.method)
    return "; ".join(f"{', '.join(names)}: {reason}" for reason, names in methods.items())


def warnings_of(before: float, kept: Attempt, num_classes: int, reason: str) -> tuple[str, ...]:
    """What the caller should know.

    Args:
        before: accuracy of the original on held-out samples.
        kept: the attempt that the result is made of.
        num_classes: of the model.
        reason: why it was rolled back, if so.
    """
    warnings = []
    after, robust = kept.accuracy_after, kept.robust_accuracy
    if before < sensible_accuracy(num_classes):
        warnings.append(
            f"the model was right on only {before:.1%} of the held-out samples before the repair; "
            "check the normalisation (mean and std) and the order of the classes"
        )
    if not kept.accepted:
        warnings.append(f"rolled back: {reason}")
        return tuple(warnings)
    if kept.unseen:
        classes = "class " if len(kept.unseen) == 1 else "classes "
        classes += ", ".join(map(str, kept.unseen))
        warnings.append(
            f"nothing was seen to lead inputs into {classes} as into none of a clean model, and so nothing "
            "shows that a backdoor is gone: the limit in front of it is a precaution"
        )
    if after < before - NOTABLE_LOSS:
        warnings.append(
            f"the repair costs {before - after:.1%} of accuracy on held-out samples; more clean "
            "samples, more epochs or a lower learning_rate may cost less"
        )
    if robust < after - _NOTABLE_CONFUSION:
        warnings.append(
            f"inputs that carry what led into the targets are no longer sent there, but only {robust:.1%} "
            "of them are classified right"
        )
    return tuple(warnings)
