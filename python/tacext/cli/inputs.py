"""What several commands take: a model and images, as options and as loaded objects."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import click
from torch import nn

from ..data import ImageSet
from ..errors import FileError, InputError
from ..files import check_writable
from ..images import load_images
from ..normalisation import Normalized
from ..report import Json
from ..scanning import ScanReport
from ..weights import load_model

BATCH_SIZE = 256

head_option = click.option(
    "--head", help="Name of the last linear layer, if it is not found by itself."
)


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
    if len(parts) not in (1, 2) or not all(part.isdecimal() and int(part) > 0 for part in parts):
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
    click.option(
        "--seed",
        type=click.IntRange(0, 2**31 - 1),
        default=0,
        show_default=True,
        help="Seed of every random choice.",
    ),
    click.option("--mean", callback=_floats, help="Mean that the model was trained with."),
    click.option("--std", callback=_floats, help="Standard deviation likewise."),
    click.option("--size", callback=_size, metavar="HxW", help="Resize images of a folder."),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        help="Images in a pass.  [default: 256; in training 128]",
    ),
    click.option("--json", "json_path", type=click.Path(), help="Write the result as JSON."),
)


@dataclass(frozen=True)
class ModelAndData:
    """A model and its images as the command line names them; nothing is read yet."""

    weights: str
    arch: str
    data_path: str
    split: str | None
    samples: int | None
    seed: int
    mean: list[float] | None
    std: list[float] | None
    size: tuple[int, int] | None
    batch_size: int | None
    json_path: str | None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise click.UsageError("--mean and --std go together: give both or neither")

    def load_model(self, weights: str | None = None) -> nn.Module:
        """The model (with other weights, if given), taking images in [0, 1]."""
        model = load_model(self.weights if weights is None else weights, self.arch)
        if self.mean is None or self.std is None:
            return model
        return Normalized(model, self.mean, self.std).eval()

    def load_images(self) -> ImageSet:
        """The images, or a random choice of them."""
        images = load_images(self.data_path, split=self.split, size=self.size)
        if self.samples is None:
            return images
        if self.samples > len(images):
            raise InputError.of(
                "load_images",
                "samples",
                expected=f"at most the {len(images)} images in {self.data_path}",
                got=str(self.samples),
                way_out="ask for fewer, or leave --samples out for all",
            )
        return images.sample(self.samples, self.seed)

    def head_in_model(self, head: str | None) -> str | None:
        """A layer's name as the loaded model has it, behind its normalisation."""
        return head if head is None or self.mean is None else f"model.{head}"

    def named(self, report: ScanReport) -> ScanReport:
        """The report with the layer's name as the user's own model has it."""
        if self.mean is None:
            return report
        return replace(report, head=report.head.removeprefix("model."))

    def check_outputs(self, operation: str, **outputs: str | None) -> None:
        """Before any work: every output can be written, and none replaces an input or another."""
        taken = {
            os.path.realpath(self.weights): "WEIGHTS",
            os.path.realpath(self.data_path): "--data",
        }
        for argument, path in outputs.items():
            if path is None:
                continue
            target = str(check_writable(path, operation=operation, argument=argument))
            if target in taken:
                raise FileError.of(
                    operation,
                    argument,
                    expected="a file of its own",
                    got=f"{path}, which is {taken[target]}",
                    way_out="choose another name",
                )
            taken[target] = f"--{argument}"

    @property
    def source(self) -> Json:
        """Where a result came from, for its JSON; the digest pins the very file that was read."""
        digest = hashlib.sha256()
        with Path(self.weights).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return {
            "weights": self.weights,
            "weights_sha256": digest.hexdigest(),
            "arch": self.arch,
            "mean": self.mean,
            "std": self.std,
            "data": self.data_path,
            "split": self.split,
            "samples": self.samples,
            "seed": self.seed,
        }


def check_suffix(operation: str, argument: str, path: str, suffix: str) -> None:
    """Before any work: raises FileError where a name promises a format that is not written."""
    if not path.endswith(suffix):
        raise FileError.of(
            operation,
            argument,
            expected=f"a name that ends in {suffix}",
            got=path,
            way_out="no other format is written",
        )


def inner(model: nn.Module) -> nn.Module:
    """The user's own model inside a loaded one."""
    return model.model if isinstance(model, Normalized) else model


def model_and_data(command: Callable[..., int | None]) -> Callable[..., int | None]:
    """Adds WEIGHTS and the options that name a model and images; they arrive as one `given`."""

    @functools.wraps(command)
    def collected(**options: Any) -> int | None:
        given = ModelAndData(
            **{field.name: options.pop(field.name) for field in fields(ModelAndData)}
        )
        return command(given, **options)

    wrapped: Callable[..., int | None] = collected
    for option in reversed(_OPTIONS):
        wrapped = option(wrapped)
    return wrapped
