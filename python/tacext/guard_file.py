"""The file of a guard: one safetensors file, read without running anything, by any language."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .errors import FileError, InputError, TacextError
from .files import StrPath, atomic_write, explain
from .guard_scoring import PARTS, GuardScorer

FORMAT, VERSION = "tacext-guard", "1"
BUFFERS = (
    "mean",
    "inverse_spread",
    "basis",
    "near_weight",
    "far_weight",
    "direction",
    "location",
    "inverse_deviation",
    "knots",
    "exceeding",
    "threshold",
    "samples",
)


@dataclass(frozen=True)
class GuardInfo:
    """What a guard was fitted on.

    Attributes:
        samples: clean samples behind its p-values.
        false_positive_rate: the share of clean inputs that it may flag.
        head: name of the model's last linear layer.
        ends_in_head: whether the model's output is that of the head itself.
        class_counts: of these samples, how many were taken for each class.
        head_norms: the length of each row of the head, by which the guard knows its model.
        created_with: the version of tacext.
    """

    samples: int
    false_positive_rate: float
    head: str
    ends_in_head: bool
    class_counts: tuple[int, ...]
    head_norms: tuple[float, ...]
    created_with: str

    @property
    def num_classes(self) -> int:
        """C."""
        return len(self.class_counts)

    @property
    def unseen_classes(self) -> tuple[int, ...]:
        """Classes that no clean sample was taken for: the guard knows little about them."""
        return tuple(k for k, count in enumerate(self.class_counts) if not count)


def write_guard(scorer: GuardScorer, info: GuardInfo, path: StrPath) -> None:
    """Writes the file, whole or not at all.

    Raises:
        InputError: another ending than .safetensors.
        FileError: the folder is missing or not writable, or the disk is full.
    """
    operation = "Guard.save"
    if Path(path).suffix.lower() != ".safetensors":
        raise InputError.of(
            operation,
            "path",
            expected="a file name that ends in .safetensors",
            got=os.fspath(path),
            way_out="add .safetensors to it",
        )
    tensors = {n: t.detach().cpu().clone().contiguous() for n, t in scorer.state_dict().items()}
    tensors["class_counts"] = torch.tensor(info.class_counts, dtype=torch.int64)
    tensors["head_norms"] = torch.tensor(info.head_norms, dtype=torch.float32)
    told = {
        "format": FORMAT,
        "version": VERSION,
        "false_positive_rate": repr(info.false_positive_rate),
        "head": info.head,
        "ends_in_head": json.dumps(info.ends_in_head),
        "created_with": info.created_with,
    }
    content = safetensors.torch.save(tensors, metadata=told)
    atomic_write(path, lambda file: file.write(content), operation=operation)


def read_guard(path: StrPath, operation: str) -> tuple[GuardScorer, GuardInfo]:
    """Reads and checks the file.

    Raises:
        FileError: missing, unreadable, truncated, damaged, of something else, or of a version that
            this one does not know.
    """
    source = Path(path)

    def refuse(got: str, way_out: str) -> FileError:
        expected = "a file that Guard.save wrote"
        return FileError.of(operation, "path", expected=expected, got=got, way_out=way_out)

    try:
        if source.exists() and not source.is_file():
            raise refuse(f"{source}, which is not a regular file", "name the file itself")
        with source.open("rb"):  # for an error that says why it cannot be
            pass
        with safetensors.safe_open(source, "pt") as file:
            told = file.metadata() or {}
            if told.get("format") != FORMAT:
                raise refuse(f"other tensors in {source}", "fit a guard and save it")
            if told.get("version") != VERSION:
                raise refuse(
                    f"version {told.get('version', '')[:20]!r} of the format in {source}",
                    "use the tacext that wrote it, or fit the guard again",
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _checked(tensors, told)
    except TacextError:
        raise
    except OSError as error:
        raise refuse(
            f"{source} ({explain(error)})", "check the path and its permissions"
        ) from error
    except Exception as error:
        raise refuse(
            f"a truncated, damaged or foreign file {source} ({explain(error)})",
            "copy it again, or fit the guard again; nothing in it was run",
        ) from error


def _checked(tensors: dict[str, Tensor], told: dict[str, Any]) -> tuple[GuardScorer, GuardInfo]:
    """Scorer and info of a file's content; a ValueError or KeyError says what is wrong with it."""
    classes, dim = tensors["mean"].shape
    ranks, knots = len(tensors["basis"]), len(tensors["knots"])
    shapes = {
        "mean": (classes, dim),
        "inverse_spread": (dim,),
        "basis": (ranks, dim),
        "near_weight": (ranks + 1,),
        "far_weight": (ranks + 1,),
        "direction": (classes, dim),
        "location": (classes, len(PARTS)),
        "inverse_deviation": (classes, len(PARTS)),
        "knots": (knots,),
        "exceeding": (knots + 1,),
        "threshold": (),
        "samples": (),
        "class_counts": (classes,),
        "head_norms": (classes,),
    }
    if set(tensors) != set(shapes):
        raise ValueError(f"expected the tensors {', '.join(shapes)}")
    for name, shape in shapes.items():
        kind = torch.int64 if name in ("samples", "class_counts") else torch.float32
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != kind:
            raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: not finite")
    samples, rate = int(tensors["samples"]), float(told["false_positive_rate"])
    if classes < 2 or dim < 1 or knots < 1 or samples < 1 or not 0 < rate < 1:
        raise ValueError("sizes or rate out of range")
    falling = tensors["exceeding"].diff() <= 0
    if not bool((tensors["knots"].diff() >= 0).all()) or not bool(falling.all()):
        raise ValueError("the calibration is not in order")
    info = GuardInfo(
        samples=samples,
        false_positive_rate=rate,
        head=str(told["head"]),
        ends_in_head=bool(json.loads(told["ends_in_head"])),
        class_counts=tuple(tensors["class_counts"].tolist()),
        head_norms=tuple(tensors["head_norms"].tolist()),
        created_with=str(told["created_with"]),
    )
    return GuardScorer(**{name: tensors[name] for name in BUFFERS}), info


def same_head(norms: Tensor, known: tuple[float, ...], half: bool) -> bool:
    """Whether rows of these lengths are those of the head that a guard was fitted on."""
    tolerance = 1e-2 if half else 1e-5
    expected = torch.tensor(known, dtype=torch.float64)
    if norms.shape != expected.shape:
        return False
    apart = (norms.double().cpu() - expected).abs()
    return float(apart.max()) <= tolerance * max(float(expected.max()), math.ulp(0.0))
