"""The latent patch: a limit in front of the head that takes the trigger's change off again.

Nothing is trained. What leads inputs into a target (`input_adversary`) moves their latents as the
trigger does, and so three things are known of each such way: along which direction these latents
differ from the clean ones of the target, which change they carry, and what they were without. A
latent that the head takes for the target, and that lies further along than clean ones do, has the
change taken off; where the target is still ahead, its logit is lowered. All others pass as they are,
bit by bit.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import ops
from .errors import InputError, counted
from .heads import Head, HeadModule
from .repair_settings import RepairSettings, check_settings, is_number, is_whole

logger = logging.getLogger(__name__)

# Rows that covariances are taken of, at most; more tell little and take their time.
_MOST_ROWS = 512
# The limit is at its full height where all but this share of what leads into the target lies, but no
# nearer to the clean ones than this share of the way.
_BELOW_FULL = 0.05
_NEAREST = 0.1
# Directions are tried on rows that had no part in them, in so many folds.
_FOLDS = 4

_BUFFERS = ("direction", "threshold", "centre", "change", "left", "right", "lowering", "targets")


@dataclass(frozen=True, kw_only=True)
class PatchSettings(RepairSettings):
    """Settings of `repair(..., method="patch")`.

    Attributes:
        untouched: share of the clean samples that the model takes for a target that must pass as
            they are.
        rank: in how many directions the change may differ from input to input.
        rounds: how often ways into the targets are looked for, each time in spite of the limits that
            are there, at most.
    """

    untouched: float = 0.98
    rank: int = 32
    rounds: int = 3

    def __post_init__(self) -> None:
        good = is_number(self.untouched) and 0 < self.untouched <= 1
        check_settings(
            self,
            (
                ("untouched", good, "a share above 0, 1 at most"),
                ("rank", is_whole(self.rank) and self.rank >= 0, "a whole number, 0 or more"),
                ("rounds", is_whole(self.rounds) and self.rounds >= 1, "at least 1"),
            ),
        )


class LatentPatch(nn.Module):
    """The limits of all ways into the targets.

        phi' = psi - 2 max(0, z_t(psi) - max_j z_j(psi)) m_k
        psi = phi - min(e, 1) (d_k + (phi - a_k) B_k)

    of a latent that the head takes for a target t. Of K ways into the targets each has a limit:
    e_k = max(0, v_k.phi - c_k) says how far the latent lies beyond the clean ones of t, in units of
    what the way does. e is the largest of t's ways, and k is the way whose mean a_k is nearest among
    those with e_k > 0, one whose change is known if there is any. d_k is the mean change of that way, B_k says how the change depends on the
    latent, and m_k lowers t against every other class, by 1 at least: t falls as far behind as it was
    ahead, or further.

    Args:
        direction: v, [K, D].
        threshold: c, [K].
        centre: a, [K, D].
        change: d, [K, D].
        left, right: B of rank R, [K, D, R] and [K, R, D].
        lowering: m, [K, D].
        targets: the class that each way leads to, int64 [K].
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
    ) -> None:
        super().__init__()
        given = (direction, threshold, centre, change, left, right, lowering, targets)
        for name, value in zip(_BUFFERS, given, strict=True):
            self.register_buffer(name, value)

    def forward(self, latent: Tensor, head: HeadModule) -> Tensor:
        """The latents [N, D], or [N, D, H, W] in front of a 1x1 convolution, with the limits on."""
        phi = latent if latent.dim() == 2 else latent.flatten(2).mean(2)
        # Half precision overflows in squares of latents, and picks the wrong way.
        kind = torch.promote_types(phi.dtype, torch.float32)
        phi, weight = phi.to(kind), head.weight.flatten(1).to(kind)
        bias = None if head.bias is None else head.bias.to(kind)
        centre, left, right = self.centre.to(kind), self.left.to(kind), self.right.to(kind)
        taken = functional.linear(phi, weight, bias).argmax(dim=1)
        excess = (phi @ self.direction.to(kind).T - self.threshold.to(kind)).clamp(min=0)
        excess = excess * (taken[:, None] == self.targets)  # [N, K]
        largest = excess.amax(dim=1)
        # ||phi - a_k||^2 less what all ways share, as products alone.
        apart = centre.square().sum(1) - 2 * (phi @ centre.T)
        unknown = (self.change == 0).all(dim=1)
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
        shape = (len(phi), -1, *(1 for _ in range(latent.dim() - 2)))
        touched = (largest > 0).view(-1, *(1 for _ in range(latent.dim() - 1)))
        return torch.where(touched, latent - correction.view(shape), latent)


class PatchedHead(nn.Module):
    """A head with a latent patch in front of it."""

    def __init__(self, patch: LatentPatch, head: HeadModule) -> None:
        super().__init__()
        self.patch = patch
        self.head = head

    def forward(self, latent: Tensor) -> Tensor:
        """The logits of the limited latents."""
        return cast(Tensor, self.head(self.patch(latent, self.head)))


