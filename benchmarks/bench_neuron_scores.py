"""`neuron_scores` against torch: in the input's precision, in float64, as an einsum."""

from __future__ import annotations

import torch
from torch import Tensor

import timing
from tacext import ops
from timing import Form, Row

CASES = (
    "2500 x 512 float32",
    "256 x 64 x 32 x 32 float32",
    "256 x 64 x 32 x 32 bfloat16",
    "64 x 512 x 14 x 14 float32",
)
QUICK_CASES = ("2500 x 512 float32", "32 x 64 x 32 x 32 float32")


def _plain(a: Tensor, g: Tensor) -> Tensor:
    return (a * g).flatten(1).view(len(a), a.shape[1], -1).sum(2).mean(0)


def _einsum(a: Tensor, g: Tensor) -> Tensor:
    return torch.einsum("ncp,ncp->c", a.flatten(2), g.flatten(2)) / len(a)


def forms(case: str, device: str) -> list[Form]:
    """The operator and its plain torch forms on one random pair."""
    shape, dtype = case.rsplit(" ", 1)
    size = [int(x) for x in shape.split(" x ")]
    generator = torch.Generator().manual_seed(0)
    # Positive, so that no score cancels and the forms can be compared at their own precision.
    a, g = (
        torch.rand(size, generator=generator).to(device, getattr(torch, dtype)) for _ in range(2)
    )
    rtol = 2e-2 if dtype == "bfloat16" else 1e-4
    candidates = [
        Form("tacext", lambda: ops.neuron_scores(a, g)),
        Form("torch, (a * g).sum", lambda: _plain(a, g), rtol=rtol),
        Form("torch, (a * g).sum in float64", lambda: _plain(a.double(), g.double())),
    ]
    if len(size) > 2:
        candidates.append(Form("torch, einsum", lambda: _einsum(a, g), rtol=rtol))
    return candidates


def run(case: str, device: str, budget: float) -> list[Row]:
    """Measures one case."""
    return timing.compare("bench_neuron_scores", case, forms(case, device), device, budget)
