"""What several commands take: a model and images, as options and as loaded objects."""

from __future__ import annotations

import functools
import hashlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, cast, get_args

import click
import torch
from torch import nn

from ..data import ImageSet
from ..errors import FileError, InputError, printable
from ..files import check_writable
from ..images import load_images
from ..normalisation import Normalized
from ..report import Json
from ..scan_report import Depth, ScanReport
from ..scanning import scan
from ..user_code import code_file
from ..weights import load_model

BATCH_SIZE = 256

_Command = Callable[..., int | None]


class Finite(click.FloatRange):
    """A float in a range, which neither NaN nor infinity is in: click compares, and lets NaN by."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number. Raises click.BadParameter as every wrong value on the command line."""
        number: float = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number.", param, ctx)
        return number


def _floats(
    _context: click.Context, parameter: click.Parameter, text: str | None
) -> list[float] | None:
    if text is None:
        return None
    try:
        values = [float(part) for part in text.replace(",", " ").split()]
    except ValueError:
        values = []
    if not values or not all(map(math.isfinite, values)):
        raise click.BadParameter(
            f"expected numbers such as 0.5 or 0.49,0.48,0.45, got {text!r}", param=parameter
        )
    return values


def _size(
    _context: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[int, int] | None:
    if text is None:
        return None
    parts = text.lower().replace("x", " ").replace(",", " ").split()
    if len(parts) not in (1, 2) or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"expected 32 or 32x32, got {text!r}", param=parameter)
    return int(parts[0]), int(parts[-1])


