"""Checks of tensors that the operators share; their errors are worded alike."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import InputError


def check_tensor(operation: str, argument: str, value: object) -> None:
    """Raises InputError unless the value is a dense tensor."""
    if not isinstance(value, Tensor):
        raise InputError.of(
            operation,
            argument,
            expected="a torch.Tensor",
            got=type(value).__name__,
            way_out="convert it with torch.as_tensor",
        )
    if value.layout != torch.strided:
        raise InputError.of(
            operation,
            argument,
            expected="a dense tensor",
            got=str(value.layout),
            way_out="convert it with .to_dense()",
        )


def check_same_device(
    operation: str, argument: str, value: Tensor, other_name: str, other: Tensor
) -> None:
    """Raises InputError unless both lie on one device: torch would dispatch by either.

    A tensor of the meta device beside a real one would even get a result of the fake kernel.
    """
    if value.device != other.device:
        raise InputError.of(
            operation,
            argument,
            expected=f"{other.device}, the device of {other_name}",
            got=str(value.device),
            way_out="move one with .to()",
        )
