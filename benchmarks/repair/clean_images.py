"""What a defender has, and the training loop that the removals share."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional

Augment = Callable[[Tensor, torch.Generator], Tensor]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]
Schedule = Callable[[int, float], float]


class DivergedError(RuntimeError):
    """A training whose loss is no number any more."""


def as_it_is(images: Tensor, generator: torch.Generator) -> Tensor:
    """No augmentation."""
    del generator
    return images


@dataclass(frozen=True, eq=False)
class CleanImages:
    """Clean labelled images, and how much may be done with them.

    Attributes:
        images: float32 [N, C, H, W] in [0, 1].
        labels: int64 [N].
        augment: shifts and flips a batch, as in the model's training.
        seed: of the order of the images, of augmentation, and of what a removal draws.
        effort: share of the published epochs or steps to take.
    """

    images: Tensor
    labels: Tensor
    augment: Augment = as_it_is
    seed: int = 0
    effort: float = 1.0

    def __len__(self) -> int:
        return len(self.labels)

    def rounds(self, published: int) -> int:
        """Epochs or steps to take, at least one."""
        return max(1, round(self.effort * published))

    def batches(self, epoch: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Augmented batches in a random order; one too short for batch norm is left out."""
        generator = torch.Generator().manual_seed(10_000 * self.seed + epoch)
        for index in torch.randperm(len(self), generator=generator).split(size):
            if len(index) > 1:
                images = self.augment(self.images[index], generator)
                yield images.contiguous(memory_format=torch.channels_last), self.labels[index]

    def split(self, share: float = 0.2) -> tuple[CleanImages, CleanImages]:
        """What to train on, and the share that is held out to choose a setting by."""
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.seed))
        cut = max(1, round(share * len(self)))
        parts = (
            replace(self, images=self.images[part], labels=self.labels[part])
            for part in (order[cut:], order[:cut])
        )
        training, held_out = parts
        return training, held_out


def cross_entropy(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The mean over the batch."""
    return functional.cross_entropy(model(images), labels)


def trainable_copy(model: nn.Module) -> nn.Module:
    """In training mode, and no parameter frozen."""
    return copy.deepcopy(model).train().requires_grad_(True)


def accuracy(model: nn.Module, clean: CleanImages) -> float:
    """Share of the images that the model has right; 0 where its logits are no numbers."""
    model.eval()
    with torch.no_grad():
        right = [
            (model(x).nan_to_num().argmax(1) == y)
            for x, y in zip(clean.images.split(256), clean.labels.split(256), strict=True)
        ]
    return float(torch.cat(right).double().mean())


def cosine(epoch: int, progress: float) -> float:
    """From the whole rate down to nothing."""
    del epoch
    return 0.5 * (1 + math.cos(math.pi * progress))


def constant(epoch: int, progress: float) -> float:
    """Always the whole rate."""
    del epoch, progress
    return 1.0


def descend(
    model: nn.Module,
    clean: CleanImages,
    epochs: int,
    rate: float,
    loss: Loss = cross_entropy,
    *,
    schedule: Schedule = cosine,
    batch: int = 128,
    weight_decay: float = 5e-4,
    backward: Callable[[Tensor, Tensor], Tensor] | None = None,
    after_step: Callable[[], None] = lambda: None,
) -> nn.Module:
    """SGD with momentum .9 on the model itself, which is in evaluation mode afterwards.

    Args:
        model: to train, in training mode.
        clean: the images.
        epochs: passes over them.
        rate: the highest learning rate.
        loss: of the model on a batch.
        schedule: the share of the rate, by the epoch and by how much of the training is done.
        batch: images in a step.
        weight_decay: of all parameters.
        backward: leaves gradients in the parameters and returns the loss; None differentiates the
            loss once.
        after_step: what is done to the model after each step.

    Raises:
        DivergedError: the loss is no finite number.
    """
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=0.9, weight_decay=weight_decay)
    steps, done = epochs * math.ceil(len(clean) / batch), 0
    for epoch in range(epochs):
        for images, labels in clean.batches(epoch, batch):
            optimizer.param_groups[0]["lr"] = rate * schedule(epoch, done / steps)
            optimizer.zero_grad()
            if backward is None:
                value = loss(model, images, labels)
                value.backward()
            else:
                value = backward(images, labels)
            if not math.isfinite(float(value.detach())):
                raise DivergedError(f"the loss is {float(value.detach())} in epoch {epoch}")
            optimizer.step()
            after_step()
            done += 1
    return model.eval()
