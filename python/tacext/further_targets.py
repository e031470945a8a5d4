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


def with_further_targets(
    result: RepairResult,
    doubtful: tuple[int, ...],
    method: Method,
    again: Callable[[tuple[int, ...], Method], RepairResult],
) -> RepairResult:
    """The result, or that of a repair of further classes where the gate accepts it.

    Args:
        result: of the suspects.
        doubtful: the classes that the scan of the original doubts. Where a patch is accepted they get
            limits as well; they alone are no reason for more where it was rolled back.
        method: as asked for.
        again: repairs these classes by this method.
    """
    if result.accepted and result.method != "patch":
        return result
    kept = result
    while True:
        seen = () if kept.accepted else _suspects_of_outcome(kept)
        more = [k for k in dict.fromkeys((*doubtful, *seen)) if k not in kept.targets]
        if not more or not (kept.accepted or set(seen) & set(more)):
            break
        try:
            wider = again((*kept.targets, *more), "patch" if kept.accepted else method)
        except InputError as error:
            logger.info("repair: no repair of further classes (%s)", error)
            break
        attempts, seconds = (*kept.attempts, *wider.attempts), kept.seconds + wider.seconds
        if wider.accepted:
            return replace(wider, attempts=attempts, seconds=seconds)
        result = replace(result, attempts=attempts, seconds=seconds)
        if kept.accepted:
            break
        kept = replace(wider, attempts=attempts, seconds=seconds)
    return result


def _suspects_of_outcome(result: RepairResult) -> tuple[int, ...]:
    """What the scan of the last repaired model suspects: of that with a patch where one was tried."""
    patched = [a for a in result.attempts if a.method == "patch"]
    last = (patched or list(result.attempts))[-1].report_after
    return () if last is None else last.suspects
