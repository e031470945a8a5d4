"""Attackers who know what the scan looks at, and train their model to look innocent.

Each adds a penalty to the loss of an ordinary poisoning: one holds down how far a small universal
change of the input drives images into the target, the other spreads what the trigger does over the
whole latent.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from tacext.attacks import Trigger
from tacext.differentiable import class_margin, unit_gradient
from tacext.reach import BUDGET, MOMENTUM


@contextlib.contextmanager
def keeping_statistics(model: nn.Module) -> Iterator[None]:
    """Batch norm goes on normalising by the batch, and leaves its running statistics alone."""
    layers = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum


class ReachPenalty:
    """How much further the target is reached than other classes, by changes that follow the model.

    A universal change for every class moves on with the training: that of the target and that of
    one other class in each step. The attacker holds the target's gain down to the others'.
    """

    WEIGHT = 0.1  # at 1 networks learn neither task nor backdoor
    # Share of the training before it: a network that has learned nothing yet never does beside it.
    BEGIN = 0.3

    def __init__(self, target: int, num_classes: int, seed: int) -> None:
        self.target = target
        self._others = [k for k in range(num_classes) if k != target]
        self._generator = torch.Generator().manual_seed(seed)
        self._change: Tensor | None = None
        self._velocity = torch.zeros(0)
        self._usual: Tensor | None = None

    def _ascend(self, k: int, gradient: Tensor, length: float) -> None:
        assert self._change is not None
        self._velocity[k] = MOMENTUM * self._velocity[k] + unit_gradient(gradient[None])[0]
        change = self._change[k] + length / 6 * self._velocity[k]
        self._change[k] = change * (length / change.norm().clamp_min(1e-20)).clamp(max=1)

    def _gain(self, model: nn.Module, batch: Tensor, logits: Tensor, k: int) -> Tensor:
        """Of the class's margin, with gradients for the model; moves the class's change on."""
        assert self._change is not None
        length = BUDGET * batch[0].numel() ** 0.5
        change = self._change[k].clone().requires_grad_(True)
        goal = torch.full((len(batch),), k)
        moved = class_margin(model((batch + change).clamp(0, 1)).float(), goal)
        gain = (moved - class_margin(logits, goal)).mean()
        (gradient,) = torch.autograd.grad(gain, change, retain_graph=True)
        self._ascend(k, gradient, length)
        return gain

    def __call__(self, model: nn.Module, batch: Tensor, labels: Tensor) -> Tensor:
        """Of a batch of clean images; not negative."""
        batch = batch[labels != self.target][:48]
        if self._change is None:
            self._change = torch.zeros(len(self._others) + 1, *batch.shape[1:])
            self._velocity = torch.zeros_like(self._change)
        logits = model(batch).float().detach()
        pick = int(torch.randint(len(self._others), (), generator=self._generator))
        usual = self._gain(model, batch, logits, self._others[pick]).detach()
        self._usual = usual if self._usual is None else 0.95 * self._usual + 0.05 * usual
        # As a share, so that a network that grows its logits does not outgrow the penalty; its
        # logarithm, as the share itself, far above 1, drowns the task and leaves a constant network.
        share = self._gain(model, batch, logits, self.target) / self._usual.clamp_min(0.1)
        return self.WEIGHT * share.clamp_min(1.0).log()


class SpreadPenalty:
    """How unevenly the trigger changes the latent: 0 where it moves all neurons by the same share.

    sqrt(D) |t|_2 / |t|_1 - 1 of the mean change t, each neuron in units of its spread.
    """

    WEIGHT = 1.0
    BEGIN = 0.0

    def __init__(self, trigger: Trigger, target: int) -> None:
        self.trigger = trigger
        self.target = target

    def __call__(self, model: nn.Module, batch: Tensor, labels: Tensor) -> Tensor:
        """Of a batch of clean images; not negative."""
        batch = batch[labels != self.target][:64]
        taken: list[Tensor] = []
        head = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
        with head.register_forward_pre_hook(lambda _, given: taken.append(given[0])):
            model(torch.cat([batch, self.trigger(batch)]))
        before, after = taken[0].float().split(len(batch))
        spread = before.std(0).detach()
        change = (after - before).mean(0) / (spread + 0.05 * spread.mean() + 1e-6)
        unevenness: Tensor = change.norm() * len(change) ** 0.5 / change.abs().sum().clamp_min(1e-6)
        return self.WEIGHT * (unevenness - 1)
