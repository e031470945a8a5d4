"""The file of a guard: one safetensors file, read without running anything, by any language.

`cpp/core/guard_file.cpp` reads the same file by the same rules.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from .errors import FileError, InputError, TacextError
from .files import StrPath, atomic_write, explain
from .guard_scoring import PARTS, GuardScorer, threshold_at

FORMAT, VERSION = "tacext-guard", "1"
LARGEST = 4 << 30  # bytes
MOST_CALIBRATION = 1 << 24  # samples, which float32 still counts
METADATA = {
    "format", "version", "crc32", "false_positive_rate", "head", "ends_in_head", "created_with",
}  # fmt: skip


@dataclass(frozen=True)
class GuardInfo:
    """What a guard was fitted on.

    Attributes:
        samples: clean samples behind its p-values.
        false_positive_rate: the share of clean inputs that it may flag.
        head: name of the model's last linear layer.
        ends_in_head: whether the model's output is that of the head itself.
        class_counts: of these samples, how many were taken for each class.
        head_norms: the length of each row of the head, by which a C program may know the model.
        model_norms: the length of each parameter and buffer, by which the guard knows its model.
        created_with: the version of tacext.
    """

    samples: int
    false_positive_rate: float
    head: str
    ends_in_head: bool
    class_counts: tuple[int, ...]
    head_norms: tuple[float, ...] = field(repr=False)
    model_norms: tuple[float, ...] = field(repr=False)
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
    tensors["model_norms"] = torch.tensor(info.model_norms, dtype=torch.float64)
    told = {
        "format": FORMAT,
        "version": VERSION,
        "false_positive_rate": repr(info.false_positive_rate),
        "head": info.head,
        "ends_in_head": json.dumps(info.ends_in_head),
        "created_with": info.created_with,
    }
    # The tensors lie in the same order whatever the header says.
    told["crc32"] = str(zlib.crc32(_data(safetensors.torch.save(tensors))))
    content = safetensors.torch.save(tensors, metadata=told)
    atomic_write(path, lambda file: file.write(content), operation=operation)


def read_guard(path: StrPath, operation: str) -> tuple[GuardScorer, GuardInfo]:
    """Reads and checks the file; what is returned no longer depends on it.

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
        if source.stat().st_size > LARGEST:
            raise refuse(f"{source}, which is far too large for one", "name another file")
        content = source.read_bytes()
        tensors = safetensors.torch.load(content)
        told = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        if told.get("format") != FORMAT:
            raise refuse(f"other tensors in {source}", "fit a guard and save it")
        if told.get("version") != VERSION:
            raise refuse(
                f"version {told.get('version', '')[:20]!r} of the format in {source}",
                "use the tacext that wrote it, or fit the guard again",
            )
        if set(told) != METADATA or int(told["crc32"]) != zlib.crc32(_data(content)):
            raise ValueError("the checksum does not fit")
        return _checked(tensors, told)
    except FileError:
        raise
    except OSError as error:
        raise refuse(
            f"{source} ({explain(error)})", "check the path and its permissions"
        ) from error
    except (TacextError, Exception) as error:
        raise refuse(
            f"a truncated, damaged or foreign file {source} ({explain(error)})",
            "copy it again, or fit the guard again; nothing in it was run",
        ) from error


def _data(content: bytes) -> bytes:
    """What follows the header of a safetensors file."""
    return content[8 + int.from_bytes(content[:8], "little") :]


def _checked(tensors: dict[str, Tensor], told: dict[str, str]) -> tuple[GuardScorer, GuardInfo]:
    """Scorer and info of a file's content; any exception says what is wrong with it."""
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
    }
    others = {
        "class_counts": (classes,),
        "head_norms": (classes,),
        "model_norms": (len(tensors["model_norms"]),),
    }
    kinds = {"samples": torch.int64, "class_counts": torch.int64, "model_norms": torch.float64}
    if set(tensors) != {*shapes, *others}:
        raise ValueError("other tensors than a guard has")
    for name, shape in {**shapes, **others}.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != kinds.get(name, torch.float32):
            raise ValueError(f"{name}: {tensor.dtype} {list(tensor.shape)}")
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name}: not finite")
    samples, rate = int(tensors["samples"]), _rate(told["false_positive_rate"])
    if classes < 2 or dim < 1 or knots < 1 or not 1 <= samples <= MOST_CALIBRATION:
        raise ValueError("sizes out of range")
    exceeding, counts = tensors["exceeding"], tensors["class_counts"]
    in_order = bool((tensors["knots"].diff() >= 0).all()) and bool((exceeding.diff() <= 0).all())
    if not in_order or float(exceeding[0]) != samples or float(exceeding[-1]) < 0:
        raise ValueError("the calibration is not in order")
    if bool((counts < 0).any()) or int(counts.sum()) != samples:
        raise ValueError("the classes have another number of samples")
    if not bool((tensors["inverse_spread"] > 0).all() & (tensors["inverse_deviation"] > 0).all()):
        raise ValueError("a spread that is not positive")
    if threshold_at(tensors["knots"], exceeding, samples, rate, "Guard") != tensors["threshold"]:
        raise ValueError("the threshold is not that of the rate")
    if told["ends_in_head"] not in ("true", "false"):
        raise ValueError("ends_in_head is neither true nor false")
    info = GuardInfo(
        samples=samples,
        false_positive_rate=rate,
        head=told["head"],
        ends_in_head=told["ends_in_head"] == "true",
        class_counts=tuple(counts.tolist()),
        head_norms=tuple(tensors["head_norms"].tolist()),
        model_norms=tuple(tensors["model_norms"].tolist()),
        created_with=told["created_with"],
    )
    return GuardScorer(**{name: tensors[name].clone() for name in shapes}), info


def _rate(text: str) -> float:
    # As repr writes floats; float() itself would take blanks and underscores.
    if not text or set(text) - set("0123456789.e-"):
        raise ValueError("false_positive_rate is no number")
    rate = float(text)
    if not 0 < rate < 1:
        raise ValueError("false_positive_rate is not between 0 and 1")
    return rate
