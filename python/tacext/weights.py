"""Weights from files that nobody vouches for, and the model code that the user does vouch for.

No file of weights is ever unpickled in a way that could run code.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .errors import FileError, InputError, TacextError
from .files import StrPath, atomic_write, explain
from .heads import PREFIXES
from .latent_patch import make_room_for_patches
from .user_code import load_factory

__all__ = ["load_factory", "load_model", "load_state_dict", "save_weights"]

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WRAPPERS = ("state_dict", "model_state_dict", "model", "net", "weights")
LARGEST_HARMLESS = 2**20  # bytes that compressed code and names may grow to
ASK = "ask the publisher for safetensors, or for torch.save(model.state_dict(), path)"

# How many batches a batch norm has seen: nothing in evaluation, and not in checkpoints of old.
_COUNTER = "num_batches_tracked"


def load_state_dict(path: StrPath) -> dict[str, Tensor]:
    """Reads a model's weights, and runs nothing that the file may hold.

    `.safetensors` files go through safetensors; `.pt`, `.pth`, `.bin` and `.ckpt` through
    torch.load(weights_only=True). A checkpoint that keeps its weights under "state_dict",
    "model_state_dict", "model", "net" or "weights" is unwrapped; a prefix "module." or "_orig_mod."
    that all names share is dropped.

    Args:
        path: the file.

    Returns:
        Names and dense tensors on the CPU, of the dtypes in the file.

    Raises:
        FileError: the file is missing, unreadable, damaged, of another kind than its name says, or
            holds more than tensors: then it is refused and nothing in it was run.
        InputError: no tensors, entries that are not dense tensors, NaN or infinity, or several
            entries that could be the weights.
    """
    return _strip_prefixes(_read_state("load_state_dict", "path", path))


def load_model(weights: StrPath, arch: str | Callable[[], nn.Module]) -> nn.Module:
    """Builds a model with the user's factory and fills it with the weights of a file.

    Args:
        weights: as `load_state_dict`.
        arch: a function or class that builds the model, or its name as `load_factory` takes it; it
            takes no arguments and returns an nn.Module.

    Returns:
        The model, on the CPU and in eval mode. Where the weights are those of a repair by
        `method="patch"`, it has the latent patch in front of its head.

    Raises:
        FileError: as `load_state_dict` and `load_factory`.
        InputError: as `load_state_dict` and `load_factory`; also a factory that needs arguments,
            fails or returns something else, or weights that do not fit the model.
    """
    operation = "load_model"
    if isinstance(arch, nn.Module) or not (isinstance(arch, str) or callable(arch)):
        raise InputError.of(
            operation,
            "arch",
            expected="a function that builds the model, or where to find it",
            got=f"a {type(arch).__name__}",
            way_out="pass path/to/file.py:function or the function itself; into a model that is "
            "there, load with model.load_state_dict(tacext.load_state_dict(path))",
        )
    state = _read_state(
        operation, "weights", weights
    )  # first: an unsafe file is refused before code runs
    if isinstance(arch, str):
        factory, name = load_factory(arch), arch
    else:
        factory, name = arch, getattr(arch, "__qualname__", repr(arch))
    try:
        model: object = factory()
    except TacextError:
        raise
    except (Exception, SystemExit) as error:
        raise InputError.of(
            operation,
            "arch",
            expected=f"{name} to build a model",
            got=explain(error),
            way_out="correct the factory, or wrap it in a function that takes no arguments",
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError.of(
            operation,
            "arch",
            expected=f"{name} to return an nn.Module",
            got=type(model).__name__,
            way_out="name a function or class that returns the model itself",
        )
    expected = model.state_dict()
    if state.keys() != expected.keys():
        model = make_room_for_patches(model, state)
        expected = model.state_dict()
    if state.keys() != expected.keys():  # a model may itself have a child named "module"
        state = _strip_prefixes(state)
        model = make_room_for_patches(model, state)
        expected = model.state_dict()
    # Without these torch loads a checkpoint as well.
    counters = {k: v for k, v in expected.items() if k.endswith(_COUNTER) and k not in state}
    state |= {name: counter for name, counter in counters.items() if isinstance(counter, Tensor)}
    mismatch = _describe_mismatch(expected, state)
    if not mismatch:
        try:
            model.load_state_dict(state, strict=True)
        except (RuntimeError, TypeError, ValueError, AttributeError) as error:
            mismatch = explain(error)
    if mismatch:
        raise InputError.of(
            operation,
            "arch",
            expected=f"{name} to fit the weights in {os.fspath(weights)}",
            got=mismatch,
            way_out="these are the weights of a tacext.Normalized: save its .model, or have --arch build one"
            if _is_normalized(state)
            else "--arch must build the very model, with as many classes, that was trained",
        )
    return model.eval()


def save_weights(model_or_state: nn.Module | Mapping[str, Tensor], path: StrPath) -> None:
    """Writes a model's weights as safetensors, whole or not at all.

    Tensors that share memory (tied weights) are written once for each name, so that the file
    loads with strict=True.

    Args:
        model_or_state: a model, or names and dense tensors on any device.
        path: the file, ending in .safetensors.

    Raises:
        FileError: the folder is missing or not writable, or the disk is full; an existing file is
            left as it was.
        InputError: another ending, entries that are not dense tensors, NaN or infinity.
    """
    operation = "save_weights"
    if Path(path).suffix.lower() != ".safetensors":
        raise InputError.of(
            operation,
            "path",
            expected="a file name that ends in .safetensors",
            got=f"{os.fspath(path)}",
            way_out="add .safetensors to it",
        )
    state: object = model_or_state
    if isinstance(model_or_state, nn.Module):
        state = model_or_state.state_dict()
    if not isinstance(state, Mapping):
        raise InputError.of(
            operation,
            "model_or_state",
            expected="an nn.Module or a dict of tensors",
            got=type(state).__name__,
            way_out="pass the model or model.state_dict()",
        )
    tensors = _check_tensors(operation, "model_or_state", state)
    # safetensors refuses shared memory; clones also are contiguous.
    copies = {
        name: tensor.cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    try:
        content = safetensors.torch.save(copies, metadata={"format": "pt"})
    except Exception as error:
        raise InputError.of(
            operation,
            "model_or_state",
            expected="dtypes that safetensors can hold",
            got=explain(error),
            way_out="convert the tensors, e.g. with model.float()",
        ) from error
    atomic_write(path, lambda file: file.write(content), operation=operation)


# ---- reading -------------------------------------------------------------------------------------


def _read_state(operation: str, argument: str, path: StrPath) -> dict[str, Tensor]:
    """The checked weights of a file, under the names that they have there."""
    reader = _Reader(operation, argument, Path(path))
    return _check_tensors(operation, argument, reader.read(), f" in {reader.source}")


@dataclass(frozen=True)
class _Reader:
    """Reads what a file holds; knows how its errors name things."""

    operation: str
    argument: str
    source: Path

    def refuse(self, expected: str, got: str, way_out: str) -> FileError:
        return FileError.of(
            self.operation, self.argument, expected=expected, got=got, way_out=way_out
        )

    def damaged(self, why: str) -> FileError:
        return self.refuse(
            f"{self.named} with weights",
            f"a truncated, damaged or foreign file {self.source} ({why})",
            "download it again; nothing in it was run",
        )

    @property
    def named(self) -> str:
        """The kind of file that the name promises."""
        suffix = self.source.suffix.lower()
        return "safetensors" if suffix == ".safetensors" else "a PyTorch pickle"

    def read(self) -> object:
        source = self.source
        if source.is_dir():
            raise self.refuse("a file", f"{source}, which is a directory", "name the file itself")
        if source.suffix.lower() not in (".safetensors", *PICKLE_SUFFIXES):
            raise self.refuse(
                f"a file ending in .safetensors, {', '.join(PICKLE_SUFFIXES)}",
                str(source),
                "save the weights as safetensors",
            )
        try:
            if source.exists() and not source.is_file():
                kind = "a directory" if source.is_dir() else "not a regular file"
                raise self.refuse("a file", f"{source}, which is {kind}", "name the file itself")
            with source.open("rb") as file:
                self.check_kind(file)
                if self.named == "safetensors":
                    return self.read_safetensors()
                return self.unwrap(self.read_pickle(file))
        except TacextError:
            raise
        except OSError as error:
            raise self.refuse(
                "a file that can be read",
                f"{source} ({explain(error)})",
                "check the path and its permissions",
            ) from error

    def check_kind(self, file: BinaryIO) -> None:
        """Tells safetensors from pickles by their first bytes; rewinds the file."""
        head = file.read(9)
        file.seek(0)
        if not head:
            raise self.damaged("0 bytes")
        if head[8:9] == b"{" and head[4:8] == bytes(4):  # an 8-byte header length, then JSON
            found = "safetensors"
        elif head[:4] == b"PK\x03\x04" or (head[:1] == b"\x80" and head[1:2] <= b"\x05"):
            found = "a PyTorch pickle"
        else:
            return
        if found != self.named:
            raise self.refuse(
                f"{self.named}, as its name says",
                f"{found} in {self.source}",
                "rename it to .safetensors"
                if found == "safetensors"
                else "ask the publisher for real safetensors; nothing in it was run",
            )

    def read_safetensors(self) -> object:
        try:
            return safetensors.torch.load_file(self.source, device="cpu")
        except OSError:
            raise
        except Exception as error:  # SafetensorError, and torch's own on dtypes that it lacks
            raise self.damaged(explain(error)) from error

    def read_pickle(self, file: BinaryIO) -> object:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                # torch.save never compresses tensors: what grows is there to fill the memory.
                size = sum(entry.file_size for entry in archive.infolist())
                if size > LARGEST_HARMLESS + 2 * self.source.stat().st_size:
                    raise self.damaged(f"it would grow to {size / 2**20:.0f} MiB")
        file.seek(0)
        return self.load_pickle(file)

    def load_pickle(self, file: BinaryIO) -> object:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # on old pickles and storages; no use to the user
                # weights_only given here, so that no environment variable can turn it off.
                return torch.load(file, map_location="cpu", weights_only=True)
        # Damaged bytes make the unpickler fail in any way: IndexError, KeyError, OSError ...
        except Exception as error:  # noqa: BLE001
            # torch's own message suggests weights_only=False: it is read here and never shown.
            text = str(error)
            code = re.search(r"(?:GLOBAL|function|add_safe_globals`,? but got) (\S+)", text)
            if "TorchScript" in text:
                wants = "a TorchScript program"
            elif isinstance(error, pickle.UnpicklingError) and code:
                wants = ascii(code[1][:80])
            elif _has_imports(file):
                wants = "code"
            else:
                raise self.damaged(type(error).__name__) from None
            raise self.refuse(
                "tensors and nothing else",
                f"{self.source}, which asks to run {wants}: refused, nothing was run",
                ASK,
            ) from None

    def unwrap(self, loaded: object) -> object:
        """The weights in a checkpoint: the only entry of a known name that is a dict of tensors."""
        if not isinstance(loaded, Mapping) or all(isinstance(v, Tensor) for v in loaded.values()):
            return loaded
        nested = {
            key: value
            for key in WRAPPERS
            if isinstance(value := loaded.get(key), Mapping)
            and any(isinstance(entry, Tensor) for entry in value.values())
        }
        if len(nested) > 1:
            raise InputError.of(
                self.operation,
                self.argument,
                expected="one set of weights",
                got=f"{', '.join(map(repr, nested))} in {self.source}",
                way_out="save only the set that is used, as safetensors",
            )
        return next(iter(nested.values()), loaded)


def _has_imports(file: BinaryIO) -> bool:
    """Whether a bare pickle imports anything: those of newer protocols stop torch before that."""
    file.seek(0)
    try:
        operations = pickletools.genops(file.read(1 << 20))  # lists them, runs none
        return any(op.name in ("GLOBAL", "STACK_GLOBAL", "INST") for op, _, _ in operations)
    except Exception:  # noqa: BLE001 - not a pickle at all
        return False


def _check_tensors(
    operation: str, argument: str, state: object, origin: str = ""
) -> dict[str, Tensor]:
    """Checks that a state is names and dense finite tensors; drops what else the mapping is."""
    if not isinstance(state, Mapping) or not state:
        raise InputError.of(
            operation,
            argument,
            expected="names and tensors",
            got=("no entries" if isinstance(state, Mapping) else type(state).__name__) + origin,
            way_out="save model.state_dict()",
        )
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        problem = None
        if not isinstance(name, str) or not isinstance(value, Tensor):
            problem = f"a {type(value).__name__} under {name!a}"
        elif value.layout != torch.strided or value.is_quantized or value.is_meta:
            problem = f"a sparse, quantized or meta tensor under {name!a}"
        # A few bytes can claim to be terabytes by strides of 0.
        elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
            problem = f"a tensor that repeats its memory under {name!a}"
        if problem:
            raise InputError.of(
                operation,
                argument,
                expected="names and dense tensors",
                got=problem[:200] + origin,
                way_out="save model.state_dict() of the plain model",
            )
        tensors[name] = value.detach()
        if not _is_finite(tensors[name]):
            raise InputError.of(
                operation,
                argument,
                expected="finite weights",
                got=f"NaN or infinity in {name!a}{origin}",
                way_out="the file is damaged or the training diverged: use another checkpoint",
            )
    return tensors


def _is_finite(tensor: Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    try:
        return bool(torch.isfinite(tensor).all())
    except NotImplementedError:  # some 8-bit floats
        return bool(torch.isfinite(tensor.float()).all())


def _strip_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    while prefix := next((p for p in PREFIXES if all(k.startswith(p) for k in state)), None):
        state = {name[len(prefix) :]: tensor for name, tensor in state.items()}
    return state


def _is_normalized(state: Mapping[str, Tensor]) -> bool:
    """Whether these may be the weights of a `Normalized` and what it wraps."""
    others = state.keys() - {"mean", "std"}
    return len(state) == len(others) + 2 and all(name.startswith("model.") for name in others)


def _describe_mismatch(expected: Mapping[str, Any], state: Mapping[str, Tensor]) -> str:
    """A few of the names that are missing, unexpected or of another shape; empty if all fit."""

    def few(label: str, names: list[str]) -> str:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"{label} {', '.join(names[:3])}{more}"

    lists = {
        "missing": [name for name in expected if name not in state],
        "unexpected": [ascii(name)[:80] for name in sorted(state) if name not in expected],
        "wrong shape": [
            f"{name} {list(state[name].shape)} for {list(value.shape)}"
            for name, value in expected.items()
            if name in state
            and isinstance(value, Tensor)
            and not is_lazy(value)
            and state[name].shape != value.shape
        ],
    }
    return "; ".join(few(label, names) for label, names in lists.items() if names)
