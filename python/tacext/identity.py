"""Whether two models are the same, by the lengths of their weights.

Guards and reports know their models by these. That is for mistakes, not against somebody who means to
mislead: a model whose tensors have the same lengths in another order passes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def lengths_of(model: nn.Module) -> tuple[float, ...]:
    """The length of every parameter and buffer, by name: what a model is known by."""
    state = sorted(model.state_dict().items())
    kept = (t for _, t in state if isinstance(t, Tensor) and t.is_floating_point())
    return tuple(float(t.detach().double().norm()) for t in kept)


def same_lengths(
    lengths: Sequence[float], known: Sequence[float], dtype: torch.dtype, tolerance: float = 1e-6
) -> bool:
    """Whether they are those of one model, but for the rounding of its dtype.

    Args:
        lengths: as of `lengths_of`.
        known: those that were kept.
        dtype: of the model now; it may have been converted since.
        tolerance: relative, of a dtype that is not half.
    """
    if dtype in (torch.float16, torch.bfloat16):
        tolerance = 1e-2
    return len(lengths) == len(known) and all(
        math.isclose(a, b, rel_tol=tolerance, abs_tol=1e-6)
        for a, b in zip(lengths, known, strict=True)
    )
