"""In which layout images pass through a model fastest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .errors import InputError
from .heads import evaluating, run_model

# Rows that are tried; one alone hides what a model does to the layout of several.
_ROWS = 8

# Convolutions in another layout round otherwise; a share of the largest logit.
_ROUNDING = {torch.float16: 0.05, torch.bfloat16: 0.2}
_USUAL_ROUNDING = 1e-3


def placed(inputs: Tensor, layout: torch.memory_format) -> Tensor:
    """Images [N, C, H, W] in this layout; what is no image, or none, is left as it is."""
    if inputs.dim() != 4 or not len(inputs):
        return inputs
    if layout == torch.contiguous_format and inputs.stride(1) == 1:
        # Of one channel both layouts are the same but for this stride, which `view` looks at.
        return inputs.clone(memory_format=layout)
    return inputs.contiguous(memory_format=layout)


def fastest_layout(model: nn.Module, inputs: Tensor, operation: str) -> torch.memory_format:
    """Channels-last for images, if the model runs on that and gives the same answers.

    Convolutions are faster on it, but a model that flattens by `view` rejects it, and one that
    counts on strides makes something else of it.

    Args:
        model: the classifier; a few inputs pass through it twice.
        inputs: some that it takes [N, ...], one or more.
        operation: named in errors, none of which is raised: they are for the first pass that counts.
    """
    usual = torch.contiguous_format
    if inputs.dim() != 4 or not len(inputs):
        return usual
    few = inputs[:_ROWS] if len(inputs) > 1 else inputs.repeat(2, 1, 1, 1)
    with evaluating(model), torch.no_grad():
        try:
            expected = run_model(model, placed(few, usual), operation)
            found = run_model(model, placed(few, torch.channels_last), operation)
        except InputError:
            return usual
    rounding = _ROUNDING.get(found.dtype, _USUAL_ROUNDING) * float(expected.abs().max())
    same = float((found - expected).abs().max()) <= rounding
    return torch.channels_last if same else usual