def _shape(
    _context: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = text.lower().replace("x", " ").replace(",", " ").split()
    if not parts or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise click.BadParameter(f"expected 3x32x32, got {text!r}", param=parameter)
    return tuple(map(int, parts))


def _device(_context: click.Context, parameter: click.Parameter, text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise click.BadParameter(
            f"expected cpu, cuda, cuda:1 or the like, got {text!r}", param=parameter
        ) from error


def _place(model: nn.Module, device: torch.device) -> nn.Module:
    """The model on this device, which is tried first: what is not there raises errors of many kinds."""
    if device.type == "cpu":
        return model
    try:
        torch.ones((), device=device).item()
    except Exception as error:
        why = printable(str(error).split("\n")[0])
        raise InputError.of(
            "load_model",
            "device",
            expected="one that this torch can compute on",
            got=f"{device} ({why})",
            way_out="leave --device out for the CPU, or see `tacext info`",
        ) from error
    return model.to(device)


def _data_option(required: bool) -> Callable[[_Command], _Command]:
    return click.option(
        "--data",
        "data_path",
        required=required,
        type=click.Path(),
        help="Images: an .npz, a folder of class folders, or binary batches of CIFAR-10 or CIFAR-100.",
    )


_WEIGHTS = click.argument("weights", type=click.Path())
_WEIGHTS_OF_SEVERAL = click.argument("weights", nargs=-1, required=True, type=click.Path())
_ARCH = click.option(
    "--arch",
    required=True,
    metavar="MODULE_OR_FILE:FACTORY",
    help="What builds the model; runs that code. Example: zoo.py:resnet20.",
)
_INPUT_SHAPE = click.option(
    "--input-shape",
    callback=_shape,
    metavar="CxHxW",
    help="Scan without images: the shape of one, such as 3x32x32. Settles little.",
)

_DATA_OPTIONS = (
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
    click.option(
        "--mean",
        callback=_floats,
        help="Mean of each channel that the model was trained with, such as 0.49,0.48,0.45, of images "
        "in [0, 1].",
    ),
    click.option("--std", callback=_floats, help="Standard deviation of each channel, likewise."),
    click.option("--size", callback=_size, metavar="HxW", help="Resize images of a folder."),
    click.option(
        "--device",
        callback=_device,
        default="cpu",
        show_default=True,
        help="Where the model runs, such as cuda or cuda:1.",
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        help="Images in a pass; fewer take less memory.  [default: 256; in repairs 128]",
    ),
    click.option("--json", "json_path", type=click.Path(), help="Write the result as JSON."),
)

_SCAN_OPTIONS = (
    click.option("--head", help="Name of the last linear layer, if it is not found by itself."),
    click.option(
        "--metric",
        type=click.Choice(["standardized", "l2"]),
        default="standardized",
        show_default=True,
        help="How perturbations are measured.",
    ),
    click.option(
        "--quantile",
        type=Finite(0, 1, min_open=True),
        default=1.0,
        show_default=True,
        help="Share of the images that must be carried past each pair of classes.",
    ),
    click.option(
        "--alpha",
        type=Finite(0, 1, min_open=True, max_open=True),
        default=0.01,
        show_default=True,
        help="False-alarm rate of the verdict.",
    ),
    click.option(
        "--depth",
        type=click.Choice(get_args(Depth)),
        default="thorough",
        show_default=True,
        help="What to look at: thorough asks the model's gradients as well; fast runs it forward on "
        "changed images, and calls all-to-all backdoors clean; norms does neither.",
    ),
)


@dataclass(frozen=True)
class ScanOptions:
    """How the command line wants a model scanned."""

    head: str | None
    metric: str
    quantile: float
    alpha: float
    depth: str
    trust_patch: bool = False


@dataclass(frozen=True)
class ModelAndData:
    """A model and its images as the command line names them; nothing is read yet."""

    weights: str
    arch: str
    data_path: str | None
    split: str | None
    samples: int | None
    seed: int
    mean: list[float] | None
    std: list[float] | None
    size: tuple[int, int] | None
    device: torch.device
    batch_size: int | None
    json_path: str | None

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise click.UsageError("--mean and --std go together: give both or neither")

    def load_model(
        self, weights: str | None = None, factory: Callable[[], nn.Module] | None = None
    ) -> nn.Module:
        """The model (with other weights, or of a factory that is loaded), taking images in [0, 1].

        Raises:
            FileError: as `tacext.load_model`.
            InputError: likewise; or a device that torch cannot compute on.
        """
        model = load_model(self.weights if weights is None else weights, factory or self.arch)
        if self.mean is not None and self.std is not None:
            model = Normalized(model, self.mean, self.std).eval()
        return _place(model, self.device)

    def load_images(self, need_labels: bool = True) -> ImageSet:
        """The images, or a random choice of them."""
        assert self.data_path is not None  # only a scan can do without
        images = load_images(
            self.data_path, split=self.split, size=self.size, need_labels=need_labels
        )
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

    def scan(
        self,
        model: nn.Module,
        images: ImageSet | None,
        options: ScanOptions,
        input_shape: tuple[int, ...] | None = None,
    ) -> ScanReport:
        """Scans the loaded model as the command line asks for."""
        return scan(
            model,
            images,
            input_shape=input_shape,
            head=head_in_model(options.head, model),
            metric="l2" if options.metric == "l2" else "standardized",
            quantile=options.quantile,
            alpha=options.alpha,
            depth=cast(Depth, options.depth),
            trust_patch=options.trust_patch,
            seed=self.seed,
            batch_size=self.batch_size or BATCH_SIZE,
        )

    def named(self, report: ScanReport) -> ScanReport:
        """The report with the layer's name as the user's own model has it."""
        if self.mean is None:
            return report
        return replace(report, head=report.head.removeprefix("model."))

    def check_outputs(
        self,
        operation: str,
        outputs: Mapping[str, str | None],
        inputs: Mapping[str, str | Path | None] | None = None,
    ) -> None:
        """Before any work: every output can be written, and none replaces an input or another.

        Args:
            operation: named in the errors.
            outputs: the files to be written, by option.
            inputs: the files that the command reads beside those that all commands do, by option.
        """
        read = {
            "WEIGHTS": self.weights,
            "--data": self.data_path,
            "--arch": code_file(self.arch),
            **(inputs or {}),
        }
        taken = {os.path.realpath(path): name for name, path in read.items() if path is not None}
        data = None if self.data_path is None else Path(os.path.realpath(self.data_path))
        for argument, path in outputs.items():
            if path is None:
                continue
            target = check_writable(path, operation=operation, argument=argument)
            conflict = None
            if str(target) in taken:
                conflict = f"which is {taken[str(target)]}"
            elif data is not None and data.is_dir() and data in target.parents:
                conflict = "which is inside the folder of --data"
            if conflict is not None:
                raise FileError.of(
                    operation,
                    argument,
                    expected="a file of its own",
                    got=f"{path}, {conflict}",
                    way_out="choose another name or folder",
                )
            taken[str(target)] = f"--{argument}"

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
            "device": str(self.device),
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


def head_in_model(head: str | None, model: nn.Module) -> str | None:
    """A layer's name as the loaded model has it, behind its normalisation.

    Names of no layer of the user's own model are left as they are, for errors to tell.
    """
    if head is None or not isinstance(model, Normalized):
        return head
    known = (name for name, _ in model.named_modules(remove_duplicate=False))
    return f"model.{head}" if f"model.{head}" in known else head


def _collecting(
    kind: type[Any], name: str, options: Sequence[Callable[[_Command], _Command]], command: _Command
) -> _Command:
    """`command` with the options, which arrive as one argument."""

    @functools.wraps(command)
    def collected(**given: Any) -> int | None:
        # Not every command has the options that have a default here.
        values = {f.name: given.pop(f.name) for f in fields(kind) if f.name in given}
        return command(**{name: kind(**values)}, **given)

    return _with_options(collected, options)


def _with_options(command: _Command, options: Sequence[Callable[[_Command], _Command]]) -> _Command:
    for option in reversed(options):
        command = option(command)
    return command


def model_and_data(command: _Command) -> _Command:
    """Adds WEIGHTS and the options that name a model and images; they arrive as one `given`."""
    options = (_WEIGHTS, _ARCH, _data_option(True), *_DATA_OPTIONS)
    return _collecting(ModelAndData, "given", options, command)


def models_and_perhaps_data(command: _Command) -> _Command:
    """As `model_and_data`, for any number of models of one architecture, which arrive as a tuple.

    With `--input-shape`, apart from them, where there are no images.
    """

    @functools.wraps(command)
    def collected(weights: tuple[str, ...], **given: Any) -> int | None:
        shared = {f.name: given.pop(f.name) for f in fields(ModelAndData) if f.name != "weights"}
        return command(given=tuple(ModelAndData(one, **shared) for one in weights), **given)

    options = (_INPUT_SHAPE, _WEIGHTS_OF_SEVERAL, _ARCH, _data_option(False), *_DATA_OPTIONS)
    return _with_options(collected, options)


def scan_options(command: _Command) -> _Command:
    """Adds the options of a scan; they arrive as one `options`."""
    return _collecting(ScanOptions, "options", _SCAN_OPTIONS, command)
