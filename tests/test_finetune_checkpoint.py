"""A fine-tuning that was interrupted goes on where it was, to the same bits."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from digits import digit_case
from tacext import FileError, FinetuneSettings, InputError, RepairResult, repair, save_weights
from tacext.finetune_checkpoint import FinetuneCheckpoint, FinetuneState

PLAIN = FinetuneSettings(epochs=3)


def finetuned(
    checkpoint: Path | None, settings: FinetuneSettings = PLAIN, **more: object
) -> RepairResult:
    case = digit_case()
    arguments: dict[str, object] = {"targets": [0, 3], "max_accuracy_drop": None} | more
    return repair(
        case.backdoored,
        case.data.defender,
        method="finetune",
        settings=settings,
        checkpoint=checkpoint,
        **arguments,  # type: ignore[arg-type]
    )


def same(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def interrupting(after: int) -> Callable[[FinetuneCheckpoint, FinetuneState], None]:
    save = FinetuneCheckpoint.save

    def saving(self: FinetuneCheckpoint, state: FinetuneState) -> None:
        save(self, state)
        if state.epoch == after:
            raise KeyboardInterrupt

    return saving


@pytest.mark.parametrize(
    "settings",
    [
        PLAIN,
        FinetuneSettings(epochs=3, optimizer="sgd", learning_rate=0.01, gamma=0.0),
        FinetuneSettings(epochs=3, frozen_statistics=False, beta=1.0),
    ],
    ids=["adamw", "sgd", "moving statistics"],
)
def test_it_goes_on_to_the_same_bits(
    settings: FinetuneSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "state.safetensors"
    expected = finetuned(None, settings)
    with monkeypatch.context() as patched:
        patched.setattr(FinetuneCheckpoint, "save", interrupting(after=2))
        with pytest.raises(KeyboardInterrupt):
            finetuned(file, settings)
    found = finetuned(file, settings)
    assert same(found.model, expected.model)
    assert len(found.history) == 3
    for a, b in zip(found.history, expected.history, strict=True):
        for x, y in zip(vars(a).values(), vars(b).values(), strict=True):
            assert x == y or (math.isnan(x) and math.isnan(y))


def test_one_that_is_done_is_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "state.safetensors"
    first = finetuned(file)
    monkeypatch.setattr("tacext.finetuning.divergence", None)  # no step can be made without it
    again = finetuned(file)
    assert same(first.model, again.model)
    assert first.history == again.history


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    finetuned(file, FinetuneSettings(epochs=1))
    for more in (
        {"settings": FinetuneSettings(epochs=2)},
        {"settings": FinetuneSettings(epochs=1, seed=1)},
        {"settings": FinetuneSettings(epochs=1), "targets": [0]},
    ):
        with pytest.raises(InputError, match="checkpoint: expected the state of this fine-tuning"):
            finetuned(file, **more)  # type: ignore[arg-type]
    case = digit_case()
    images, labels = case.data.defender
    with pytest.raises(InputError, match="that of another model, or with other data or settings"):
        repair(
            case.clean, (images, labels), targets=[0, 3], method="finetune", max_accuracy_drop=None,
            settings=FinetuneSettings(epochs=1), checkpoint=file,
        )  # fmt: skip


def test_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.safetensors"
    settings = FinetuneSettings(epochs=1)
    save_weights(digit_case().backdoored, file)
    with pytest.raises(FileError, match="expected a file that a fine-tuning wrote"):
        finetuned(file, settings)
    finetuned(tmp_path / "good.safetensors", settings)
    content = (tmp_path / "good.safetensors").read_bytes()
    for damaged in (b"", content[:100], content[: len(content) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(FileError, match="delete this one to begin anew"):
            finetuned(file, settings)
        assert file.read_bytes() == damaged
    with pytest.raises(InputError, match=r"ends in \.safetensors"):
        finetuned(tmp_path / "state.pt", settings)
    with pytest.raises(FileError, match="whose folder does not exist"):
        finetuned(tmp_path / "none" / "state.safetensors", settings)
    with pytest.raises(InputError, match="only a fine-tuning has one"):
        repair(digit_case().backdoored, digit_case().data.defender, method="patch", checkpoint=file)
