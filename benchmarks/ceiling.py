"""Measured ceilings of this machine: loops in registers and a streaming copy, built on the fly."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from timing import Row, seconds_of

_HERE = Path(__file__).parent
_NAMES = {
    "float32_sub_max": "float32 subtraction and maximum",
    "int8_sub_max": "int8 subtraction and maximum",
    "int8_sub_max_min": "int8 subtraction, maximum and minimum",
    "copy_bytes": "copy",
}
_COPIED = 2**28  # floats
_GIGA = 1e9


@dataclass(frozen=True)
class Ceiling:
    """Rates a second, of one core or of a whole GPU; empty where nothing could be measured.

    Attributes:
        rates: by the names that ceiling.cpp prints.
        missing: why there are fewer than could be.
    """

    rates: dict[str, float]
    missing: str = ""

    @property
    def float32(self) -> float | None:
        """Pairs of a subtraction and a maximum a second."""
        return self.rates.get("float32_sub_max")


def _build_and_run(command: list[str], source: str, *arguments: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        program = str(Path(folder) / "ceiling")
        subprocess.run([*command, str(_HERE / source), "-o", program], check=True)
        done = subprocess.run([program, *arguments], check=True, capture_output=True, text=True)
    rates: dict[str, float] = json.loads(done.stdout)
    return {name: rate for name, rate in rates.items() if name in _NAMES}


def of_one_core(seconds: float = 0.5) -> Ceiling:
    """Loops of one core, each timed for some seconds."""
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    if compiler is None:
        return Ceiling({}, "no C++ compiler found")
    return Ceiling(
        _build_and_run(
            [compiler, "-O3", "-march=native", "-std=c++17"], "ceiling.cpp", str(seconds)
        )
    )


def _of_the_gpu() -> Ceiling:
    source = torch.ones(_COPIED, device="cuda")
    target = torch.empty_like(source)
    seconds = min(seconds_of(lambda: target.copy_(source), "cuda")[0] for _ in range(20))
    copy = {"copy_bytes": 4 * _COPIED / seconds}
    compiler = shutil.which("nvcc")
    if compiler is None:
        return Ceiling(copy, "no nvcc found for the loop in registers")
    return Ceiling(copy | _build_and_run([compiler, "-O3", "-arch=native"], "ceiling.cu"))


@functools.cache
def measure(device: str) -> Ceiling:
    """Builds and runs the loops, once a process."""
    return _of_the_gpu() if device == "cuda" else of_one_core()


def rows(benchmark: str, case: str, device: str) -> list[Row]:
    """For the table: the time of 10^9 pairs, or of 10^9 bytes."""
    found = measure(device)
    shown = [
        Row(
            benchmark, case, _NAMES[name], _GIGA / rate, _GIGA / rate, None, None, 1,
            f"{rate / _GIGA:.1f} GB/s" if name == "copy_bytes" else f"{rate / _GIGA:.1f} G pairs/s",
        )
        for name, rate in found.rates.items()
    ]  # fmt: skip
    if found.missing:
        shown.append(Row.skipped(benchmark, case, "ceiling", found.missing))
    return shown