@dataclass(frozen=True, eq=False)
class LedLatents:
    """Latents of inputs that something leads into a target.

    Attributes:
        target: the class.
        latent: of the inputs with the change on, [N, D].
        clean: of the same inputs without, [N, D]; None where no inputs do it, and the change that a
            trigger makes is not known: such a way lowers the target's logit and takes nothing off.
    """

    target: int
    latent: Tensor
    clean: Tensor | None


def fit_latent_patch(
    head: Head, clean: Tensor, ways: Sequence[LedLatents], settings: PatchSettings
) -> LatentPatch:
    """Solves for the patch in float64; no training, no gradients.

    Args:
        head: of the model.
        clean: latents of clean samples [N, D].
        ways: what leads into each target, of each one at least two latents.
        settings: see `PatchSettings`.

    Returns:
        LatentPatch in the head's dtype, on its device.

    Raises:
        InputError: no clean sample that the model takes for a target.
    """
    weight = head.weight.detach().double()
    bias = torch.zeros(len(weight)).to(weight)
    if head.module.bias is not None:
        bias = head.module.bias.detach().double()
    if not ways:
        raise InputError.of(
            "repair",
            "targets",
            expected="something that leads into each target",
            got="nothing that was found",
            way_out='repair with method="finetune"',
        )
    clean = clean.to(weight)
    predicted = (clean @ weight.T + bias).argmax(1)
    solved = []
    for way in ways:
        own = clean[predicted == way.target]
        if len(own) < 2:
            raise InputError.of(
                "repair",
                "data",
                expected=f"clean samples that the model takes for class {way.target}",
                got=counted(len(own), "sample"),
                way_out='pass more samples, or repair with method="finetune"',
            )
        latent = way.latent.to(weight)
        before = None if way.clean is None else way.clean.to(weight)
        # All limits of a target together touch no more clean samples than one may.
        limits = sum(other.target == way.target for other in ways)
        touched = (1 - settings.untouched) / limits
        solved.append(
            _limit(
                weight,
                way.target,
                own,
                latent,
                before,
                touched,
                min(settings.rank, head.latent_dim),
            )
        )
    buffers = [torch.stack(part).to(head.weight) for part in zip(*solved, strict=True)]
    buffers.append(torch.tensor([way.target for way in ways], device=head.weight.device))
    return LatentPatch(*buffers)


def _limit(
    weight: Tensor,
    target: int,
    own: Tensor,
    latent: Tensor,
    before: Tensor | None,
    touched: float,
    most_rank: int,
) -> tuple[Tensor, ...]:
    """All buffers but the targets for one way, without their first dimension."""
    centre, spread = latent.mean(0), latent - latent.mean(0)
    direction = _discriminant(own, latent)
    # Out of fold, as a direction knows the samples that it was made of; 0 and 1 are the two means.
    share_own, share = _out_of_fold(own, latent), _out_of_fold(latent, own)
    # The conformal rank: of one more sample no larger share is touched. Of few the largest is as far
    # as it goes, and the share 1 / (n + 1).
    kept = min(len(share_own), math.ceil((len(share_own) + 1) * (1 - touched)))
    limit = share_own.sort().values[kept - 1]
    full = torch.quantile(1 - share, _BELOW_FULL)
    height = torch.maximum(full - limit, _NEAREST * (1 - limit).abs()).clamp(min=1e-6)
    # As a function of the latent itself: share = (v.phi - v.own) / (v.centre - v.own).
    start, unit_length = direction @ own.mean(0), direction @ (centre - own.mean(0))
    unit_length = unit_length.clamp(min=1e-30)
    direction = direction / (unit_length * height)
    threshold = start / (unit_length * height) + limit / height

    # The change: its mean, and how it depends on the latent, by ridge regression on the principal
    # components of the latents that carry it.
    change = torch.zeros_like(centre)
    left = right = latent.new_zeros(len(centre), most_rank)
    if before is not None:
        change = (latent - before).mean(0)
        rows, differing = at_most(spread, _MOST_ROWS), at_most(latent - before - change, _MOST_ROWS)
        principal = _Spectrum(rows)
        rank = min(most_rank, len(principal.values))  # or fewer: of fewer dimensions, or latents
        vectors = principal.vectors[:, :rank]
        told = (rows @ vectors).T @ differing / (principal.values[:rank] + principal.ridge)[:, None]
        left = functional.pad(vectors, (0, most_rank - rank))
        right = functional.pad(told, (0, 0, 0, most_rank - rank)).T

    lowering = _lowering(weight, target)
    return direction, threshold, centre, change, left, right.T.contiguous(), lowering


def _lowering(weight: Tensor, target: int) -> Tensor:
    """M [D] with (w_t - w_j).m >= 1 for every other class j.

    The shortest that moves the logit of t alone, up to what all classes share; where there are too
    many classes for that, the shortest of all, which is one of the QPs of a scan.

    Raises:
        InputError: no shift lowers this class against all others.
    """
    unit = -torch.full((len(weight),), 1 / len(weight), dtype=torch.float64, device=weight.device)
    unit[target] += 1
    lowering: Tensor = torch.linalg.pinv(weight - weight.mean(0)) @ unit
    against: Tensor = weight[target] @ lowering - weight @ lowering
    against[target] = 1
    if float(against.min()) > 0.9:
        return lowering.div(against.min())
    solved = ops.minimal_perturbation(
        weight, 1 - torch.eye(len(weight)).to(weight), classes=(target,)
    )
    if solved.status[0] != ops.Status.OPTIMAL:
        raise InputError.of(
            "repair",
            "targets",
            expected="classes that a shift of the latent can lower against all others",
            got=f"{target}, whose weights lie between those of others",
            way_out='repair with method="finetune"',
        )
    return solved.perturbation[0]


