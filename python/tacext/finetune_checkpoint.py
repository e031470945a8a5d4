"""Where a fine-tuning stands after an epoch, in a file, so that it can be gone on with.

One safetensors file, written whole or not at all and read without running anything. It names what it
belongs to, the model, the data and the settings, and is refused for any other.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from .errors import FileError, InputError
from .files import StrPath, atomic_write, check_writable, explain
from .ops import build_info
from .repair_settings import RepairSettings

FORMAT = "tacext-finetuning-1"


@dataclass(frozen=True, eq=False)
class FinetuneState:
    """All that an epoch leaves to the next.

    Attributes:
        epoch: how many are done.
        model: its state dict.
        optimizer: by the number of a parameter what the optimiser remembers of it; nothing of one
            that had no gradient yet.
        adversary: its changes, patches and velocities.
        shifts: s_t, float64 [T, D].
        history: the losses of the epochs, float64 [epochs, 4].
    """

    epoch: int
    model: dict[str, Tensor]
    optimizer: dict[int, dict[str, Tensor]]
    adversary: dict[str, Tensor]
    shifts: Tensor
    history: Tensor


class FinetuneCheckpoint:
    """The file of one fine-tuning.

    Args:
        path: where it is, or is to be; ends in .safetensors.
        belongs_to: what `fingerprint` says of the model, the data and the settings.
    """

    def __init__(self, path: StrPath, belongs_to: str) -> None:
        self.path = check_checkpoint(path)
        self._belongs_to = belongs_to

    def save(self, state: FinetuneState) -> None:
        """Replaces what is there.

        Raises:
            FileError: the folder is missing or not writable, or the disk is full.
        """
        tensors = {f"model.{n}": t for n, t in state.model.items()}
        for i, memory in state.optimizer.items():
            tensors |= {f"optimizer.{i}.{n}": t for n, t in memory.items()}
        tensors |= {f"adversary.{n}": t for n, t in state.adversary.items()}
        tensors |= {"shifts": state.shifts, "history": state.history}
        # Copies: tied weights share memory, which the format does not know.
        whole = {n: t.detach().cpu().clone().contiguous() for n, t in tensors.items()}
        told = {"format": FORMAT, "epoch": str(state.epoch), "belongs_to": self._belongs_to}
        content = safetensors.torch.save(whole, metadata=told)
        atomic_write(
            self.path, lambda file: file.write(content), operation="repair", argument="checkpoint"
        )

    def load(self) -> FinetuneState | None:
        """What is there; None where there is no file yet.

        Raises:
            FileError: it cannot be read, or is no such file.
            InputError: it belongs to another model, other data or other settings.
        """
        if not self.path.exists():
            return None
        try:
            content = self.path.read_bytes()  # and no map of a file that may change
            size = int.from_bytes(content[:8], "little")
            told = json.loads(content[8 : 8 + size])["__metadata__"]
            if told["format"] != FORMAT:
                raise ValueError("another format")
            if told["belongs_to"] != self._belongs_to:
                raise self._of_something_else()
            return _state(safetensors.torch.load(content), int(told["epoch"]))
        except InputError:
            raise
        except Exception as error:
            raise self.unusable(error) from error

    def unusable(self, error: Exception) -> FileError:
        """What to raise where its content is not what it should be."""
        return FileError.of(
            "repair",
            "checkpoint",
            expected="a file that a fine-tuning wrote",
            got=f"{self.path} ({explain(error)})",
            way_out="name another file, or delete this one to begin anew",
        )

    def _of_something_else(self) -> InputError:
        return InputError.of(
            "repair",
            "checkpoint",
            expected="the state of this fine-tuning",
            got=f"that of another model, or with other data, settings or versions, in {self.path}",
            way_out="name another file, or delete this one to begin anew",
        )


def _state(tensors: dict[str, Tensor], epoch: int) -> FinetuneState:
    """The state in a file; any exception says what is wrong with it."""
    history, shifts = tensors["history"], tensors["shifts"]
    if epoch < 1 or history.shape != (epoch, 4) or history.dtype != torch.float64:
        raise ValueError("the history is not that of so many epochs")
    if shifts.dim() != 2 or shifts.dtype != torch.float64 or not bool(torch.isfinite(shifts).all()):
        raise ValueError("shifts that cannot be")
    memories: dict[int, dict[str, Tensor]] = {}
    for name, tensor in _below("optimizer", tensors).items():
        index, key = name.split(".", 1)
        memories.setdefault(int(index), {})[key] = tensor
    return FinetuneState(
        epoch=epoch,
        model=_below("model", tensors),
        optimizer=memories,
        adversary=_below("adversary", tensors),
        shifts=shifts,
        history=history,
    )


def check_checkpoint(path: StrPath) -> Path:
    """The path, if a checkpoint can be written there.

    Raises:
        InputError: another ending than .safetensors.
        FileError: it cannot be written.
    """
    if Path(path).suffix.lower() != ".safetensors":
        raise InputError.of(
            "repair",
            "checkpoint",
            expected="a file name that ends in .safetensors",
            got=str(path),
            way_out="add .safetensors to it",
        )
    return check_writable(path, operation="repair", argument="checkpoint")


def fingerprint(
    model: nn.Module, tensors: Iterable[Tensor], settings: RepairSettings, *more: object
) -> str:
    """What tells one fine-tuning from another: a digest of all that goes into it.

    Args:
        model: the original; its modules, too, as weights alone do not tell what is made of them.
        tensors: the data.
        settings: of the fine-tuning.
        more: what else it depends on.

    Raises:
        InputError: the model's state is not tensors alone.
    """
    digest = hashlib.sha256(str(model).encode())
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise InputError.of(
                "repair",
                "checkpoint",
                expected="a model whose state is tensors alone",
                got=f"{name}, a {type(tensor).__name__}",
                way_out="leave the checkpoint out",
            )
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(_bytes(tensor))
    versions = (build_info().version, torch.__version__)
    digest.update(json.dumps([asdict(settings), [*more, *versions]], sort_keys=True).encode())
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def _below(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}."
    return {n.removeprefix(start): t for n, t in tensors.items() if n.startswith(start)}
