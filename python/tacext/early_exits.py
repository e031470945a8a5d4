"""Early exits: what inner layers say of an input whose latent cannot be trusted.

A trigger turns the answer in the last layers; those before still see the image (Kaya et al., arXiv
1810.07052, who call such exits internal classifiers). Where a latent patch keeps an input out of a target,
linear classifiers on a few inner layers say what it is instead. Hooks take note of what these layers
compute, so a model keeps its structure and its arithmetic, and every other input its logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .heads import HeadModule, calling_thread, latent_of

# Layers have names with dots, and modules may not: a slash stands for each.
_DOT, _SLASH = ".", "/"
# Of wider layers the mean over all positions is taken, or nothing.
MOST_FEATURES = 2048


def pooled(output: Tensor) -> Tensor | None:
    """What an exit sees of a layer's output: [N, F], F at most `MOST_FEATURES`; None where it can't.

    Of maps [N, C, H, W] the positive part, averaged over each quarter; over all where that is too
    wide. Of tokens [N, T, C] mean and maximum.
    """
    if output.dim() == 4:
        positive, (height, width) = output.relu(), output.shape[2:]
        if 4 * output.shape[1] > MOST_FEATURES:
            features = positive.mean((2, 3))
        else:
            quarters = [
                positive[:, :, rows, columns].mean((2, 3))
                for rows in (slice(0, -(-height // 2)), slice(height // 2, height))
                for columns in (slice(0, -(-width // 2)), slice(width // 2, width))
            ]
            features = torch.cat(quarters, 1)
    elif output.dim() == 3:
        features = torch.cat([output.mean(1), output.amax(1)], 1)
    elif output.dim() == 2:
        features = output
    else:
        return None
    return features.float() if features.shape[1] <= MOST_FEATURES else None


class LayerNote:
    """A forward hook that takes a note of what a layer computes, one for every thread."""

    def __init__(self) -> None:
        self.taken: dict[int, Tensor] = {}

    def __call__(self, _module: nn.Module, _inputs: object, output: object) -> None:
        """As `register_forward_hook` wants it."""
        features = pooled(output.detach()) if isinstance(output, Tensor) else None
        if features is not None:
            self.taken[calling_thread()] = features

    def take(self) -> Tensor | None:
        """The features [N, F] of this thread's last pass, once."""
        return self.taken.pop(calling_thread(), None)


class EarlyExit(nn.Module):
    """A linear classifier on an inner layer.

    Args:
        weight: float32 [C, F], on what `pooled` makes of the layer's output.
        bias: float32 [C].
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.note = LayerNote()

    def forward(self, features: Tensor) -> Tensor:
        """The scores [N, C] of features [N, F], in float32."""
        return functional.linear(features, self.weight.float(), self.bias.float())


class EarlyExits(nn.Module):
    """Moves latents that a patch has touched into the class that inner layers see.

        phi'' = phi' + 2 max(0, max_j z_j(phi') - z_c(phi')) m_c

    c is the class of the highest sum of the exits' scores and of the head's, log softmax(z(phi')), apart
    from the class that the latent was taken for before the patch. m_c is a shift with (w_c - w_j).m_c >= 1
    for every other class j: c gets as far ahead as it was behind. Where an exit has no note of the
    pass, latents stay as they are.

    Args:
        exits: by the name of the layer.
        raising: m, [C, D]; zeros for a class that cannot be raised above all others.
    """

    raising: Tensor

    def __init__(self, exits: Mapping[str, EarlyExit], raising: Tensor) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({n.replace(_DOT, _SLASH): e for n, e in exits.items()})
        self.register_buffer("raising", raising)

    @property
    def names(self) -> tuple[str, ...]:
        """Of the layers that they look at."""
        return tuple(name.replace(_SLASH, _DOT) for name in self.layers)

    def attach(self, model: nn.Module) -> None:
        """Has the layers of a model take their notes."""
        for name, exit_ in zip(self.names, self._exits(), strict=True):
            model.get_submodule(name).register_forward_hook(exit_.note)

    def _exits(self) -> list[EarlyExit]:
        return cast(list[EarlyExit], list(self.layers.values()))

    def _scores(self, rows: int) -> Tensor | None:
        notes = [exit_.note.take() for exit_ in self._exits()]  # all of them, or some would linger
        scores = None
        for exit_, features in zip(self._exits(), notes, strict=True):
            if features is None or features.shape != (rows, exit_.weight.shape[1]):
                return None
            found = exit_(features)
            scores = found if scores is None else scores + found
        return scores

    def forward(self, before: Tensor, after: Tensor, head: HeadModule) -> Tensor:
        """The latents [N, D], or [N, D, H, W] in front of a 1x1 convolution.

        Args:
            before: in front of the patch.
            after: behind it; rows that are equal to those before stay as they are.
            head: of the model.
        """
        scores = self._scores(after.shape[0])
        if scores is None:
            return after
        kind = torch.promote_types(after.dtype, torch.float32)
        weight = head.weight.flatten(1).to(kind)
        bias = None if head.bias is None else head.bias.to(kind)
        taken, logits = (
            functional.linear(latent_of(latent).to(kind), weight, bias)
            for latent in (before, after)
        )
        scores = scores + logits.log_softmax(1)
        told = scores.scatter(1, taken.argmax(1, keepdim=True), -torch.inf).argmax(1, keepdim=True)
        others = logits.scatter(1, told, -torch.inf).amax(1, keepdim=True)
        behind = (others - logits.gather(1, told)).clamp(min=0)
        shift = (2 * behind * self.raising.to(kind)[told[:, 0]]).to(after.dtype)
        touched = (before != after).flatten(1).any(1)
        shape = (after.shape[0], -1, *(1 for _ in range(after.dim() - 2)))
        return torch.where(touched.view(shape), after + shift.view(shape), after)


def detach_early_exits(model: nn.Module) -> None:
    """Takes the hooks off its layers."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, LayerNote):
                del module._forward_hooks[key]


def room_for_exits(
    model: nn.Module, head: HeadModule, buffers: Mapping[str, Tensor]
) -> EarlyExits | None:
    """Exits for the values of a state, by their names in it; None where they do not fit the model."""
    raising, exits = buffers.get("raising"), {}
    names = [key.removesuffix(".weight") for key in buffers if key.endswith(".weight")]
    if raising is None or 2 * len(names) + 1 != len(buffers) or not names:
        return None
    layers = dict(model.named_modules())
    for name in names:
        weight, bias = buffers[f"{name}.weight"], buffers.get(f"{name}.bias")
        layer = name.removeprefix("layers.").replace(_SLASH, _DOT)
        if bias is None or weight.dim() != 2 or weight.shape[1] not in _widths(layers.get(layer)):
            return None
        if bias.shape != weight.shape[:1] or len(bias) != len(head.weight):
            return None
        exits[layer] = EarlyExit(torch.empty_like(weight).float(), torch.empty_like(bias).float())
    floating = all(buffer.is_floating_point() for buffer in buffers.values())
    if not floating or raising.shape != head.weight.shape[:2]:
        return None
    return EarlyExits(exits, torch.empty_like(raising, dtype=head.weight.dtype))


def _widths(layer: nn.Module | None) -> tuple[int, ...]:
    """How many features `pooled` may make of the output of a layer."""
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels * (4 if 4 * layer.out_channels <= MOST_FEATURES else 1),)
    if isinstance(layer, nn.Linear):
        return layer.out_features, 2 * layer.out_features
    return ()
