"""The latent patch: a limit in front of the head that takes the trigger's change off again.

Nothing is trained. What leads inputs into a target (`input_adversary`) moves their latents as the
trigger does, and so three things are known of each such way: along which direction these latents
differ from the clean ones of the target, which change they carry, and what they were without. A
latent that the head takes for the target, and that lies further along than clean ones do, has the
change taken off; where the target is still ahead, its logit is lowered. Of a way that nobody found
only this is known, that latents which take it lie where clean ones of the target do not: they are
told as a guard tells them, and the logit is lowered. So it is where inner layers do not see the target.
All others pass as they are, bit by bit.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from .early_exits import EarlyExits, detach_early_exits, room_for_exits
from .errors import InputError
from .guard_scoring import PARTS, LatentScorer
from .heads import Head, HeadModule

logger = logging.getLogger(__name__)

_BUFFERS = ("direction", "threshold", "centre", "change", "left", "right", "lowering", "targets")
_LIMIT_BUFFERS = (
    *("mean", "inverse_spread", "basis", "near_weight", "far_weight", "direction"),
    *("location", "inverse_deviation", "limit"),
)


class LatentLimit(LatentScorer):
    """Tells latents that lie where clean ones of the class they are taken for do not.

    Attributes:
        limit: float32 [C], the highest score that passes; the largest number for classes without a limit.
    """

    limit: Tensor

    def __init__(self, limit: Tensor, **scorer: Tensor) -> None:
        super().__init__(**scorer)
        self.register_buffer("limit", limit)

    def forward(self, latent: Tensor, logits: Tensor) -> Tensor:
        """Whether each latent [N, D] with logits [N, C] is beyond it, bool [N]."""
        latent, logits = latent.detach(), logits.detach()
        return self.score(latent, logits) > self.limit[logits.argmax(1)]


class LatentPatch(nn.Module):
    """The limits of all ways into the targets.

        phi' = psi - 2 max(0, z_t(psi) - max_j z_j(psi)) m_k
        psi = phi - min(e, 1) (d_k + (phi - a_k) B_k)

    of a latent that the head takes for a target t. Of K ways into the targets each has a limit:
    e_k = max(0, v_k.phi - c_k) says how far the latent lies beyond the clean ones of t, in units of
    what the way does. e is the largest of t's ways, and k is the way whose mean a_k is nearest among
    those with e_k > 0, one whose change is known if there is any. d_k is the mean change of that way,
    B_k says how the change depends on the latent, and m_k lowers t against every other class, by 1 at
    least: t falls as far behind as it was ahead, or further. Of a latent that is beyond its class's
    `LatentLimit`, too, and of one whose class `EarlyExits` doubt, e_k is 1 at least for the ways whose
    change is not known.

    Args:
        direction: v, [K, D].
        threshold: c, [K].
        centre: a, [K, D].
        change: d, [K, D].
        left, right: B of rank R, [K, D, R] and [K, R, D].
        lowering: m, [K, D].
        targets: the class that each way leads to, int64 [K].
        limit: what tells latents that lie where clean ones of a target do not; None for nothing. For
            every target that it limits, or exits doubt, there must be a way of which the change is not
            known.
    """

    direction: Tensor
    threshold: Tensor
    centre: Tensor
    change: Tensor
    left: Tensor
    right: Tensor
    lowering: Tensor
    targets: Tensor

    def __init__(
        self,
        direction: Tensor,
        threshold: Tensor,
        centre: Tensor,
        change: Tensor,
        left: Tensor,
        right: Tensor,
        lowering: Tensor,
        targets: Tensor,
        *,
        limit: LatentLimit | None = None,
    ) -> None:
        super().__init__()
        given = (direction, threshold, centre, change, left, right, lowering, targets)
        for name, value in zip(_BUFFERS, given, strict=True):
            self.register_buffer(name, value)
        self.limit = limit

    def forward(self, latent: Tensor, head: HeadModule, doubted: Tensor | None = None) -> Tensor:
        """The latents [N, D], or [N, D, H, W] in front of a 1x1 convolution, with the limits on.

        `doubted`, bool [N, C], says where something else does not believe a class.
        """
        phi = latent if latent.dim() == 2 else latent.flatten(2).mean(2)
        # Half precision overflows in squares of latents, and picks the wrong way.
        kind = torch.promote_types(phi.dtype, torch.float32)
        phi, weight = phi.to(kind), head.weight.flatten(1).to(kind)
        bias = None if head.bias is None else head.bias.to(kind)
        centre, left, right = self.centre.to(kind), self.left.to(kind), self.right.to(kind)
        logits = functional.linear(phi, weight, bias)
        taken = logits.argmax(dim=1)
        unknown = (self.change == 0).all(dim=1)
        excess = (phi @ self.direction.to(kind).T - self.threshold.to(kind)).clamp(min=0)
        if self.limit is not None:
            beyond = self.limit(phi, logits)[:, None] & unknown
            excess = torch.where(beyond, excess.clamp(min=1), excess)
        if doubted is not None:
            beyond = doubted.gather(1, taken[:, None]) & unknown
            excess = torch.where(beyond, excess.clamp(min=1), excess)
        excess = excess * (taken[:, None] == self.targets)  # [N, K]
        largest = excess.amax(dim=1)
        # ||phi - a_k||^2 less what all ways share, as products alone.
        apart = centre.square().sum(1) - 2 * (phi @ centre.T)
        far = apart.masked_fill(excess <= 0, torch.inf)
        known = far.masked_fill(unknown, torch.inf)
        some = torch.isfinite(known).any(dim=1, keepdim=True)
        nearest = torch.where(some, known, far).argmin(dim=1)
        ways, width, rank = left.shape
        one = functional.one_hot(nearest, ways).to(phi)
        turned = torch.einsum("nd,kdr->nkr", phi, left) - torch.einsum("kd,kdr->kr", centre, left)
        turned = turned * one[:, :, None]
        change = one @ self.change.to(kind) + turned.flatten(1) @ right.reshape(ways * rank, width)
        correction = largest.clamp(max=1)[:, None] * change
        logits = functional.linear(phi - correction, weight, bias)
        others = logits.scatter(1, taken[:, None], -torch.inf).amax(dim=1)
        ahead = (logits.gather(1, taken[:, None])[:, 0] - others).clamp(min=0)
        correction = correction + 2 * ahead[:, None] * (one @ self.lowering.to(kind))
        correction = correction.to(latent.dtype)
        rows, width = phi.shape
        positions = (1,) * (latent.dim() - 2)
        touched = (largest > 0).view(rows, 1, *positions)
        return torch.where(touched, latent - correction.view(rows, width, *positions), latent)


class PatchedHead(nn.Module):
    """A head with a latent patch in front of it.

    Args:
        patch: what keeps latents out of the targets.
        head: of the model.
        exits: what says where these belong; None leaves it to the head.
    """

    def __init__(
        self, patch: LatentPatch, head: HeadModule, exits: EarlyExits | None = None
    ) -> None:
        super().__init__()
        self.patch = patch
        self.head = head
        self.exits = exits

    def forward(self, latent: Tensor) -> Tensor:
        """The logits of the limited latents."""
        scores = None if self.exits is None else self.exits.scores(latent.shape[0])
        if self.exits is None or scores is None:
            return cast(Tensor, self.head(self.patch(latent, self.head)))
        limited = self.patch(latent, self.head, self.exits.doubts(scores))
        limited = self.exits(scores, latent, limited, self.head)
        return cast(Tensor, self.head(limited))


def with_latent_patch(
    model: nn.Module, head: Head, patch: LatentPatch, exits: EarlyExits | None = None
) -> tuple[nn.Module, Head]:
    """A copy of the model with the patch in front of its head, and the head in that copy."""
    copied = copy.deepcopy(model)
    module = cast(HeadModule, copied.get_submodule(head.name))
    if exits is not None:
        exits.attach(copied)
    copied = _replace(copied, module, PatchedHead(patch, module, exits))
    return copied, Head(f"{head.name}.head" if head.name else "head", module)


def has_latent_patch(model: nn.Module) -> bool:
    """Whether there is one anywhere in the model."""
    return any(isinstance(module, PatchedHead) for module in model.modules())


def patch_in_front(model: nn.Module, head: Head) -> PatchedHead | None:
    """The latent patch in front of this head; None where there is none, or elsewhere."""
    patches = (m for m in model.modules() if isinstance(m, PatchedHead))
    return next((patch for patch in patches if patch.head is head.module), None)


def remove_latent_patch(model: nn.Module) -> nn.Module:
    """A copy of the model without its latent patch: bit by bit what it was before.

    Args:
        model: as `repair(..., method="patch")` returns it.

    Raises:
        InputError: the model has no latent patch.
    """
    copied = copy.deepcopy(model)
    if not has_latent_patch(copied):
        raise InputError.of(
            "remove_latent_patch",
            "model",
            expected="a model with a latent patch",
            got=f"{type(model).__name__} without one",
            way_out='pass the model of repair(..., method="patch")',
        )
    for module in [m for m in copied.modules() if isinstance(m, PatchedHead)][::-1]:
        copied = _replace(copied, module, module.head)  # the innermost first
    detach_early_exits(copied)
    return copied


def make_room_for_patches(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """The model with a `PatchedHead` wherever a state has the buffers of one.

    Their values are loaded by `load_state_dict` with all others. What does not fit is left as it is,
    for the loader to complain about.
    """
    modules = dict(model.named_modules())
    ending = "patch.direction"
    for key in [k for k in state if k == ending or k.endswith(f".{ending}")]:
        prefix = key[: -len("direction")]
        head = modules.get(prefix.removesuffix("patch.").removesuffix("."))
        buffers = _named(state, prefix, _BUFFERS)
        limit = _named(state, f"{prefix}limit.", _LIMIT_BUFFERS)
        if isinstance(head, nn.Linear | nn.Conv2d) and _fit(head, buffers, limit):
            patch = LatentPatch(**_empty(buffers, head.weight.dtype), limit=_empty_limit(limit))
            start = prefix.removesuffix("patch.")
            exits = room_for_exits(model, head, _below(state, f"{start}exits."))
            if exits is not None:
                exits.attach(model)
            name = start.removesuffix(".")
            logger.info("load_model: a latent patch, as of a repair, stands in front of %r", name)
            model = _put(model, name, PatchedHead(patch, head, exits))
    return model


def _named(state: Mapping[str, Tensor], prefix: str, names: Sequence[str]) -> dict[str, Tensor]:
    return {name: state[prefix + name] for name in names if prefix + name in state}


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


def _empty(buffers: Mapping[str, Tensor], floating: torch.dtype) -> dict[str, Any]:
    return {
        name: torch.empty_like(b, dtype=floating if b.is_floating_point() else b.dtype)
        for name, b in buffers.items()
    }


def _empty_limit(buffers: Mapping[str, Tensor]) -> LatentLimit | None:
    return LatentLimit(**_empty(buffers, torch.float32)) if buffers else None


def _fit(head: HeadModule, buffers: Mapping[str, Tensor], limit: Mapping[str, Tensor]) -> bool:
    """Whether these are all buffers of a patch of this head, in shape and dtype."""
    if len(buffers) != len(_BUFFERS) or buffers["left"].dim() != 3:
        return False
    ways, width, rank = buffers["left"].shape
    classes = head.weight.shape[0]
    targets = buffers["targets"]
    if not ways or targets.dtype != torch.int64 or bool((targets < 0).any()):
        return False
    if bool((targets >= classes).any()):
        return False
    if width != head.weight.shape[1]:
        return False
    long, short = (ways, width), (ways,)
    shapes = (long, short, long, long, (*long, rank), (ways, rank, width), long, short)
    fitting = all(
        buffer.shape == shape and buffer.is_floating_point() == (name != "targets")
        for (name, buffer), shape in zip(buffers.items(), shapes, strict=True)
    )
    return fitting and (not limit or _fits_limit(head, limit))


def _fits_limit(head: HeadModule, buffers: Mapping[str, Tensor]) -> bool:
    if len(buffers) != len(_LIMIT_BUFFERS) or buffers["basis"].dim() != 2:
        return False
    classes, width = head.weight.shape[:2]
    rank, each, parts = len(buffers["basis"]), (classes, width), (classes, len(PARTS))
    square = (rank + 1,)
    shapes = (each, (width,), (rank, width), square, square, each, parts, parts, (classes,))
    return all(
        buffer.shape == shape and buffer.is_floating_point()
        for buffer, shape in zip(buffers.values(), shapes, strict=True)
    )


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> nn.Module:
    """The model with another module under every name that the old one has."""
    names = [name for name, m in model.named_modules(remove_duplicate=False) if m is old]
    for name in names:
        model = _put(model, name, new)
    return model


def _put(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    if not name:
        return module
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, module)
    return model
