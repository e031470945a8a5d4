"""Fair side-by-side measurement: interleaved repeats, medians, peak memory in a fresh process."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from tacext import ops

MIB = 2**20
T = TypeVar("T")


@dataclass(frozen=True)
class Form:
    """One way to compute a case's answer.

    Attributes:
        name: what the table calls it; the first form of a case is tacext's.
        call: computes and returns the answer.
        share: the part of the case's work that `call` does; times are divided by it.
        answer_of: picks, from the first form's answer, what `call` is to return; None compares all.
        rtol: how far the answers may differ, relative to the largest value; infinite where the
            table is to show the error and nothing more.
        prepare: called once before the clock starts.
        sample: what peak memory is measured on, where `call` would repeat it; None for `call`.
        memory: whether to measure its peak, which takes a process of its own.
        note: for the table.
    """

    name: str
    call: Callable[[], Tensor]
    share: float = 1.0
    answer_of: Callable[[Tensor], Tensor] | None = None
    rtol: float = 1e-6
    prepare: Callable[[], object] | None = None
    sample: Callable[[], object] | None = None
    memory: bool = True
    note: str = ""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    benchmark: str
    case: str
    form: str
    seconds: float | None  # the median; None of a form that was skipped
    best: float | None
    ratio: float | None  # to the first form; of a stage: its share of the whole
    extra_bytes: int | None
    repeats: int
    note: str = ""
    error: float | None = None  # beside the first form's answer, relative to its largest value

    @classmethod
    def skipped(cls, benchmark: str, case: str, form: str, why: str) -> Row:
        """A form that could not run, and why."""
        return cls(benchmark, case, form, None, None, None, None, 0, f"skipped: {why}")


class Benchmark(Protocol):
    """What a bench_*.py module offers."""

    CASES: Sequence[str]
    QUICK_CASES: Sequence[str]
    # It may also have LARGE_CASES, which run only when asked for.

    def run(self, case: str, device: str, budget: float) -> list[Row]:
        """Measures one case."""


def seconds_of(call: Callable[[], T], device: str) -> tuple[float, T]:
    """Wall time of one call, the device's work included, and its answer."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    answer = call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin, answer


def interleave(
    calls: Sequence[Callable[[], T]], device: str, budget: float, most: int = 30
) -> tuple[list[list[float]], list[T]]:
    """Times the calls in turns, so that a slow moment of the machine hits all of them.

    The first turn warms up, gives the answers and sets how often each call fits into `budget`
    seconds; a call that takes longer than the budget is not repeated, and its first time counts.
    """
    first = [seconds_of(call, device) for call in calls]
    repeats = [min(most, max(3, int(budget / max(t, 1e-9)))) if t < budget else 0 for t, _ in first]
    times: list[list[float]] = [
        [] if count else [t] for count, (t, _) in zip(repeats, first, strict=True)
    ]
    for turn in range(max(repeats)):
        for i, call in enumerate(calls):
            if turn < repeats[i]:
                times[i].append(seconds_of(call, device)[0])
    return times, [answer for _, answer in first]


def relative_error(answer: Tensor, wanted: Tensor) -> float:
    """The largest difference, relative to the largest value wanted."""
    wanted = wanted.double()
    return float((answer.double().to(wanted.device) - wanted).abs().max() / wanted.abs().max())


def compare(module: str, case: str, forms: Sequence[Form], device: str, budget: float) -> list[Row]:
    """Measures the forms of one case against the first of them.

    Raises:
        AssertionError: the forms do not compute the same.
    """
    for form in forms:
        if form.prepare is not None:
            form.prepare()
    times, answers = interleave([form.call for form in forms], device, budget)
    rows: list[Row] = []
    for form, answer, taken in zip(forms, answers, times, strict=True):
        wanted = answers[0] if form.answer_of is None else form.answer_of(answers[0])
        error = 0.0 if form is forms[0] else relative_error(answer, wanted)
        assert form.rtol == math.inf or error <= form.rtol, f"{case}: {form.name} is off by {error}"
        median = statistics.median(taken) / form.share
        first = rows[0].seconds if rows else median
        rows.append(
            Row(
                benchmark=module.removeprefix("bench_"),
                case=case,
                form=form.name,
                seconds=median,
                best=min(taken) / form.share,
                ratio=median / first if first else None,
                extra_bytes=extra_memory(module, case, form.name, device) if form.memory else None,
                repeats=len(taken),
                note=form.note,
                error=error if math.isfinite(error) else None,
            )
        )
    return rows


# ---- peak memory --------------------------------------------------------------------------------


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def peak_of(call: Callable[[], object], device: str) -> int:
    """Peak memory of one call beyond what was in use before; call it in a fresh process."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    start = _status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to what is resident now
    call()
    return max(0, _status_bytes("VmHWM") - start)


def _warm_up() -> None:
    """Starts thread pools and loads libraries, which would otherwise count as the call's memory."""
    square = torch.ones(256, 256)
    (square @ square).sum()
    (square[:, None, :4] - square[:, :4, None]).amax(0)
    ops.minimal_perturbation(square[:3], ops.pairwise_margin_max(square[:, :3]))
    ops.neuron_scores(square, square)


_CHILD = "import sys, timing; timing.report_peak(*sys.argv[1:])"


def extra_memory(module: str, case: str, form: str, device: str) -> int | None:
    """`peak_of` a form of a case in a process of its own; None where /proc cannot tell."""
    if not sys.platform.startswith("linux"):
        return None
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, module, case, form, device],
        # What the setup frees goes back to the system; kept, it would hide as much of the peak.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(json.loads(done.stdout))


def report_peak(module: str, case: str, name: str, device: str) -> None:
    """Runs in the child: prints the peak of one form."""
    forms: list[Form] = __import__(module).forms(case, device)
    form = next(form for form in forms if form.name == name)
    if form.prepare is not None:
        form.prepare()
    _warm_up()
    print(json.dumps(peak_of(form.sample or form.call, device)))
