"""Removals that train all weights on clean images: fine-tuning, FT-SAM, NAD and FST."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from clean_images import (
    CleanImages,
    DivergedError,
    accuracy,
    constant,
    cross_entropy,
    descend,
    trainable_copy,
)
from torch import Tensor, nn
from torch.nn import functional

from tacext.heads import find_head


def fine_tuning(model: nn.Module, clean: CleanImages) -> nn.Module:
    """Plain fine-tuning: 100 epochs from .01 down (as in BackdoorBench, Wu et al., 2022)."""
    return descend(trainable_copy(model), clean, clean.rounds(100), 0.01)


@contextlib.contextmanager
def _statistics_untouched(model: nn.Module) -> Iterator[None]:
    """Batch norm normalises by each batch, and does not remember it."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


def _flat(model: nn.Module, clean: CleanImages, rho: float) -> nn.Module:
    """FT-SAM at one radius."""
    student = trainable_copy(model)
    parameters = list(student.parameters())

    def smoothed(images: Tensor, labels: Tensor) -> Tensor:
        return functional.cross_entropy(student(images), labels, label_smoothing=0.1)

    def backward(images: Tensor, labels: Tensor) -> Tensor:
        value = smoothed(images, labels)
        slopes = torch.autograd.grad(value, parameters, allow_unused=True)
        with torch.no_grad():
            scaled = [
                torch.zeros_like(p) if g is None else p.abs() * g
                for p, g in zip(parameters, slopes, strict=True)
            ]
            length = torch.stack([g.norm() for g in scaled]).norm().clamp_min(1e-12)
            origin = [p.detach().clone() for p in parameters]
            for parameter, g in zip(parameters, scaled, strict=True):
                parameter.add_(parameter.abs() * g, alpha=rho / float(length))
        with _statistics_untouched(student):
            smoothed(images, labels).backward()
        with torch.no_grad():
            for parameter, before in zip(parameters, origin, strict=True):
                parameter.copy_(before)
        return value

    return descend(student, clean, clean.rounds(100), 0.01, backward=backward)


def ft_sam(model: nn.Module, clean: CleanImages) -> nn.Module:
    """FT-SAM (Zhu et al., ICCV 2023): fine-tuning in directions that are flat, 100 epochs from .01.

    The gradient is taken where weights have moved by rho T g / |T g|, g scaled by T = |w| for each
    of them, which moves the large weights of backdoored neurons most. Of the published rho 8 is
    taken, as 2 removes little in few epochs; where that makes the model useless, as it does without
    batch norm, the first smaller one that does not.
    """
    tuned, _ = _first_usable(
        lambda rho, part: _flat(model, part, rho), (8.0, 2.0, 0.5, 0.1), model, clean
    )
    return tuned


_KEPT = 0.8  # of the accuracy; below that a model is useless


def _first_usable(
    tune: Callable[[float, CleanImages], nn.Module],
    settings: Sequence[float],
    model: nn.Module,
    clean: CleanImages,
) -> tuple[nn.Module, float]:
    """What comes out at the first setting that keeps most of the accuracy on held-out images."""
    training, held_out = clean.split()
    enough = _KEPT * accuracy(model, held_out)
    for setting in settings:
        with contextlib.suppress(DivergedError):
            tuned = tune(setting, training)
            if accuracy(tuned, held_out) >= enough:
                return tuned, setting
    raise DivergedError(f"useless at all settings from {settings[0]} to {settings[-1]}")


