"""`pairwise_margin_max` against torch and numpy in their best chunks, and against the ceiling.

A pair is one subtraction and one maximum; there are samples * classes * (classes - 1). The share of
the ceiling is that of the float32 loop in registers on as many cores as the form uses. It may pass
100 %: a subtraction can serve two pairs, and narrower numbers more at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import ceiling
import timing
from tacext import ops
from timing import Form, Row

Array = NDArray[Any]
_CEILING = {"cpu": "10^9 pairs or bytes on one core", "cuda": "10^9 pairs or bytes on the GPU"}
# classes x samples, dtype
CASES = (
    "ceiling",
    *(
        f"{classes} x 10000 {dtype}"
        for dtype in ("float32", "bfloat16", "float64")
        for classes in (10, 43, 100, 200, 1000)
    ),
)
QUICK_CASES = ("ceiling", "10 x 2000 float32", "100 x 2000 float32")
LARGE_CASES = ("1000 x 50000 float32", "1000 x 50000 bfloat16")
_SAMPLES_A_CHUNK = (1, 2, 4, 16, 64, 256, 1024, 10_000)
_CLASSES_A_CHUNK = (1, 8, 64, 1000)
# Elements of a chunk's differences: below, calls cost more than work; above, nothing is in a cache.
_CHUNK = {"cpu": (2**15, 2**22), "cuda": (2**20, 2**27)}
_FEWEST_TRANSPOSED = 256  # samples, for vectors to fill
_SWEPT_PAIRS = {"cpu": 2e7, "cuda": 2e9}
_SWEEPS = 3


@dataclass(frozen=True)
class _Chunk:
    """Differences of some samples and some classes k against all classes j.

    With few classes vectors fill better with the samples innermost: `transposed`.
    """

    samples: int
    classes: int
    transposed: bool

    def __str__(self) -> str:
        layout = ", transposed" if self.transposed else ""
        return f"chunks of {self.samples} samples, {self.classes} classes{layout}"

    def pieces(self, count: int, classes: int) -> Iterator[tuple[slice, slice]]:
        """The chunks' samples and classes."""
        for i in range(0, count, self.samples):
            for k in range(0, classes, self.classes):
                yield (
                    slice(i, min(i + self.samples, count)),
                    slice(k, min(k + self.classes, classes)),
                )

    def torch(self, z: Tensor) -> Tensor:
        """M, with one buffer for the differences."""
        count, classes = z.shape
        out = torch.full((classes, classes), -torch.inf, dtype=z.dtype, device=z.device)
        buffer = z.new_empty(self.samples * self.classes * classes)
        if self.transposed:
            z = z.t().contiguous()
        for i, k in self.pieces(count, classes):
            if self.transposed:
                left, right, reduced = z[None, :, i], z[k, None, i], -1
            else:
                left, right, reduced = z[i, None, :], z[i, k, None], 0
            shape = torch.broadcast_shapes(left.shape, right.shape)
            differences = buffer[: math.prod(shape)].view(shape)
            torch.sub(left, right, out=differences)
            torch.maximum(out[k], differences.amax(reduced), out=out[k])
        return out

    def numpy(self, z: Array) -> Tensor:
        """The same in numpy."""
        count, classes = z.shape
        out = np.full((classes, classes), -np.inf, z.dtype)
        buffer = np.empty(self.samples * self.classes * classes, z.dtype)
        if self.transposed:
            z = np.ascontiguousarray(z.T)
        for i, k in self.pieces(count, classes):
            if self.transposed:
                left, right, reduced = z[None, :, i], z[k, None, i], -1
            else:
                left, right, reduced = z[i, None, :], z[i, k, None], 0
            shape = np.broadcast_shapes(left.shape, right.shape)
            differences = buffer[: math.prod(shape)].reshape(shape)
            np.subtract(left, right, out=differences)
            np.maximum(out[k], differences.max(reduced), out=out[k])
        return torch.from_numpy(out)


