"""Shapes, dtypes and devices of the operators' results, for torch.compile and torch.export.

Importing this registers them; `ops` does, once the native library is loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .tensor_checks import check_same_device


def _empty_margins(logits: Tensor) -> Tensor:
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return logits.new_empty((logits.shape[1], logits.shape[1]), dtype=dtype)


@torch.library.register_fake("tacext::pairwise_margin_max")
def _fake_pairwise_margin_max(logits: Tensor) -> Tensor:
    return _empty_margins(logits)


@torch.library.register_fake("tacext::pairwise_margin_max_")
def _fake_pairwise_margin_max_(out: Tensor, logits: Tensor) -> None:
    check_same_device("pairwise_margin_max", "out", out, "logits", logits)


@torch.library.register_fake("tacext::pairwise_margin_quantile")
def _fake_pairwise_margin_quantile(logits: Tensor, keep: int) -> Tensor:
    return _empty_margins(logits)


@torch.library.register_fake("tacext::pairwise_margin_largest_")
def _fake_pairwise_margin_largest_(largest: Tensor, logits: Tensor) -> None:
    check_same_device("pairwise_margin_largest", "out", largest, "logits", logits)


@torch.library.register_fake("tacext::minimal_perturbation")
def _fake_minimal_perturbation(
    weight: Tensor,
    margins: Tensor,
    scale: Tensor | None = None,
    classes: Tensor | None = None,
    tolerance: float = 1e-9,
    max_iterations: int = 0,
    closed_form: bool = True,
) -> tuple[Tensor, ...]:
    for name, value in (("margins", margins), ("scale", scale), ("classes", classes)):
        if value is not None:
            check_same_device("minimal_perturbation", name, value, "weight", weight)
    rows = weight.shape[0] if classes is None else classes.shape[0]

    def empty(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        return weight.new_empty(shape, dtype=dtype)

    return (
        empty(rows, weight.shape[1]),
        empty(rows),
        empty(rows, weight.shape[0]),
        empty(rows, dtype=torch.int32),
        empty(rows, dtype=torch.int64),
        empty(rows, dtype=torch.int64),
        empty(rows),
        empty(rows),
        empty(rows),
    )


@torch.library.register_fake("tacext::neuron_scores")
def _fake_neuron_scores(activation: Tensor, gradient: Tensor) -> Tensor:
    check_same_device("neuron_scores", "gradient", gradient, "activation", activation)
    return activation.new_empty((activation.shape[1],), dtype=torch.float64)


_GUARD_ARGUMENTS = (
    "logits", "mean", "inverse_spread", "basis", "near_weight", "far_weight", "direction", "location",
    "inverse_deviation", "knots", "exceeding", "threshold", "samples",
)  # fmt: skip


@torch.library.register_fake("tacext::guard_score")
def _fake_guard_score(
    latent: Tensor, logits: Tensor, *table: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    for name, value in zip(_GUARD_ARGUMENTS, (logits, *table), strict=True):
        check_same_device("guard_score", name, value, "latent", latent)
    score = latent.new_empty((latent.shape[0],), dtype=torch.float32)
    return score, torch.empty_like(score), torch.empty_like(score, dtype=torch.bool)