@contextlib.contextmanager
def _recording(model: nn.Module, layers: list[str]) -> Iterator[dict[str, Tensor]]:
    """What each of the layers put out last."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, output: object) -> None:
        if isinstance(output, Tensor):
            seen.pop(name, None)
            seen[name] = output

    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _x, out, name=name: keep(name, out)
        )
        for name in layers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def attention_layers(model: nn.Module, images: Tensor) -> list[str]:
    """Where NAD compares attention: the ends of the last stages, the deepest first, at most three.

    A stage is what has feature maps of one size; in a transformer it is an encoder layer.
    """
    encoder = [n for n, m in model.named_modules() if isinstance(m, nn.TransformerEncoderLayer)]
    if encoder:
        return encoder[::-1][:3]
    names = [name for name, _ in model.named_modules() if name]
    model.eval()
    with _recording(model, names) as seen, torch.no_grad():
        model(images)
    last = {out.shape[-1]: name for name, out in seen.items() if out.dim() == 4}
    return [last[size] for size in sorted(last) if size > 1][:3]


def _attention(features: Tensor) -> Tensor:
    """Where a layer is active, [N, places] of length 1: squares summed over the channels."""
    maps = features.square()
    summed = maps.sum(1).flatten(1) if maps.dim() == 4 else maps.sum(2)  # tokens: [N, places, D]
    return functional.normalize(summed, dim=1)


def _two_epochs_then_a_tenth(epoch: int, progress: float) -> float:
    del progress
    return 1.0 if epoch < 2 else 0.1


def _teacher(model: nn.Module, clean: CleanImages, rate: float) -> nn.Module:
    return descend(
        trainable_copy(model),
        clean,
        clean.rounds(10),
        rate,
        schedule=_two_epochs_then_a_tenth,
        batch=64,
        weight_decay=1e-4,
    )


def nad(model: nn.Module, clean: CleanImages) -> nn.Module:
    """Neural attention distillation (Li et al., ICLR 2021): the attention of a fine-tuned teacher.

    Ten epochs for the teacher and twenty for the student, the first two at .1, the others at .01.
    Networks without batch norm do not stand that rate, so that theirs is lowered until the teacher
    is usable. The distances of attention maps weigh 500, 1000 and 1000 per place of maps of 32x32,
    16x16 and 8x8, as published; for smaller maps the weight of the whole map is what is kept.
    """
    teacher, rate = _first_usable(
        lambda rate, part: _teacher(model, part, rate), (0.1, 0.03, 0.01, 0.003), model, clean
    )
    layers = attention_layers(trainable_copy(model), clean.images[:2])
    weights = dict(zip(layers, (1000 / 8**2, 1000 / 16**2, 500 / 32**2), strict=False))

    def loss(student: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        with _recording(teacher, layers) as taught, torch.no_grad():
            teacher(images)
        with _recording(student, layers) as own:
            value = cross_entropy(student, images, labels)
        for name, weight in weights.items():
            distance = (_attention(own[name]) - _attention(taught[name])).square().sum(1).mean()
            value = value + weight * distance
        return value

    return descend(
        trainable_copy(model),
        clean,
        clean.rounds(20),
        rate,
        loss,
        schedule=_two_epochs_then_a_tenth,
        batch=64,
        weight_decay=1e-4,
    )


def fst(model: nn.Module, clean: CleanImages, alpha: float = 0.2) -> nn.Module:
    """Feature shift tuning (Min et al., NeurIPS 2023): a new head, kept away from the old one.

    CE + alpha <W, W_0> over ten epochs at .01, from random W, whose length stays that of W_0.
    """
    student = trainable_copy(model)
    head = student.get_submodule(find_head(model, clean.images[:4]).name)
    assert isinstance(head, nn.Linear)
    old = head.weight.detach().clone()
    length = old.norm()
    generator = torch.Generator().manual_seed(clean.seed)
    with torch.no_grad():
        bound = 1 / math.sqrt(head.in_features)
        head.weight.copy_((2 * torch.rand(head.weight.shape, generator=generator) - 1) * bound)

    def loss(network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(network, images, labels) + alpha * (head.weight * old).sum()

    def keep_length() -> None:
        with torch.no_grad():
            head.weight.mul_(length / head.weight.norm())

    return descend(
        student,
        clean,
        clean.rounds(10),
        0.01,
        loss,
        schedule=constant,
        after_step=keep_length,
    )
