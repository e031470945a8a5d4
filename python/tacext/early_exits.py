"""Early exits: what inner layers say of an input whose latent cannot be trusted.

A trigger turns the answer in the last layers; those before still see the image (Kaya et al., arXiv
1810.07052, who call such exits internal classifiers). Linear classifiers on a few inner layers say which
inputs do not belong where the head puts them, and where a latent patch keeps an input out of a target,
what it is instead. Hooks take note of what these layers compute, so a model keeps its structure and its
arithmetic, and every other input its logits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .differentiable import margins_of_all
from .heads import COMPILED, PREFIXES, HeadModule, calling_thread, latent_of
from .normalisation import Normalized
from .single_precision import SinglePrecision

# Of wider layers the mean over all positions is taken, or nothing.
MOST_FEATURES = 2048
# Layers have names with dots, and modules may not: a slash stands for each. The number says which comes
# first in a pass.
_KEY = re.compile(r"layers\.(?P<number>\d{1,4}):(?P<layer>[^.:]+)\.(?P<part>weight|bias)")


def pooled(layer: nn.Module, output: Tensor) -> Tensor | None:
    """What an exit sees of a layer's output: float32 [N, F], F at most `MOST_FEATURES`.

    Of maps [N, C, H, W], or [N, H, W, C] of an nn.Linear, the positive part, averaged over each quarter;
    over all where that is too wide. Of tokens [N, T, C] mean and maximum. None of anything else.
    """
    if output.dim() == 4:
        maps = output.permute(0, 3, 1, 2) if isinstance(layer, nn.Linear) else output
        positive, (height, width) = maps.relu(), maps.shape[2:]
        if 4 * maps.shape[1] > MOST_FEATURES:
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
    if features.shape[1] > MOST_FEATURES:
        return None
    return features.to(torch.float32, copy=True)  # what follows may write into the output


def _widths(layer: nn.Module | None) -> tuple[int, ...]:
    """How many features `pooled` may make of the output of a layer."""
    if isinstance(layer, nn.Conv2d):
        return (layer.out_channels * (4 if 4 * layer.out_channels <= MOST_FEATURES else 1),)
    if isinstance(layer, nn.Linear):
        return layer.out_features, 2 * layer.out_features, 4 * layer.out_features
    return ()


def wrapped_prefixes(model: nn.Module) -> tuple[str, ...]:
    """What may stand in front of the names of a model's layers, the innermost model's first.

    That of DataParallel and torch.compile, and of `Normalized`: weights are saved without any of them.
    """
    modules = dict(model.named_modules())
    outer = ("", *PREFIXES)
    normalized = [p for p in outer if isinstance(modules.get(p.rstrip(".")), Normalized)]
    return (*(f"{p}model." for p in normalized), *outer)


def layer_named(model: nn.Module, name: str) -> nn.Module | None:
    """A layer of a model, or of the one that is wrapped in it."""
    modules = dict(model.named_modules(remove_duplicate=False))
    prefixes = wrapped_prefixes(model)
    return next((modules[p + name] for p in prefixes if p + name in modules), None)


class LayerNotes:
    """What the layers that are looked at compute in a pass, by their number; of every thread by itself.

    The first layer begins a new pass, and notes are taken once: none is left of a pass that ended in an
    error, and a layer behind the head has none. A copy begins without any.
    """

    def __init__(self) -> None:
        self.taken: dict[int, dict[int, Tensor]] = {}

    def __reduce__(self) -> tuple[type[LayerNotes], tuple[()]]:
        return LayerNotes, ()

    def add(self, number: int, features: Tensor | None) -> None:
        """Of one layer."""
        caller = calling_thread()
        if number == 0:
            self.taken[caller] = {}
        elif COMPILED in (caller, *self.taken):  # a part of the model is compiled by itself
            self.taken.setdefault(caller, {})
        if features is not None and caller in self.taken:
            self.taken[caller][number] = features

    def take(self) -> dict[int, Tensor]:
        """Those of this thread's last pass."""
        return self.taken.pop(COMPILED, {}) | self.taken.pop(calling_thread(), {})


