"""Fair side-by-side measurement: interleaved repeats, medians, peak memory in a fresh process."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
        rtol: how far the answers may differ, relative to the largest value.
    """

    name: str
    call: Callable[[], Tensor]
    share: float = 1.0
    answer_of: Callable[[Tensor], Tensor] | None = None
    rtol: float = 1e-6


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    benchmark: str
    case: str
    form: str
    seconds: float  # the median
    best: float
    ratio: float  # to the first form; of a stage: its share of the whole
    extra_bytes: int | None
    repeats: int
    note: str = ""


class Benchmark(Protocol):
    """What a bench_*.py module offers."""

    CASES: Sequence[str]
    QUICK_CASES: Sequence[str]

    def run(self, case: str, device: str, budget: float) -> list[Row]:
        """Measures one case."""


@dataclass(frozen=True)
class Machine:
    """Where and with what the numbers were measured."""

    processor: str
    device: str
    threads: int
    simd: str
    torch: str
    tacext: str
    python: str

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return asdict(self)


def processor_name() -> str:
    """The name that the processor gives itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def describe_machine(device: str) -> Machine:
    """This machine, with the versions of what is measured."""
    info = ops.build_info()
    return Machine(
        processor=processor_name(),
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        simd=info.simd,
        torch=info.torch,
        tacext=info.version,
        python=platform.python_version(),
    )


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


def compare(module: str, case: str, forms: Sequence[Form], device: str, budget: float) -> list[Row]:
    """Measures the forms of one case against the first of them.

    Raises:
        AssertionError: the forms do not compute the same.
    """
    times, answers = interleave([form.call for form in forms], device, budget)
    for form, answer in zip(forms, answers, strict=True):
        wanted = (
            answers[0] if form.answer_of is None or form is forms[0] else form.answer_of(answers[0])
        )
        error = (answer.double() - wanted.double()).abs().max()
        size = wanted.double().abs().max()
        assert error <= form.rtol * size, f"{case}: {form.name} differs by {error} of {size}"

    rows: list[Row] = []
    for i, (form, taken) in enumerate(zip(forms, times, strict=True)):
        median = statistics.median(taken) / form.share
        rows.append(
            Row(
                benchmark=module.removeprefix("bench_"),
                case=case,
                form=form.name,
                seconds=median,
                best=min(taken) / form.share,
                ratio=median / rows[0].seconds if rows else 1.0,
                extra_bytes=extra_memory(module, case, i, device),
                repeats=len(taken),
                note=""
                if form.share == 1
                else f"extrapolated from {form.share:.2g} of the classes",
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


def extra_memory(module: str, case: str, form: int, device: str) -> int | None:
    """`peak_of` a form of a case in a process of its own; None where /proc cannot tell."""
    if not sys.platform.startswith("linux"):
        return None
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, module, case, str(form), device],
        # What the setup frees goes back to the system; kept, it would hide as much of the peak.
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(json.loads(done.stdout))


def report_peak(module: str, case: str, form: str, device: str) -> None:
    """Runs in the child: prints the peak of one form."""
    forms: list[Form] = __import__(module).forms(case, device)
    _warm_up()
    print(json.dumps(peak_of(forms[int(form)].call, device)))