def _chunks(classes: int, samples: int, device: str) -> list[_Chunk]:
    low, high = _CHUNK[device]
    found = {
        _Chunk(min(s, samples), min(k, classes), transposed)
        for s in _SAMPLES_A_CHUNK
        for k in _CLASSES_A_CHUNK
        for transposed in (False, True)
        if not transposed or s >= _FEWEST_TRANSPOSED
    }
    fitting = [c for c in found if low <= c.samples * c.classes * classes <= high]
    return sorted(fitting, key=str) or [_Chunk(samples, classes, transposed=False)]


def make_logits(case: str, device: str) -> Tensor:
    """The random logits of a case."""
    classes, _, samples, dtype = case.split()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(int(samples), int(classes), generator=generator)
    return logits.to(device, getattr(torch, dtype))


def _on_one_thread(logits: Tensor) -> Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return ops.pairwise_margin_max(logits)
    finally:
        torch.set_num_threads(threads)


def _other_forms(logits: Tensor, device: str) -> tuple[list[Form], list[Form]]:
    """Every chunk in torch and in numpy; both compute in float32 or float64 as the operator does."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    samples, classes = wide.shape
    chunks = _chunks(classes, samples, device)
    in_torch = [Form(f"torch, {c}", partial(c.torch, wide)) for c in chunks]
    if device != "cpu":
        return in_torch, []
    array = wide.numpy()
    return in_torch, [Form(f"numpy, {c}", partial(c.numpy, array)) for c in chunks]


def _own_forms(logits: Tensor, device: str) -> list[Form]:
    forms = [Form("tacext", lambda: ops.pairwise_margin_max(logits))]
    if device == "cpu" and torch.get_num_threads() > 1:
        forms.append(Form("tacext, one thread", lambda: _on_one_thread(logits), memory=False))
    return forms


def forms(case: str, device: str) -> list[Form]:
    """The operator and all chunks of torch and numpy."""
    logits = make_logits(case, device)
    in_torch, in_numpy = _other_forms(logits, device)
    return [*_own_forms(logits, device), *in_torch, *in_numpy]


def _fastest(case: str, device: str) -> list[Form]:
    """Of torch and of numpy the chunk that is fastest on the case's first samples."""
    logits = make_logits(case, device)
    samples, classes = logits.shape
    few = min(samples, max(_FEWEST_TRANSPOSED, int(_SWEPT_PAIRS[device] / classes**2)))
    swept = _other_forms(logits[:few], device)
    whole = _other_forms(logits, device)
    found = []
    for some, all_forms in zip(swept, whole, strict=True):
        names = {form.name for form in all_forms}
        known = [form for form in some if form.name in names]
        if known:
            times = [
                min(timing.seconds_of(f.call, device)[0] for _ in range(_SWEEPS)) for f in known
            ]
            best = known[times.index(min(times))].name
            found.append(next(form for form in all_forms if form.name == best))
    return found


def _share_of_ceiling(row: Row, pairs: float, device: str) -> Row:
    rate = ceiling.measure(device).float32
    if rate is None or row.seconds is None:
        return row
    one = device == "cuda" or row.form == "tacext, one thread" or row.form.startswith("numpy")
    cores = 1 if one else torch.get_num_threads()
    done = pairs / row.seconds
    share = done / rate / cores
    return replace(row, note=f"{done / 1e9:.3g} G pairs/s, {share:.0%} of the ceiling")


def run(case: str, device: str, budget: float) -> list[Row]:
    """Measures one case."""
    name = "pairwise_margin_max"
    if case == "ceiling":
        return ceiling.rows(name, _CEILING[device], device)
    logits = make_logits(case, device)
    candidates = [*_own_forms(logits, device), *_fastest(case, device)]
    if not case.endswith("float32"):  # much the same
        candidates = [replace(form, memory=False) for form in candidates]
    rows = timing.compare(f"bench_{name}", case, candidates, device, budget)
    samples, classes = logits.shape
    pairs = float(samples) * classes * (classes - 1)
    return [_share_of_ceiling(row, pairs, device) for row in rows]
