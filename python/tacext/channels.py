"""The channels of a network that can be made constant, and what each does to a margin.

A channel is made constant in the parameters alone: the filter and the bias that make it become zero,
and where a batch norm follows, its scale too, so that its shift is all that comes out. The
architecture stays what it was, and so does the file format.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .heads import Head, evaluating, model_device, model_dtype
from .heads import run_model as run
from .neurons import LAYERS, channels_second

Objective = Callable[[Tensor, int], Tensor]  # a batch, and the index of its first input: [N]


@dataclass(frozen=True, eq=False)
class ChannelLayer:
    """A layer whose channels can be made constant one by one.

    Attributes:
        name: of the layer in `model.named_modules()`.
        layer: the convolution or linear layer that makes the channels.
        norm: the batch norm that they go through next; None where there is none.
    """

    name: str
    layer: nn.Module
    norm: _BatchNorm | None

    @property
    def channels(self) -> int:
        """How many there are."""
        return len(self.layer.weight)  # type: ignore[arg-type]

    @property
    def point(self) -> nn.Module:
        """The module whose output is made constant."""
        return self.layer if self.norm is None else self.norm

    @property
    def takes_any_value(self) -> bool:
        """Whether a channel can be given any constant; without a bias it can only be silent."""
        return self.norm is not None or self.layer.bias is not None

    def second(self, values: Tensor) -> Tensor:
        """Outputs of the point as [N, channels, positions]."""
        return (
            channels_second(self.layer, values).flatten(2)
            if values.dim() > 2
            else values[..., None]
        )


@dataclass(frozen=True, eq=False)
class Masked:
    """What a channel was before it was made constant."""

    parts: tuple[tuple[Tensor, int, Tensor], ...]

    @torch.no_grad()
    def undo(self) -> None:
        """Brings it back."""
        for parameter, channel, value in self.parts:
            parameter[channel] = value


@torch.no_grad()
def mask(layer: ChannelLayer, channel: int, value: float) -> Masked:
    """Makes one channel of the point's output constant, or 0 where the layer has no bias."""
    constant = value if layer.takes_any_value else 0.0
    weight, bias = layer.layer.weight, layer.layer.bias
    settings = [(weight, 0.0)]
    if layer.norm is not None:
        settings += [(layer.norm.weight, 0.0), (layer.norm.bias, constant)]
        constant = 0.0
    if bias is not None:
        settings.append((bias, constant))
    parts = []
    for parameter, becomes in settings:
        assert isinstance(parameter, Tensor)
        parts.append((parameter, channel, parameter[channel].clone()))
        parameter[channel] = becomes
    return Masked(tuple(parts))


def maskable_layers(model: nn.Module, head: Head, example: Tensor) -> tuple[ChannelLayer, ...]:
    """The convolutions and linear layers, except the head, whose channels can be made constant.

    In order of execution. Left out are those that a pass calls never or several times, share
    a parameter with another module or compute it anew: a mask would reach further than its channel.

    Args:
        model: to look at, in evaluation mode; left as it was.
        head: of the model.
        example: a few inputs [N, ...].
    """
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    names = {module: name for name, module in model.named_modules()}
    calls: Counter[nn.Module] = Counter()
    outputs: list[tuple[nn.Module, Tensor]] = []
    norms: dict[nn.Module, _BatchNorm] = {}

    def note(module: nn.Module, _inputs: object, output: object) -> None:
        calls[module] += 1
        if isinstance(output, Tensor) and output.dim() >= 2:
            outputs.append((module, output))

    def note_norm(norm: nn.Module, inputs: tuple[object, ...]) -> None:
        calls[norm] += 1
        assert isinstance(norm, _BatchNorm)
        norms.update({module: norm for module, output in outputs if inputs[0] is output})

    handles = []
    for module in names:
        if isinstance(module, LAYERS) and module is not head.module:
            handles.append(module.register_forward_hook(note))
        if isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(note_norm))
    try:
        with evaluating(model), torch.no_grad():
            run(model, example, "prune")
    finally:
        for handle in handles:
            handle.remove()

    def own(module: nn.Module) -> bool:
        parameters = [module.weight, module.bias]
        plain = all(p is None or (isinstance(p, nn.Parameter)) for p in parameters)
        alone = all(owners[id(p)] == 1 for p in parameters if p is not None)
        return calls[module] == 1 and module.weight is not None and plain and alone

    found = []
    for module, _ in outputs:
        norm = norms.get(module)
        if own(module):
            usable = norm is not None and own(norm) and norm.bias is not None
            found.append(ChannelLayer(names[module], module, norm if usable else None))
    return tuple(found)


