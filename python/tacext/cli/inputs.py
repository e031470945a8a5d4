"""What several commands take: a model and images, as options and as loaded objects."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
from torch import nn

from ..data import ImageSet
from ..errors import InputError
from ..images import load_images
from ..normalisation import Normalized
from ..report import Json
from ..weights import load_model

Command = TypeVar("Command", bound=Callable[..., Any])


def _floats(
    _context: click.Context, parameter: click.Parameter, text: str | None
) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise click.BadParameter(
            f"expected numbers such as 0.5 or 0.49,0.48,0.45, got {text!r}", param=parameter
        ) from None


def _size(
    _context: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().replace("x", " ").replace(",", " ").split()
    if len(parts) not in (1, 2) or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"expected 32 or 32x32, got {text!r}", param=parameter)
    return int(parts[0]), int(parts[-1])


_OPTIONS = (
    click.argument("weights", type=click.Path()),
    click.option(
        "--arch",
        required=True,
        metavar="MODULE_OR_FILE:FACTORY",
        help="What builds the model; runs that code. Example: zoo.py:resnet20.",
    ),
    click.option(
        "--data",
        "data_path",
        required=True,
        type=click.Path(),
        help="Images: an .npz, a folder of class folders, or CIFAR-10 binary batches.",
    ),
    click.option("--split", help="Part of the data, such as train or test."),
    click.option(
        "--samples",
        type=click.IntRange(min=1),
        help="Use this many random images.  [default: all]",
    ),
    click.option("--seed", default=0, show_default=True, help="Seed of every random choice."),
    click.option("--mean", callback=_floats, help="Mean that the model was trained with."),
    click.option("--std", callback=_floats, help="Standard deviation likewise."),
    click.option("--size", callback=_size, metavar="HxW", help="Resize images of a folder."),
    click.option("--head", help="Name of the last linear layer, if it is not found by itself."),
    click.option("--batch-size", type=click.IntRange(min=1), default=256, show_default=True),
    click.option("--json", "json_path", type=click.Path(), help="Write the result as JSON."),
)


def model_and_data(command: Command) -> Command:
    """Adds the argument WEIGHTS and the options that name a model and its images."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class ModelSource:
    """How to build a model: the code, the normalisation, the name of its head."""

    arch: str
    mean: list[float] | None
    std: list[float] | None
    head: str | None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise click.UsageError("--mean and --std go together: give both or neither")

    def load(self, weights: str) -> nn.Module:
        """The model, in evaluation mode, taking images in [0, 1]."""
        model = load_model(weights, self.arch)
        if self.mean is None or self.std is None:
            return model
        return Normalized(model, self.mean, self.std).eval()

    @property
    def head_in_model(self) -> str | None:
        """The head's name as the loaded model has it."""
        if self.head is None or self.mean is None:
            return self.head
        return f"model.{self.head}"

    def inner(self, model: nn.Module) -> nn.Module:
        """The user's own model inside a loaded one: what weights are saved from."""
        return model.model if isinstance(model, Normalized) else model


def load_data(
    path: str, split: str | None, samples: int | None, seed: int, size: tuple[int, int] | None
) -> ImageSet:
    """The images, or a random choice of them."""
    images = load_images(path, split=split, size=size)
    if samples is None:
        return images
    if samples > len(images):
        raise InputError.of(
            "load_images",
            "samples",
            expected=f"at most the {len(images)} images in {path}",
            got=str(samples),
            way_out="ask for fewer, or leave --samples out for all",
        )
    return images.sample(samples, seed)


def describe_source(weights: str, data_path: str, split: str | None, seed: int) -> Json:
    """Where a result came from, for its JSON; the digest pins the very file that was read."""
    with Path(weights).open("rb") as file:
        digest = (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )
    return {
        "weights": str(weights),
        "weights_sha256": digest,
        "data": str(data_path),
        "split": split,
        "seed": seed,
    }
