"""Classes that are repaired beside the suspects: those in doubt, and those seen once these are gone.

With the first backdoor out of the way a scan may find another, which it had hidden. That one is then
repaired as well, and the gate judges both together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

from .errors import InputError
from .repair_methods import Method
from .repair_result import RepairResult

logger = logging.getLogger(__name__)

# Whoever makes the model decides how many classes show up one after the other, each a repair of its own.
MOST_ROUNDS = 3


def with_further_targets(
    result: RepairResult,
    doubtful: tuple[int, ...],
    method: Method,
    again: Callable[[tuple[int, ...], Method], RepairResult],
    reachable: Callable[[tuple[int, ...]], tuple[int, ...]] = lambda classes: classes,
) -> RepairResult:
    """The result, or that of a repair of further classes where the gate accepts it.

    Args:
        result: of the suspects.
        doubtful: the classes that the scan of the original doubts. They get limits of their own where a
            patch is accepted; nothing is trained against them.
        method: as asked for.
        again: repairs these classes by this method.
        reachable: which of these classes can be repaired.
    """
    kept = result
    for _ in range(MOST_ROUNDS):
        if kept.accepted:
            break
        wider = _repaired_with(kept, _suspects_of_outcome(kept), method, again, reachable)
        if wider is None:
            break
        kept = wider
        if not kept.accepted:
            result = replace(result, attempts=kept.attempts, seconds=kept.seconds)
    if not kept.accepted:
        left = [k for k in _suspects_of_outcome(kept) if k not in result.targets]
        if not left:
            return result
        told = f"a scan of what came out suspects {', '.join(map(str, left))} as well"
        return replace(result, warnings=(*result.warnings, told))
    wider = None
    if kept.method == "patch":
        wider = _repaired_with(kept, doubtful, "patch", again, reachable)
    if wider is None or wider.accepted:
        return wider or kept
    return replace(kept, attempts=wider.attempts, seconds=wider.seconds)


def _repaired_with(
    kept: RepairResult,
    more: tuple[int, ...],
    method: Method,
    again: Callable[[tuple[int, ...], Method], RepairResult],
    reachable: Callable[[tuple[int, ...]], tuple[int, ...]],
) -> RepairResult | None:
    """A repair of further classes as well, with all attempts so far; None where there are none."""
    new = tuple(k for k in more if k not in kept.targets)
    if not new:
        return None
    try:
        if not (new := reachable(new)):
            return None
        wider = again((*kept.targets, *new), method)
    except InputError as error:
        logger.info("repair: no repair of further classes (%s)", error)
        return None
    attempts, seconds = (*kept.attempts, *wider.attempts), kept.seconds + wider.seconds
    return replace(wider, attempts=attempts, seconds=seconds)


def _suspects_of_outcome(result: RepairResult) -> tuple[int, ...]:
    """What the scan of the last outcome suspects: of one with a patch where that was scanned."""
    last = [a for a in result.attempts if a.targets == result.targets]  # not of earlier rounds
    scans = [(a.method, a.report_after) for a in last if a.report_after is not None]
    patched = [report for method, report in scans if method == "patch"]
    reports = patched or [report for _, report in scans]
    return reports[-1].suspects if reports else ()
