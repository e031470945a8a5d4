"""`pairwise_margin_quantile` against torch's topk and kthvalue and numpy's partition.

Each of these selects from the differences of some classes k to all classes at once, with the
samples innermost, in as many classes a chunk as are fastest here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import timing
from tacext import ops
from timing import Form, Row

# classes x samples at quantile, dtype
CASES = (
    "10 x 2500 at 0.99 float32",
    "10 x 10000 at 0.99 float32",
    "43 x 2500 at 0.99 float32",
    "43 x 2500 at 0.9 float32",
    "43 x 2500 at 0.5 float32",
    "100 x 2500 at 0.99 float32",
    "200 x 2500 at 0.99 float32",
    "43 x 2500 at 0.99 bfloat16",
    "43 x 2500 at 0.99 float64",
)
QUICK_CASES = ("10 x 500 at 0.99 float32", "43 x 500 at 0.9 float32")
LARGE_CASES = ("1000 x 2500 at 0.99 float32",)
_CLASSES_A_CHUNK = (1, 2, 4, 8, 16, 32)
_MOST_ELEMENTS = 2**24  # of a chunk's differences; more would measure the memory
_SWEEPS = 3


@dataclass(frozen=True)
class Selection:
    """A way to select from the differences of a chunk of classes."""

    name: str
    classes: int

    def __str__(self) -> str:
        return f"{self.name}, chunks of {self.classes} classes"

    def select(self, z: Tensor, k: slice, keep: int) -> Tensor:
        """Rows k of M, from logits [C, N]."""
        if self.name == "numpy partition":
            array: NDArray[Any] = z.numpy()
            rank = array.shape[1] - keep
            differences = array[None, :, :] - array[k, None, :]
            differences.partition(rank, axis=2)
            return torch.from_numpy(np.ascontiguousarray(differences[:, :, rank]))
        wanted = z[None, :, :] - z[k, None, :]
        if self.name == "torch topk":
            return wanted.topk(keep, dim=2).values[:, :, -1]
        return wanted.kthvalue(z.shape[1] - keep + 1, dim=2).values

    def all(self, z: Tensor, keep: int) -> Tensor:
        """M, chunk by chunk."""
        chunks = range(0, len(z), self.classes)
        return torch.cat([self.select(z, slice(k, k + self.classes), keep) for k in chunks])


_NAMES = ("torch topk", "torch kthvalue", "numpy partition")


def _problem(case: str, device: str) -> tuple[Tensor, float]:
    classes, _, samples, _, quantile, dtype = case.split()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(int(samples), int(classes), generator=generator)
    return logits.to(device, getattr(torch, dtype)), float(quantile)


def _on_one_thread(call: Callable[[], Tensor]) -> Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return call()
    finally:
        torch.set_num_threads(threads)


def _own_forms(logits: Tensor, quantile: float, device: str) -> list[Form]:
    call = partial(ops.pairwise_margin_quantile, logits, quantile)
    forms = [Form("tacext", call)]
    if device == "cpu" and torch.get_num_threads() > 1:
        forms.append(Form("tacext, one thread", lambda: _on_one_thread(call), memory=False))
    return forms


def _selections(z: Tensor, name: str) -> Iterator[Selection]:
    for classes in _CLASSES_A_CHUNK:
        if classes == 1 or (classes <= len(z) and classes * z.numel() <= _MOST_ELEMENTS):
            yield Selection(name, classes)


def _others(logits: Tensor, quantile: float, device: str) -> tuple[Tensor, int, list[str]]:
    """The logits [C, N] in the dtype that the operator computes in, the rank, and who competes."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    keep = ops.differences_above(len(logits), quantile)
    names = [name for name in _NAMES if device == "cpu" or name.startswith("torch")]
    return wide.t().contiguous(), keep, names


def forms(case: str, device: str) -> list[Form]:
    """The operator, and every selection in every chunk."""
    logits, quantile = _problem(case, device)
    z, keep, names = _others(logits, quantile, device)
    selections = [s for name in names for s in _selections(z, name)]
    others = [Form(str(s), partial(s.all, z, keep)) for s in selections]
    return [*_own_forms(logits, quantile, device), *others]


def _fastest(z: Tensor, keep: int, name: str, device: str) -> Selection:
    """The selection whose first chunk takes the least time a class."""

    def seconds(selection: Selection) -> float:
        first = partial(selection.select, z, slice(0, selection.classes), keep)
        return min(timing.seconds_of(first, device)[0] for _ in range(_SWEEPS)) / selection.classes

    return min(_selections(z, name), key=seconds)


def run(case: str, device: str, budget: float) -> list[Row]:
    """Measures one case."""
    logits, quantile = _problem(case, device)
    z, keep, names = _others(logits, quantile, device)
    best = [_fastest(z, keep, name, device) for name in names]
    candidates = [
        *_own_forms(logits, quantile, device),
        *(Form(str(s), partial(s.all, z, keep)) for s in best),
    ]
    return timing.compare("bench_pairwise_margin_quantile", case, candidates, device, budget)
