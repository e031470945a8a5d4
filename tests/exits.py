"""Where the early exits of a patched model are, and inputs that they look at."""

from __future__ import annotations

from torch import Tensor, nn

from digits import digit_case, padded, padded_corner
from tacext import demo
from tacext.early_exits import EarlyExits, LayerHook
from tacext.latent_patch import PatchedHead


def patched_head(model: nn.Module) -> PatchedHead:
    return next(m for m in model.modules() if isinstance(m, PatchedHead))


def exits_of(model: nn.Module) -> EarlyExits:
    exits = patched_head(model).exits
    assert exits is not None
    return exits


def hooks_of(model: nn.Module) -> int:
    return sum(isinstance(h, LayerHook) for m in model.modules() for h in m._forward_hooks.values())


def triggered() -> tuple[Tensor, Tensor]:
    images, labels = padded(digit_case().data.test)
    others = labels != demo.TARGET
    return padded_corner(images[others]), labels[others]
