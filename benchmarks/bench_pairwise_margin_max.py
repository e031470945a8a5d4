"""`pairwise_margin_max` against torch: broadcast, in chunks of samples, class by class."""

from __future__ import annotations

import torch
from torch import Tensor

import timing
from tacext import ops
from timing import MIB, Form, Row

# classes x samples, dtype
CASES = (
    "10 x 10000 float32",
    "100 x 10000 float32",
    "100 x 10000 bfloat16",
    "1000 x 10000 float32",
)
QUICK_CASES = ("10 x 2000 float32", "100 x 2000 float32")
_LARGEST_BROADCAST = 2048 * MIB


def _broadcast(z: Tensor) -> Tensor:
    return (z[:, None, :] - z[:, :, None]).amax(0)


def _in_chunks(z: Tensor, samples: int) -> Tensor:
    first, *rest = torch.split(z, samples)
    out = _broadcast(first)
    for chunk in rest:
        torch.maximum(out, _broadcast(chunk), out=out)
    return out


def _class_by_class(z: Tensor) -> Tensor:
    return torch.stack([(z - z[:, k : k + 1]).amax(0) for k in range(z.shape[1])])


def forms(case: str, device: str) -> list[Form]:
    """The operator and its plain torch forms on one random problem."""
    classes, _, samples, dtype = case.split()
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(int(samples), int(classes), generator=generator)
    logits = logits.to(device, getattr(torch, dtype))
    a_sample = 4 * int(classes) ** 2
    chunk = max(1, 8 * MIB // a_sample)  # about what stays in a cache
    candidates = [
        Form("tacext", lambda: ops.pairwise_margin_max(logits)),
        Form("torch, class by class", lambda: _class_by_class(logits.float())),
    ]
    if chunk < int(samples):
        candidates.append(
            Form(f"torch, {chunk} samples a chunk", lambda: _in_chunks(logits.float(), chunk))
        )
    if int(samples) * a_sample <= _LARGEST_BROADCAST:
        candidates.append(Form("torch, broadcast", lambda: _broadcast(logits.float())))
    return candidates


def run(case: str, device: str, budget: float) -> list[Row]:
    """Measures one case."""
    return timing.compare("bench_pairwise_margin_max", case, forms(case, device), device, budget)
