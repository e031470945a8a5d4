"""Where an attack sends whom: the label that a triggered image is to get, by its true class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..errors import InputError


class Goal(Protocol):
    """Which classes an attack is aimed at, and where it sends them."""

    @property
    def targets(self) -> tuple[int, ...]:
        """The poisoned classes, sorted."""
        ...

    def victims(self, labels: Tensor) -> Tensor:
        """Bool [N]: which samples of these true classes the trigger is to misdirect."""
        ...

    def __call__(self, labels: Tensor) -> Tensor:
        """int64 [N]: the class that each victim is to be sent to."""
        ...


def _check_class(goal: str, argument: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InputError.of(
            goal,
            argument,
            expected="a class index of 0 or more",
            got=repr(value),
            way_out="count the classes from 0",
        )


@dataclass(frozen=True)
class AllToOne:
    """Every image of another class is sent to `target`."""

    target: int

    def __post_init__(self) -> None:
        _check_class("AllToOne", "target", self.target)

    @property
    def targets(self) -> tuple[int, ...]:
        """The one target."""
        return (self.target,)

    def victims(self, labels: Tensor) -> Tensor:
        """Everything that is not the target."""
        return labels != self.target

    def __call__(self, labels: Tensor) -> Tensor:
        """The target, for all."""
        return torch.full_like(labels, self.target)


@dataclass(frozen=True)
class AllToAll:
    """An image of class y is sent to y + 1, the last class to 0."""

    num_classes: int

    def __post_init__(self) -> None:
        _check_class("AllToAll", "num_classes", self.num_classes)
        if self.num_classes < 2:
            raise InputError.of(
                "AllToAll",
                "num_classes",
                expected="2 or more",
                got=str(self.num_classes),
                way_out="give the number of classes of the model",
            )

    @property
    def targets(self) -> tuple[int, ...]:
        """All classes."""
        return tuple(range(self.num_classes))

    def victims(self, labels: Tensor) -> Tensor:
        """Everything."""
        return torch.ones_like(labels, dtype=torch.bool)

    def __call__(self, labels: Tensor) -> Tensor:
        """The next class."""
        return (labels + 1) % self.num_classes


@dataclass(frozen=True)
class SourceSpecific:
    """Only images of class `source` are sent to `target`; the trigger leaves others alone."""

    source: int
    target: int

    def __post_init__(self) -> None:
        _check_class("SourceSpecific", "source", self.source)
        _check_class("SourceSpecific", "target", self.target)
        if self.source == self.target:
            raise InputError.of(
                "SourceSpecific",
                "target",
                expected="another class than the source",
                got=f"{self.target} for both",
                way_out="choose two classes",
            )

    @property
    def targets(self) -> tuple[int, ...]:
        """The one target."""
        return (self.target,)

    def victims(self, labels: Tensor) -> Tensor:
        """Images of the source class."""
        return labels == self.source

    def __call__(self, labels: Tensor) -> Tensor:
        """The target, for all."""
        return torch.full_like(labels, self.target)