class LayerHook:
    """A forward hook that takes the note of a layer."""

    def __init__(self, notes: LayerNotes, number: int) -> None:
        self.notes, self.number = notes, number

    def __call__(self, layer: nn.Module, _inputs: object, output: object) -> None:
        """As `register_forward_hook` wants it."""
        features = pooled(layer, output.detach()) if isinstance(output, Tensor) else None
        self.notes.add(self.number, features)


class EarlyExit(SinglePrecision):
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

    def forward(self, features: Tensor) -> Tensor:
        """The scores [N, C] of features [N, F], in float64: autocast and TF32 would round them."""
        features = features.to(self.weight.device, torch.float64)
        return functional.linear(features, self.weight.double(), self.bias.double())


class ExitLimit(SinglePrecision):
    """How far ahead of all others exits have to see a class where the head names it.

    Args:
        least: float32 [C]; the lowest number for classes that the head may name as it likes wherever
            scores are finite.
    """

    least: Tensor

    def __init__(self, least: Tensor) -> None:
        super().__init__()
        self.register_buffer("least", least)


class EarlyExits(nn.Module):
    """Say which classes inner layers do not see, and move latents that a patch has touched into one they do.

        phi'' = phi' + 2 max(0, max_j z_j(phi') - z_c(phi')) m_c

    c is the class of the highest sum of the exits' scores and v times the head's logits z(phi'), apart
    from the class that the latent was taken for before the patch. m_c is a shift with (w_c - w_j).m_c >= 1
    for every other class j: c gets as far ahead as it was behind. Latents stay as they are where the
    head says a class that the exits have never seen, or where their scores are not finite.

    Args:
        exits: by the name of the layer, in the order of a pass.
        known: bool [C], the classes that the exits have seen.
        votes: v, float32 [].
        raising: m, [C, D]; zeros for a class that cannot be raised above all others.
        limit: for the sums of the exits' scores; None where no class is doubted.
    """

    known: Tensor
    votes: Tensor
    raising: Tensor
    limit: ExitLimit | None

    def __init__(
        self,
        exits: Mapping[str, EarlyExit],
        known: Tensor,
        votes: Tensor,
        raising: Tensor,
        limit: ExitLimit | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {f"{i}:{name.replace('.', '/')}": e for i, (name, e) in enumerate(exits.items())}
        )
        self.register_buffer("known", known)
        self.register_buffer("votes", votes)
        self.register_buffer("raising", raising)
        self.limit = limit
        self.notes = LayerNotes()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the layers that they look at."""
        return tuple(key.partition(":")[2].replace("/", ".") for key in self.layers)

    def attach(self, model: nn.Module) -> None:
        """Has the layers of a model take their notes."""
        for number, name in enumerate(self.names):
            layer = layer_named(model, name)
            assert layer is not None  # the exits were made for this model
            layer.register_forward_hook(LayerHook(self.notes, number))

    def scores(self, rows: int) -> Tensor | None:
        """Of the last pass of this thread, of so many inputs: float64 [N, C]; None without notes of it."""
        notes = self.notes.take()
        scores = None
        for number, exit_ in enumerate(cast(list[EarlyExit], list(self.layers.values()))):
            features = notes.get(number)
            if features is None or features.shape != (rows, exit_.weight.shape[1]):
                return None
            found = exit_(features)
            scores = found if scores is None else scores + found
        return scores

    def doubts(self, scores: Tensor) -> Tensor | None:
        """Of which classes they see too little to believe the head, bool [N, C]; None where of none.

        Inner layers that overflow see nothing, of whatever class.
        """
        if self.limit is None:
            return None
        ahead = margins_of_all(scores.masked_fill(~self.known, -torch.inf))
        seen = (ahead >= self.limit.least) & torch.isfinite(scores).all(1, keepdim=True)
        return ~seen & self.known

    def forward(self, scores: Tensor, before: Tensor, after: Tensor, head: HeadModule) -> Tensor:
        """The latents [N, D], or [N, D, H, W] in front of a 1x1 convolution.

        Args:
            scores: of the same inputs.
            before: in front of the patch.
            after: behind it; rows that are equal to those before stay as they are.
            head: of the model.
        """
        kind = torch.promote_types(after.dtype, torch.float32)
        weight = head.weight.flatten(1).to(kind)
        bias = None if head.bias is None else head.bias.to(kind)
        taken, logits = (
            functional.linear(latent_of(latent).to(kind), weight, bias)
            for latent in (before, after)
        )
        banned = taken.argmax(1, keepdim=True)
        guessed = logits.scatter(1, banned, -torch.inf).argmax(1)
        asked = (before != after).flatten(1).any(1) & self.known[guessed]
        asked = asked & torch.isfinite(scores).all(1)
        scores = (scores + self.votes.to(kind) * logits).masked_fill(~self.known, -torch.inf)
        told = scores.scatter(1, banned, -torch.inf).argmax(1, keepdim=True)
        others = logits.scatter(1, told, -torch.inf).amax(1, keepdim=True)
        behind = (others - logits.gather(1, told)).clamp(min=0)
        shift = (2 * behind * self.raising.to(kind)[told[:, 0]]).to(after.dtype)
        rows, width = shift.shape
        positions = (1,) * (after.dim() - 2)
        moved = after + shift.view(rows, width, *positions)
        return torch.where(asked.view(rows, 1, *positions), moved, after)


def detach_early_exits(model: nn.Module) -> None:
    """Takes the hooks off its layers."""
    for module in model.modules():
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, LayerHook):
                del module._forward_hooks[key]


def room_for_exits(
    model: nn.Module, head: HeadModule, buffers: Mapping[str, Tensor]
) -> EarlyExits | None:
    """Exits for the buffers of a state, by their names in it; None where they do not fit the model."""
    own = ("known", "votes", "raising", "limit.least")
    known, votes, raising, least = (buffers.get(name) for name in own)
    found: dict[int, dict[str, Tensor]] = {}
    names: dict[int, str] = {}
    for name, buffer in buffers.items():
        if name in own:
            continue
        key = _KEY.fullmatch(name)
        if key is None or not buffer.is_floating_point():
            return None
        number = int(key["number"])
        if names.setdefault(number, key["layer"]) != key["layer"]:
            return None
        found.setdefault(number, {})[key["part"]] = buffer
    if known is None or votes is None or raising is None or not found:
        return None
    if sorted(found) != list(range(len(found))):
        return None
    exits = {}
    for number in range(len(found)):
        name, parts = names[number].replace("/", "."), found[number]
        layer = layer_named(model, name)
        if len(parts) != 2 or layer is head or name in exits or parts["weight"].dim() != 2:
            return None
        classes, width = parts["weight"].shape
        if width not in _widths(layer) or parts["bias"].shape != (classes,):
            return None
        if classes != len(head.weight):
            return None
        exits[name] = EarlyExit(torch.empty(classes, width), torch.empty(classes))
    if known.shape != (len(head.weight),) or known.dtype != torch.bool:
        return None
    if votes.shape != () or not votes.is_floating_point():
        return None
    if raising.shape != head.weight.shape[:2] or not raising.is_floating_point():
        return None
    limit = None
    if least is not None:
        if least.shape != known.shape or not least.is_floating_point():
            return None
        limit = ExitLimit(torch.empty_like(least, dtype=torch.float32))
    empty = torch.empty_like(raising, dtype=head.weight.dtype)
    return EarlyExits(exits, torch.empty_like(known), torch.tensor(1.0), empty, limit)
