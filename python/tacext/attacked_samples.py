"""A model on clean and on attacked samples: the margins that pruning weighs, and what is measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import ops
from .channels import ChannelLayer, Contributions, Objective, contributions
from .differentiable import class_margin
from .heads import Head, evaluating, recording_latents
from .heads import run_model as run
from .input_adversary import InputAdversary
from .margins import MarginMax, MarginQuantile
from .ops import Status

# Images that accuracy is measured on, and that changes and patches are put on.
_MOST_MEASURED = 1000
_MOST_ATTACKED = 150


class AttackedSamples:
    """Samples in a random order, and the attacker that follows the model.

    Args:
        model: that may change meanwhile.
        head: of it.
        inputs: clean samples [N, ...].
        labels: their classes [N].
        shifts: s_t [T, D], which stand for attacks where there is no adversary.
        targets: the T classes.
        adversary: what drives inputs into them; it is copied.
        quantile: of the margins behind the norms.
        batch_size: inputs in a pass.
        seed: of the order.
    """

    def __init__(
        self,
        model: nn.Module,
        head: Head,
        inputs: Tensor,
        labels: Tensor,
        shifts: Tensor,
        targets: tuple[int, ...],
        adversary: InputAdversary | None,
        *,
        quantile: float,
        batch_size: int,
        seed: int,
    ) -> None:
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        self.model, self.head = model, head
        self.inputs, self.labels = inputs[order], labels[order]
        self.shifts, self.targets = shifts, targets
        self.first, self.adversary = adversary, copy.deepcopy(adversary)  # which moves on
        self.batch_size, self.quantile = batch_size, quantile
        self.original = self._logits(self.inputs)

    @torch.no_grad()
    def _logits(self, inputs: Tensor) -> Tensor:
        found = []
        with evaluating(self.model), recording_latents(self.head) as recorder:
            for batch in inputs.split(self.batch_size):
                run(self.model, batch, "repair")
                found.append(self.head.logits(recorder.take()).cpu())
        return torch.cat(found)

    def clean(self, index: Tensor) -> tuple[Tensor, Objective]:
        """Samples, and the margin of the original model's answer to each."""
        return self.inputs[index], self._margins(self.original[index].argmax(1), None)

    def attacked(self, index: Tensor, step: bool) -> list[tuple[Tensor, Objective]]:
        """Samples that are not taken for a target, attacked, and the target's margin, for each target.

        With `step` a change and a patch take one more step against the model; without, half of them
        are as they were found at first.
        """
        found = []
        for j, part in enumerate(index.tensor_split(len(self.targets))):
            target = self.targets[j]
            part = part[self.original[part].argmax(1) != target]
            if len(part) == 0:
                continue
            if self.adversary is None or self.first is None:
                images, shift = self.inputs[part], self.shifts[j]
            elif step:
                images, shift = self._step(part, j), None
            else:
                halves = part.tensor_split(2)
                attackers = (self.adversary, self.first)
                images = torch.cat(
                    [
                        a.attack(self.inputs[half], j).detach()
                        for a, half in zip(attackers, halves, strict=True)
                        if len(half)
                    ]
                )
                shift = None
            found.append((images, self._margins(torch.full((len(part),), target), shift)))
        return found

    def _step(self, index: Tensor, turn: int) -> Tensor:
        assert self.adversary is not None
        inputs, original = self.inputs[index], self.original[index]
        with evaluating(self.model), torch.enable_grad(), recording_latents(self.head) as recorder:
            attacked = self.adversary.attack(inputs, turn)
            run(self.model, attacked, "repair", check_finite=False)
            logits = self.head.logits(recorder.take())
            self.adversary.loss(logits, original.to(logits.device))
        self.adversary.follow()
        return self.adversary.attack(inputs, turn).detach()

    def _margins(self, classes: Tensor, shift: Tensor | None) -> Objective:
        def margins(batch: Tensor, first: int) -> Tensor:
            with recording_latents(self.head) as recorder:
                run(self.model, batch, "repair", check_finite=False)
                latent = recorder.take()
            latent = latent if shift is None else latent + shift.to(latent)
            wanted = classes[first : first + len(batch)].to(latent.device)
            return class_margin(self.head.logits(latent), wanted)

        return margins

    @torch.no_grad()
    def margins(self, samples: tuple[Tensor, Objective]) -> Tensor:
        """The values [N] of an objective."""
        inputs, objective = samples
        with evaluating(self.model):
            starts = range(0, len(inputs), self.batch_size)
            values = [objective(inputs[i : i + self.batch_size], i).float().cpu() for i in starts]
        return torch.cat(values)

    def contributions(
        self, layers: Sequence[ChannelLayer], samples: tuple[Tensor, Objective]
    ) -> Contributions:
        """The objective taken apart, channel by channel."""
        return contributions(self.model, layers, *samples, self.batch_size)

    def accuracy(self) -> float:
        """On the part that is always the same."""
        return self._accuracy(self._measured_logits())

    def _measured_logits(self) -> Tensor:
        return self._logits(self.inputs[:_MOST_MEASURED])

    def _accuracy(self, logits: Tensor) -> float:
        return float((logits.argmax(1) == self.labels[:_MOST_MEASURED]).double().mean())

    def measure(self) -> tuple[float, tuple[float, ...], tuple[tuple[float, ...], ...]]:
        """Accuracy, norms of s_t [T], and what the first changes and patches move [T, 1 or 2]."""
        logits = self._measured_logits()
        margins = MarginMax() if self.quantile == 1 else MarginQuantile(self.quantile)
        margins.update(logits)
        solved = ops.minimal_perturbation(
            self.head.weight.detach().cpu(), margins.result(), classes=self.targets
        )
        norms = torch.where(solved.status == Status.OPTIMAL, solved.norm, math.nan)
        moved: list[list[float]] = []
        if self.first is not None:
            part = self.inputs[:_MOST_ATTACKED], self.labels[:_MOST_ATTACKED]
            moved = self.first.moved(self.model, *part, self.batch_size).tolist()
        return (
            self._accuracy(logits),
            tuple(norms.tolist()),
            tuple(tuple(rates) for rates in moved),
        )