@contextlib.contextmanager
def _recording(layers: Sequence[ChannelLayer]) -> Iterator[dict[ChannelLayer, Tensor]]:
    """The outputs of every point in the last pass, parts of its graph."""
    seen: dict[ChannelLayer, Tensor] = {}

    def hook(layer: ChannelLayer) -> Callable[[nn.Module, object, Tensor], Tensor]:
        def keep(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
            seen[layer] = output
            return output.clone()  # what an in-place layer may now overwrite is the copy

        return keep

    handles = [layer.point.register_forward_hook(hook(layer)) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True, eq=False)
class Contributions:
    """First-order shares of every channel in an objective, float32 [N, channels of all layers].

    Attributes:
        objective: [N], its value for each input.
        pushed: sum over positions of activation times gradient.
        gradient: sum over positions of the gradient.
    """

    objective: Tensor
    pushed: Tensor
    gradient: Tensor

    def of_constant(self, value: Tensor) -> Tensor:
        """What the objective loses, to first order, where each channel is a constant [channels]."""
        return self.pushed - value * self.gradient


def contributions(
    model: nn.Module,
    layers: Sequence[ChannelLayer],
    inputs: Tensor,
    objective: Objective,
    batch_size: int,
) -> Contributions:
    """Runs the model on inputs [N, ...] and takes the objective apart, channel by channel.

    The mean of `pushed` over the samples is what `ops.neuron_scores` computes of the same.
    """
    device, dtype = model_device(model), model_dtype(model)
    values, pushed, slopes = [], [], []
    first = 0
    for batch in inputs.split(batch_size):
        with evaluating(model), torch.enable_grad(), _recording(layers) as seen:
            placed = batch.detach().to(device, dtype).requires_grad_()  # all else may be frozen
            value = objective(placed, first)
            outputs = [seen[layer] for layer in layers]
            gradients = torch.autograd.grad(value.sum(), outputs, allow_unused=True)
        rows = []
        for layer, output, gradient in zip(layers, outputs, gradients, strict=True):
            slope = torch.zeros_like(output) if gradient is None else gradient
            activation, slope = (layer.second(v.detach()).float() for v in (output, slope))
            rows.append(((activation * slope).sum(2), slope.sum(2)))
        values.append(value.detach().float().cpu())
        pushed.append(torch.cat([row[0] for row in rows], 1).cpu())
        slopes.append(torch.cat([row[1] for row in rows], 1).cpu())
        first += len(batch)
    return Contributions(torch.cat(values), torch.cat(pushed), torch.cat(slopes))


@torch.no_grad()
def channel_means(
    model: nn.Module, layers: Sequence[ChannelLayer], inputs: Tensor, batch_size: int
) -> Tensor:
    """Mean output of every channel, float32 [channels of all layers]; 0 where it can only be silent."""
    totals = torch.zeros(sum(layer.channels for layer in layers))
    with evaluating(model), _recording(layers) as seen:
        for batch in inputs.split(batch_size):
            run(model, batch, "prune")
            means = [
                layer.second(seen[layer]).float().mean((0, 2)) * layer.takes_any_value
                for layer in layers
            ]
            totals += torch.cat(means).cpu() * len(batch)
    return totals / len(inputs)