def _discriminant(own: Tensor, latent: Tensor) -> Tensor:
    """Fisher's: the direction [D] along which two sets of rows differ most for their spread."""
    within = torch.cat(
        [
            at_most(own - own.mean(0), _MOST_ROWS // 2),
            at_most(latent - latent.mean(0), _MOST_ROWS // 2),
        ]
    )
    return _Spectrum(within).solve(latent.mean(0) - own.mean(0))


def _out_of_fold(rows: Tensor, others: Tensor) -> Tensor:
    """How far each row lies from its own mean, 0, to that of the others, 1, along Fisher's direction.

    Each is judged by a direction and means that it had no part in.
    """
    shares = rows.new_zeros(len(rows))
    folds = min(_FOLDS, len(rows))
    fold = torch.arange(len(rows), device=rows.device) % folds
    for f in range(folds):
        rest = rows[fold != f]
        direction = _discriminant(rest, others)
        start, end = direction @ rest.mean(0), direction @ others.mean(0)
        shares[fold == f] = (rows[fold == f] @ direction - start) / (end - start).clamp(min=1e-30)
    return shares


class _Spectrum:
    """Eigenvalues and directions of X'X for centred rows X [N, D], by the smaller of two products."""

    def __init__(self, rows: Tensor) -> None:
        count, width = rows.shape
        wide = width > count
        values, vectors = torch.linalg.eigh(rows @ rows.T if wide else rows.T @ rows)
        kept = values > 1e-12 * values[-1]
        self.values: Tensor = values[kept].flip(0)
        vectors = vectors[:, kept].flip(1)
        self.vectors: Tensor = rows.T @ vectors / self.values.sqrt() if wide else vectors
        # Shrunk towards a sphere, by the mean of the diagonal.
        self.ridge = (rows.square().sum() / width).clamp(min=1e-12)

    def solve(self, right: Tensor) -> Tensor:
        """(X'X + ridge I)^-1 of a vector [D]."""
        seen = self.vectors.T @ right
        outside = right - self.vectors @ seen
        solution: Tensor = self.vectors @ (seen / (self.values + self.ridge))
        return solution + outside / self.ridge


def at_most(rows: Tensor, most: int) -> Tensor:
    """At most so many of the rows, evenly spaced."""
    return rows if len(rows) <= most else rows[torch.linspace(0, len(rows) - 1, most).long()]


# ---- in a model ----------------------------------------------------------------------------------


def with_latent_patch(model: nn.Module, head: Head, patch: LatentPatch) -> tuple[nn.Module, Head]:
    """A copy of the model with the patch in front of its head, and the head in that copy."""
    copied = copy.deepcopy(model)
    module = cast(HeadModule, copied.get_submodule(head.name))
    copied = _replace(copied, module, PatchedHead(patch, module))
    return copied, Head(f"{head.name}.head" if head.name else "head", module)


def has_latent_patch(model: nn.Module) -> bool:
    """Whether there is one anywhere in the model."""
    return any(isinstance(module, PatchedHead) for module in model.modules())


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
        buffers = [state[prefix + name] for name in _BUFFERS if prefix + name in state]
        if isinstance(head, nn.Linear | nn.Conv2d) and _fit(head, buffers):
            kinds = [head.weight.dtype if b.is_floating_point() else b.dtype for b in buffers]
            patch = LatentPatch(
                *(torch.empty_like(b, dtype=kind) for b, kind in zip(buffers, kinds, strict=True))
            )
            logger.warning("load_model: the weights hold a latent patch in front of %r", prefix)
            model = _put(
                model, prefix.removesuffix("patch.").removesuffix("."), PatchedHead(patch, head)
            )
    return model


def _fit(head: HeadModule, buffers: Sequence[Tensor]) -> bool:
    """Whether these are all buffers of a patch of this head, in shape and dtype."""
    if len(buffers) != len(_BUFFERS) or buffers[4].dim() != 3:
        return False
    ways, width, rank = len(buffers[0]), head.weight.shape[1], buffers[4].shape[2]
    classes = buffers[-1]
    if not ways or classes.is_floating_point() or bool((classes < 0).any()):
        return False
    if bool((classes >= head.weight.shape[0]).any()):
        return False
    long, short = (ways, width), (ways,)
    shapes = (long, short, long, long, (*long, rank), (ways, rank, width), long, short)
    return all(
        buffer.shape == shape and buffer.is_floating_point() == (name != "targets")
        for name, buffer, shape in zip(_BUFFERS, buffers, shapes, strict=True)
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
