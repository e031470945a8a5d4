"""The per-channel normalisation that a classifier was trained with, as a part of the model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .errors import InputError

__all__ = ["Normalized"]

OPERATION = "Normalized"


def _floats(argument: str, values: Sequence[float]) -> list[float]:
    way_out = "give one value for each channel, or one for all"
    try:
        listed = [float(value) for value in values]
    except (TypeError, ValueError):
        raise InputError.of(
            OPERATION, argument, expected="a sequence of floats", got=repr(values), way_out=way_out
        ) from None
    if not listed or not all(map(math.isfinite, listed)):
        raise InputError.of(
            OPERATION, argument, expected="finite floats", got=str(listed), way_out=way_out
        )
    return listed


class Normalized(nn.Module):
    """`model((x - mean) / std)`: takes images in [0, 1], whatever the model was trained with.

    Attributes:
        model: the wrapped model.
        mean: float32 [1, C, 1, 1], a buffer; C is 1 where one value stands for all channels.
        std: float32 [1, C, 1, 1], a buffer.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        """Wraps `model`.

        Args:
            model: takes normalised images [N, C, H, W].
            mean: 1 or C finite floats.
            std: 1 or C finite floats above 0.

        Raises:
            InputError: not an nn.Module, no or non-finite values, a std of 0 or less, or lengths
                of mean and std that do not fit together.
        """
        super().__init__()
        if not isinstance(model, nn.Module):
            raise InputError.of(
                OPERATION,
                "model",
                expected="an nn.Module",
                got=type(model).__name__,
                way_out="pass the model itself",
            )
        means, stds = _floats("mean", mean), _floats("std", std)
        # In float32, as the division will see it: 1e-50 is above 0 but its float32 is not.
        divisor = torch.tensor(stds, dtype=torch.float32)
        if not bool((divisor > 0).all()):
            raise InputError.of(
                OPERATION,
                "std",
                expected="values above 0",
                got=str(stds),
                way_out="use 1 for a channel that is not scaled",
            )
        if len(means) != len(stds) and 1 not in (len(means), len(stds)):
            raise InputError.of(
                OPERATION,
                "std",
                expected=f"1 or {len(means)} values, like mean",
                got=f"{len(stds)}",
                way_out="give one value for each channel, or one for all",
            )
        channels = max(len(means), len(stds))
        self.model = model
        offset = torch.tensor(means, dtype=torch.float32).expand(channels).clone()
        self.register_buffer("mean", offset.view(1, channels, 1, 1))
        self.register_buffer("std", divisor.expand(channels).clone().view(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Normalises and classifies.

        Args:
            x: [N, C, H, W], floating.

        Returns:
            What the wrapped model returns.

        Raises:
            InputError: x does not have 4 dimensions or as many channels as mean and std.
        """
        channels = self.mean.shape[1]
        # Broadcasting would quietly turn one channel into three.
        if x.dim() != 4 or channels not in (1, x.shape[1]):
            raise InputError.of(
                OPERATION,
                "x",
                expected="[N, C, H, W]" if channels == 1 else f"[N, {channels}, H, W]",
                got=str(list(x.shape)),
                way_out="give mean and std for the channels that the images have",
            )
        # In float32 also for half-precision models, which get back the dtype that they came with.
        normalised = (x - self.mean.to(x.device)) / self.std.to(x.device)
        result: Tensor = self.model(normalised.to(x.dtype))
        return result
