"""A model that hands out the latents in front of its head beside its output.

It has modules of its own, always in evaluation mode, and shares the memory of every parameter and
buffer with the model given, which is not touched.
"""

from __future__ import annotations

import copy
from typing import cast

import torch
from torch import Tensor, nn

from .errors import HeadNotFoundError, InputError
from .files import explain
from .heads import (
    Head,
    HeadModule,
    call_model,
    calling_thread,
    evaluating,
    latent_of,
    plain_output,
)


class _LatentsInstead(nn.Module):
    """In place of the head: what flows into it is the output of the model."""

    def forward(self, features: Tensor) -> Tensor:
        return features


class _Tap(nn.Module):
    """In place of the head: the head, and a note of what flows through, one for every thread."""

    def __init__(self, head: HeadModule) -> None:
        super().__init__()
        self.head = head
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
        self.taken[calling_thread()] = latent_of(features), latent_of(logits)
        return logits


class TappedModel(nn.Module):
    """Runs a model and returns (output, latents [N, D], the head's logits [N, C]).

    Attributes:
        ends_in_head: whether the output is that of an nn.Linear itself. Then a pass is free of side
            effects: the trunk returns latents, and the head is applied to them. Otherwise a note is
            taken of what flows through the head.
    """

    def __init__(self, model: nn.Module, head_name: str, ends_in_head: bool) -> None:
        super().__init__()
        copied = _sharing(model)
        self.head = cast(HeadModule, copied.get_submodule(head_name))
        self.ends_in_head = ends_in_head
        self._tap = None if ends_in_head else _Tap(self.head)
        self.trunk = _put(copied, self.head, self._tap or _LatentsInstead())
        self.eval()

    @classmethod
    def of(cls, model: nn.Module, head: Head, example: Tensor, operation: str) -> TappedModel:
        """The tap for a model whose head was found on these inputs.

        Raises:
            InputError: the model cannot be tapped.
        """
        with torch.no_grad(), evaluating(model):
            expected = call_model(model, example, operation)
            expected = plain_output(expected)
            why = "another output"
            for ends_in_head in (True, False):
                if ends_in_head and not isinstance(head.module, nn.Linear):
                    continue
                tapped = cls(model, head.name, ends_in_head)
                try:
                    output, latent, _ = cast(
                        tuple[Tensor, ...], call_model(tapped, example, operation)
                    )
                    good = latent.shape == (len(example), head.latent_dim)
                    if good and isinstance(expected, Tensor) and torch.equal(output, expected):
                        return tapped
                except (InputError, ValueError, TypeError) as error:
                    why = explain(error)
        raise InputError.of(
            operation,
            "model",
            expected="a model whose submodules its forward pass uses",
            got=f"{type(model).__name__}, of which a copy does otherwise ({why})",
            way_out="wrap it in a plain nn.Module, without hooks or a forward of its instance",
        )

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of inputs as the model takes them."""
        if self._tap is None:
            latent = self.trunk(inputs)
            logits = self.head(latent)
            return logits, latent, logits
        caller = calling_thread()
        self._tap.taken.pop(caller, None)  # of a pass that ended in an error
        output = self.trunk(inputs)
        output = plain_output(output)
        taken = self._tap.taken.pop(caller, None)
        if taken is None:
            raise HeadNotFoundError.of(
                "Guard",
                "model",
                expected="a forward pass through the head",
                got="one that did not call it",
                way_out="reject these inputs: the model takes another way for them",
            )
        return output, *taken


def unwrapped(model: nn.Module) -> nn.Module:
    """The model behind torch.compile."""
    inside = getattr(model, "_orig_mod", None)
    return inside if isinstance(inside, nn.Module) else model


def _sharing(model: nn.Module) -> nn.Module:
    """A copy of all modules, whose tensors share their memory with the model's."""
    modules: dict[int, nn.Module] = {}
    tensors: dict[int, Tensor] = {}

    def share(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        if id(tensor) not in tensors:
            own = tensor.detach()
            if isinstance(tensor, nn.Parameter):
                own = nn.Parameter(own, requires_grad=tensor.requires_grad)
            tensors[id(tensor)] = own
        return tensors[id(tensor)]

    def visit(module: nn.Module) -> nn.Module:
        if isinstance(module, torch.jit.ScriptModule):
            return module  # one piece, with no head to be found in it
        if id(module) not in modules:
            copied = modules[id(module)] = copy.copy(module)
            # Into the dictionary itself: some modules hand attributes on to what they wrap.
            own = copied.__dict__
            own["_parameters"] = {n: share(p) for n, p in module._parameters.items()}
            own["_buffers"] = {n: share(b) for n, b in module._buffers.items()}
            own["_modules"] = {
                n: None if child is None else visit(child) for n, child in module._modules.items()
            }
        return modules[id(module)]

    return visit(model)


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """The model with another module in place of an old one, wherever that stands."""
    if model is old:
        return new
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is old:
                module._modules[name] = new
    return model
