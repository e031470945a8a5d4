"""A fine-tuning that was interrupted goes on where it was, to the same bits."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from digits import Cropped, digit_case, padded
from tacext import (
    FileError,
    FinetuneSettings,
    InputError,
    RepairResult,
    load_state_dict,
    repair,
    save_weights,
)
from tacext.finetune_checkpoint import FinetuneCheckpoint, FinetuneState, fingerprint

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


class Odd(nn.Module):
    """Draws random numbers in training, has a parameter without a use, and one of two names."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Cropped(digit_case().backdoored)
        self.again = self.model
        self.unused = nn.Parameter(torch.ones(3))
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(self.dropout(x))  # type: ignore[no-any-return]


def test_all_that_a_step_depends_on_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Patches, too, which images of 8 x 8 have no room for."""
    file, data = tmp_path / "state.safetensors", padded(digit_case().data.defender)

    def tuned(checkpoint: Path | None) -> nn.Module:
        return repair(
            Odd(), data, targets=[0], method="finetune", settings=PLAIN, max_accuracy_drop=None,
            checkpoint=checkpoint,
        ).model  # fmt: skip

    expected = tuned(None)
    with monkeypatch.context() as patched:
        patched.setattr(FinetuneCheckpoint, "save", interrupting(after=2))
        with pytest.raises(KeyboardInterrupt):
            tuned(file)
    assert "adversary.pattern" in load_state_dict(file)
    assert same(tuned(file), expected)


def test_a_damaged_state_is_refused_whatever_it_says(tmp_path: Path) -> None:
    file, settings = tmp_path / "state.safetensors", FinetuneSettings(epochs=2)
    finetuned(file, settings)
    with safe_open(file, "pt") as opened:
        told = opened.metadata()
    good = load_state_dict(file)
    weight = next(n for n in good if n.startswith("model.") and good[n].dim() == 4)
    moment = next(n for n in good if n.endswith("exp_avg"))
    for tensors, epoch in (
        ({n: t for n, t in good.items() if n != "shifts"}, 2),
        ({n: t for n, t in good.items() if n != "history"}, 2),
        ({n: t for n, t in good.items() if n != weight}, 2),
        ({n: t for n, t in good.items() if n != "adversary.change.0"}, 2),
        (good | {weight: good[weight][:1].clone()}, 2),
        (good | {moment: good[moment][:1].clone()}, 2),
        (good | {"optimizer.x.step": torch.zeros(1)}, 2),
        (good | {"optimizer.x": torch.zeros(1)}, 2),
        (good | {"optimizer.999.step": torch.tensor(1.0)}, 2),
        (good | {"shifts": good["shifts"][:1].clone()}, 2),
        (good | {"history": good["history"][:, :3].clone()}, 2),
        (good, 1),
        (good | {"history": good["history"].repeat(50, 1)}, 100),
        (good, -1),
    ):
        file.write_bytes(save(tensors, told | {"epoch": str(epoch)}))
        with pytest.raises(FileError, match="checkpoint: expected a file that a fine-tuning wrote"):
            finetuned(file, settings)


def test_auto_asks_for_the_right_file_before_anything_else(tmp_path: Path) -> None:
    case, file = digit_case(), tmp_path / "state.safetensors"
    finetuned(file, FinetuneSettings(epochs=1))
    with pytest.raises(InputError, match="expected the state of this fine-tuning"):
        repair(case.backdoored, case.data.defender, targets=[0], checkpoint=file)
    save_weights(case.backdoored, file)
    with pytest.raises(FileError, match="expected a file that a fine-tuning wrote"):
        repair(case.backdoored, case.data.defender, targets=[0], checkpoint=file)


def test_what_a_file_is_known_by() -> None:
    case = digit_case()
    images, labels = case.data.defender
    known = fingerprint(case.backdoored, (images, labels), PLAIN, [0], "19", 1.0)
    assert known == fingerprint(case.backdoored, (images, labels), PLAIN, [0], "19", 1.0)
    other = copy.deepcopy(case.backdoored)
    other[1] = nn.Tanh()  # the same weights
    for model, data, settings, more in (
        (other, (images, labels), PLAIN, ([0], "19", 1.0)),
        (case.clean, (images, labels), PLAIN, ([0], "19", 1.0)),
        (case.backdoored, (images.flip(0), labels), PLAIN, ([0], "19", 1.0)),
        (case.backdoored, (images, labels.flip(0)), PLAIN, ([0], "19", 1.0)),
        (case.backdoored, (images, labels), FinetuneSettings(epochs=4), ([0], "19", 1.0)),
        (case.backdoored, (images, labels), PLAIN, ([1], "19", 1.0)),
        (case.backdoored, (images, labels), PLAIN, ([0], "19", 0.9)),
    ):
        assert fingerprint(model, data, settings, *more) != known

    class Extra(nn.Linear):
        def get_extra_state(self) -> dict[str, int]:
            return {}

    with pytest.raises(InputError, match="expected a model whose state is tensors alone"):
        fingerprint(Extra(2, 2), (images, labels), PLAIN)


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
    with pytest.raises(
        InputError, match="that of another model, or with other data, settings or versions"
    ):
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
