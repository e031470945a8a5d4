"""Trying the methods of a repair: each goes through the gate, and the best is kept."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from .errors import FileError, InputError
from .input_adversary import Effects
from .latent_patch_fit import PatchSettings
from .repair_case import RepairCase
from .repair_gate import Gate, check_repair
from .repair_methods import Candidate, Method, count_right_after, make_candidate, with_limit
from .repair_result import Attempt, RepairResult, merit_of, reasons_of, warnings_of
from .repair_settings import RepairSettings
from .scan_report import ScanReport

# "auto" is content where what led into the targets leaves accuracy so near to what it was.
_NEAR = 0.05


@dataclass(frozen=True, eq=False)
class Judge:
    """Puts candidates through the gate.

    Attributes:
        case: what there is to repair.
        data: all clean samples [N, ...] and [N], for the scans of what comes out.
        held_out: those of them that no method is given.
        report: the scan of the original.
        right_before: how many of those held out the original gets right.
        was: what the adversary does to the original; None without one.
        blind: why there is no adversary, or "".
    """

    case: RepairCase
    data: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]
    report: ScanReport
    right_before: int
    was: Effects | None
    blind: str

    @property
    def accuracy_before(self) -> float:
        """Of the original on the held-out samples."""
        return self.right_before / len(self.held_out[1])

    def __call__(self, method: Method, candidate: Candidate, settings: RepairSettings) -> Attempt:
        """What the gate says of what a method made; without a gate it is accepted unseen."""
        case, size = self.case, settings.batch_size
        right = count_right_after(candidate, self.held_out, size)
        if case.max_accuracy_drop is None:
            left = None
            if case.adversary is not None:
                left = case.adversary.effects(candidate.model, *self.held_out, size)
            robust = math.nan if left is None else float(left.right.mean())
            gate = Gate(True, "accepted unseen, as asked for", None, robust)
        else:
            gate = check_repair(
                candidate.model,
                self.data,
                self.held_out,
                self.report,
                case.adversary,
                self.was,
                (self.right_before, right),
                case.max_accuracy_drop,
                head=candidate.head.name,
                limited=method == "patch",
                batch_size=size,
                blind=self.blind,
                seed=settings.seed,
                progress=case.progress,
            )
        return Attempt(
            method,
            gate.accepted,
            gate.reason,
            right / len(self.held_out[1]),
            gate.robust_accuracy,
            gate.report,
            candidate.seconds,
            unseen=gate.unseen,
            norms_alone=gate.norms_alone,
            targets=case.targets,
        )

    def limited(
        self, attempt: Attempt, candidate: Candidate, settings: RepairSettings
    ) -> tuple[Attempt, Candidate]:
        """What was accepted, with limits in front of its head if these, too, cost no more than allowed."""
        assert isinstance(settings, PatchSettings)
        assert self.case.max_accuracy_drop is not None
        found = with_limit(candidate, self.case, settings)
        if found is None:
            return attempt, candidate
        try:
            right = count_right_after(found, self.held_out, settings.batch_size)
        except InputError:  # logits that are not finite
            return attempt, candidate
        held_out = len(self.held_out[1])
        if (self.right_before - right) / held_out > self.case.max_accuracy_drop + 1e-9:
            return attempt, candidate
        robust = attempt.robust_accuracy
        if self.case.adversary is not None:
            effects = self.case.adversary.effects(found.model, *self.held_out, settings.batch_size)
            robust = float(effects.right.mean())
        limited = replace(
            attempt,
            accuracy_after=right / held_out,
            robust_accuracy=robust,
            seconds=found.seconds,
            limits_added=True,
        )
        return limited, found


def try_methods(
    judge: Judge, all_settings: Mapping[Method, RepairSettings], method: Method
) -> tuple[tuple[Attempt, ...], Attempt, Candidate]:
    """Tries the methods until one is good enough: all attempts, the best, and what it made."""
    tried: list[tuple[Attempt, Candidate]] = []
    attempts: list[Attempt] = []
    for name, settings in all_settings.items():
        try:
            candidate = make_candidate(name, judge.case, settings)
            attempt = judge(name, candidate, settings)
        except (InputError, FileError) as error:
            if method != "auto":
                raise
            failed = Attempt(name, False, str(error), math.nan, math.nan, None, 0.0)
            attempts.append(replace(failed, targets=judge.case.targets))
            continue
        attempts.append(attempt)
        tried.append((attempt, candidate))
        if attempt.accepted and not attempt.robust_accuracy < judge.accuracy_before - _NEAR:
            break
    if not tried:
        raise InputError.of(
            "repair",
            "method",
            expected="a model that some method can repair",
            got=reasons_of(attempts),
            way_out="name one method for its error alone",
        )
    best, candidate = max(tried, key=lambda t: merit_of(t[0]))  # the first of equals
    if method != "auto":
        return tuple(attempts), best, candidate
    kept = best
    precautions = [t for t in tried if t[0].norms_alone]
    if not best.accepted and precautions:
        best, candidate = precautions[-1]
        told = f"the best there is, though {best.reason}: its norm is what no limit moves"
        unseen = tuple(sorted({*best.unseen, *best.norms_alone}))
        kept = replace(best, accepted=True, reason=told, unseen=unseen)
    if kept.accepted and kept.method != "patch":
        kept, candidate = judge.limited(kept, candidate, all_settings["patch"])
    return tuple(kept if attempt is best else attempt for attempt in attempts), kept, candidate


def result_of(
    judge: Judge,
    attempts: tuple[Attempt, ...],
    kept: Attempt,
    candidate: Candidate,
    settings: RepairSettings,
    seconds: float,
) -> RepairResult:
    """The outcome, with what was kept of the attempts; `seconds` went by before the first."""
    case, was, drop = judge.case, judge.was, judge.case.max_accuracy_drop
    reason = kept.reason
    if not kept.accepted and len(attempts) > 1:
        reason = reasons_of(attempts)
    notes = []
    if judge.blind:
        notes = [
            f"only shifted latents are known to lead into the targets, which removes less ({judge.blind})"
        ]
    made = candidate.notes if kept.accepted else ()
    before = judge.accuracy_before
    return RepairResult(
        model=candidate.model if kept.accepted else copy.deepcopy(case.model).eval(),
        accepted=kept.accepted,
        max_accuracy_drop=None if drop is None else float(drop),
        reason=reason,
        report_before=judge.report,
        report_after=kept.report_after,
        targets=case.targets,
        method=kept.method,
        limits_added=kept.limits_added,
        attempts=attempts,
        accuracy_before=before,
        accuracy_after=kept.accuracy_after,
        robust_accuracy_before=math.nan if was is None else float(was.right.mean()),
        robust_accuracy_after=kept.robust_accuracy,
        training_samples=len(case.labels),
        holdout_samples=len(judge.held_out[1]),
        history=candidate.history,
        pruning=candidate.pruning,
        warnings=(*notes, *made, *warnings_of(before, kept, case.head.num_classes, reason)),
        settings=settings,
        seconds=seconds + sum(attempt.seconds for attempt in attempts),
        precautions=kept.unseen if kept.accepted else (),
    )
