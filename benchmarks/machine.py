"""The machine that the numbers are from, and the name of its results."""

from __future__ import annotations

import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from tacext import ops

# AMD's names do not tell its generations apart; family and ranges of models do.
_ZEN = (
    (0x17, range(0x30), "zen"),
    (0x17, range(0x30, 0x100), "zen2"),
    (0x19, range(0x10, 0x20), "zen4"),
    (0x19, range(0x60, 0x80), "zen4"),
    (0x19, range(0xA0, 0xB0), "zen4"),
    (0x19, range(0x100), "zen3"),
    (0x1A, range(0x100), "zen5"),
)
_SIMD = {"avx512f": "avx512", "avx2": "avx2", "asimd": "neon"}


@dataclass(frozen=True)
class Machine:
    """Where and with what the numbers were measured."""

    processor: str
    architecture: str  # zen4; empty where the processor's name says it already
    simd: str
    device: str
    threads: int
    torch: str
    tacext: str
    tacext_simd: str
    python: str

    @property
    def slug(self) -> str:
        """What its results file is called."""
        if self.device != "cpu":
            return _slug(self.device)
        name = re.sub(r"@.*", "", self.processor)  # the clock
        return _slug(f"{name} {self.architecture} {self.simd} {self.threads} threads")


def _slug(text: str) -> str:
    short = re.sub(r"\(r\)|\(tm\)|\bcpu\b|\d+-core processor", "", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", short).strip("-")


def read_cpuinfo(text: str) -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo."""
    lines = text.split("\n\n")[0].splitlines()
    return {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}


def architecture_of(fields: dict[str, str]) -> str:
    """An AMD processor's generation, else nothing."""
    if fields.get("vendor_id") != "AuthenticAMD":
        return ""
    family, model = int(fields["cpu family"]), int(fields["model"])
    return next((name for f, models, name in _ZEN if f == family and model in models), "")


def describe_machine(device: str) -> Machine:
    """This machine, with the versions of what is measured."""
    info = ops.build_info()
    path = Path("/proc/cpuinfo")
    fields = read_cpuinfo(path.read_text()) if path.exists() else {}
    flags = fields.get("flags", fields.get("Features", "")).split()
    return Machine(
        processor=fields.get("model name") or platform.processor() or platform.machine(),
        architecture=architecture_of(fields),
        simd=next((name for flag, name in _SIMD.items() if flag in flags), ""),
        device=torch.cuda.get_device_name() if device == "cuda" else "cpu",
        threads=torch.get_num_threads(),
        torch=info.torch,
        tacext=info.version,
        tacext_simd=info.simd,
        python=platform.python_version(),
    )
