"""Which of a stream's samples a scan keeps for its second look."""

from __future__ import annotations

import torch
from torch import Tensor

from .patch_reach import has_room

# Samples that are kept, and the memory that they may take.
MOST_SAMPLES = 800
MOST_BYTES = 256 << 20

# The same for every class by itself; where labels tell of more classes none are kept.
MOST_OF_A_CLASS = 40
MOST_CLASSES_KEPT = 64


class SampleKeeper:
    """A uniform choice of a stream's samples, whatever their order and the size of its batches.

    Each sample draws a number; those with the smallest are kept.

    Attributes:
        one_shape: whether all samples so far have the same shape; others are not kept.
    """

    def __init__(
        self, seed: int = 0, most: int | None = None, most_bytes: int | None = None
    ) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._most = MOST_SAMPLES if most is None else most
        self._most_bytes = MOST_BYTES if most_bytes is None else most_bytes
        self._keys = torch.zeros(0, dtype=torch.float64)
        self._inputs: Tensor | None = None
        self._labels = torch.zeros(0, dtype=torch.int64)
        self.one_shape = True

    def add(self, inputs: Tensor, labels: Tensor) -> None:
        """A batch [N, ...] with its labels [N]."""
        if not len(labels):
            return
        if self._inputs is not None and self._inputs.shape[1:] != inputs.shape[1:]:
            self.one_shape = False
            return
        keys = torch.rand(len(labels), dtype=torch.float64, generator=self._generator)
        most = self._most_of(inputs)
        if len(self._keys) >= most:
            chosen = (keys < self._keys[-1]).nonzero().flatten()
            if not len(chosen):
                return
            keys, inputs, labels = keys[chosen], inputs[chosen.to(inputs.device)], labels[chosen]
        inputs = inputs.detach().cpu()
        if self._inputs is not None:
            keys, labels = torch.cat([self._keys, keys]), torch.cat([self._labels, labels])
            inputs = torch.cat([self._inputs, inputs])
        order = keys.argsort()[:most]
        self._keys, self._inputs, self._labels = keys[order], inputs[order], labels[order]

    def limit(self, most_bytes: int) -> None:
        """Keeps no more than this from here on."""
        self._most_bytes = most_bytes
        if self._inputs is not None:
            most = self._most_of(self._inputs)
            self._keys, self._labels = self._keys[:most], self._labels[:most]
            self._inputs = self._inputs[:most].clone()  # a view would hold all of them

    def _most_of(self, inputs: Tensor) -> int:
        size = max(1, inputs[0].numel() * inputs.element_size())
        return max(1, min(self._most, self._most_bytes // size))

    def samples(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels in a random order."""
        inputs = torch.zeros(0) if self._inputs is None else self._inputs
        return inputs, self._labels


class ClassKeeper:
    """A uniform choice of every class's samples: rare classes keep as many as frequent ones.

    Nothing is kept of samples that no patch is looked for in: what is no image with room for one, or
    whose labels tell of more classes than `MOST_CLASSES_KEPT`.

    Attributes:
        one_shape: whether all samples so far have the same shape.
    """

    def __init__(self, seed: int = 0, most: int | None = None) -> None:
        self._seed = seed
        self._most = MOST_OF_A_CLASS if most is None else most
        self._keepers: dict[int, SampleKeeper] = {}
        self._shape: torch.Size | None = None
        self.one_shape = True
        self._useful = True  # as far as the samples so far tell

    def add(self, inputs: Tensor, labels: Tensor) -> None:
        """A batch [N, ...] with its labels [N]."""
        self._shape = inputs.shape[1:] if self._shape is None else self._shape
        self.one_shape = self.one_shape and inputs.shape[1:] == self._shape
        present = labels.unique().tolist()
        self._useful &= self.one_shape and has_room(self._shape)
        self._useful &= all(k < MOST_CLASSES_KEPT for k in present)
        if not self._useful:
            self._keepers = {}
            return
        for k in present:
            if k not in self._keepers:
                self._keepers[k] = SampleKeeper(self._seed + k, self._most)
                for keeper in self._keepers.values():
                    keeper.limit(MOST_BYTES // len(self._keepers))
            chosen = (labels == k).nonzero().flatten()
            self._keepers[k].add(inputs[chosen.to(inputs.device)], labels[chosen])

    def samples(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels, class after class, each in a random order."""
        found = [self._keepers[k].samples() for k in sorted(self._keepers)]
        if not found:
            return torch.zeros(0), torch.zeros(0, dtype=torch.int64)
        inputs, labels = zip(*found, strict=True)
        return torch.cat(inputs), torch.cat(labels)


class LookKeeper:
    """What a scan keeps: a choice of all samples, and one of every class's.

    Attributes:
        all, by_class: of these; where gradients are not asked there are none of the latter.
    """

    def __init__(self, seed: int = 0, *, gradients: bool = True) -> None:
        self.all = SampleKeeper(seed)
        self.by_class = ClassKeeper(seed) if gradients else None

    def add(self, inputs: Tensor, labels: Tensor) -> None:
        """A batch [N, ...] with its labels [N]."""
        self.all.add(inputs, labels)
        if self.by_class is not None:
            self.by_class.add(inputs, labels)
