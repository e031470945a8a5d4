"""A model that hands out the latents in front of its head beside its output.

The model given is not touched: the modules on the way to the head are copied without what is in
them, all others and every parameter are shared.
"""

from __future__ import annotations

import copy
import threading
from typing import cast

import torch
from torch import Tensor, nn

from .errors import HeadNotFoundError, InputError
from .heads import Head, HeadModule, evaluating, latent_of, model_device, model_dtype


class _LatentsInstead(nn.Module):
    """In place of the head: what flows into it is the output of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def forward(self, features: Tensor) -> Tensor:
        return features


class _Tap(nn.Module):
    """In place of the head: the head, and a note of what flows through, one for every thread."""

    def __init__(self, head: HeadModule) -> None:
        super().__init__()
        self.head = head
        self.training = False
        self.taken: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def weight(self) -> Tensor:
        """Of the head: a latent patch around it asks for that."""
        return self.head.weight

    @property
    def bias(self) -> Tensor | None:
        """Of the head."""
        return self.head.bias

    def forward(self, features: Tensor) -> Tensor:
        logits = cast(Tensor, self.head(features))
        self.taken[_caller()] = latent_of(features), latent_of(logits)
        return logits


def _caller() -> int:
    # What traces a forward pass does so in one thread, and cannot trace this question.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()


class TappedModel(nn.Module):
    """Runs a model and returns (output, latents [N, D], the head's logits [N, C]).

    Attributes:
        ends_in_head: whether the output is that of the head itself. Then a pass is free of side
            effects: the trunk returns latents, and the head is applied to them. Otherwise a note is
            taken of what flows through the head.
    """

    def __init__(self, model: nn.Module, head_name: str, ends_in_head: bool) -> None:
        super().__init__()
        self.head = cast(HeadModule, model.get_submodule(head_name))
        self.ends_in_head = ends_in_head
        self._tap = None if ends_in_head else _Tap(self.head)
        self.trunk = _replaced(model, self.head, self._tap or _LatentsInstead())
        self.training = False

    @classmethod
    def of(cls, model: nn.Module, head: Head, example: Tensor, operation: str) -> TappedModel:
        """The tap for a model whose head was found on these inputs."""
        placed = example.to(model_device(model), model_dtype(model))
        tapped = cls(model, head.name, True)
        with torch.no_grad(), evaluating(model), evaluating(tapped):
            expected = getattr(output := model(placed.clone()), "logits", output)
            try:
                output, latent, _ = tapped(placed.clone())
                same = latent.shape == (len(placed), head.latent_dim)
                same = same and output.shape == expected.shape and torch.allclose(
                    output.float(), expected.float(), rtol=1e-3, atol=1e-4
                )  # fmt: skip
            except Exception:  # noqa: BLE001 - whatever a model says of latents for logits
                same = False
        return tapped if same else cls(model, head.name, False)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of inputs as the model takes them."""
        output = self.trunk(inputs)
        output = getattr(output, "logits", output)
        if self._tap is None:
            latent = latent_of(output)
            logits = nn.functional.linear(latent, self.head.weight.flatten(1), self.head.bias)
            return logits, latent, logits
        taken = self._tap.taken.pop(_caller(), None)
        if taken is None:
            raise HeadNotFoundError.of(
                "Guard",
                "model",
                expected="a forward pass through the head",
                got="one that did not call it",
                way_out="fit the guard with head= naming the last linear layer",
            )
        return output, *taken


def _replaced(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """The model with another module for an old one, wherever that stands; shares all the rest."""
    copies: dict[int, nn.Module] = {id(old): new}

    def visit(module: nn.Module) -> nn.Module:
        if id(module) not in copies:
            inside = {
                name: child if child is None else visit(child)
                for name, child in module._modules.items()
            }
            same = all(inside[name] is child for name, child in module._modules.items())
            copied = module
            if not same:
                copied = copy.copy(module)
                copied._modules = inside
            copies[id(module)] = copied
        return copies[id(module)]

    replaced = visit(model)
    if replaced is model:
        raise InputError.of(
            "Guard",
            "model",
            expected="a model that holds its head as a submodule",
            got=type(model).__name__,
            way_out="register the last linear layer as an attribute of the model",
        )
    return replaced
