"""Files of guards: the same bits again, and nothing of what is damaged, foreign or another model's."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import pytest
import torch
from torch import nn

import tacext
from digits import data_parallel, digit_case
from guard_files import DAMAGES, damaged
from tacext import FileError, Guard, GuardOutput, InputError


@functools.cache
def guard() -> Guard:
    return Guard.fit(digit_case().backdoored, digit_case().data.defender, 0.05)


def same(a: GuardOutput, b: GuardOutput) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_file_brings_back_the_same_bits(tmp_path: Path) -> None:
    images = digit_case().data.test[0]
    guard().save(tmp_path / "guard.safetensors")
    loaded = Guard.load(tmp_path / "guard.safetensors", digit_case().backdoored)
    assert loaded.info == guard().info
    with torch.no_grad():
        assert same(loaded(images), guard()(images))
    halved = Guard.load(
        tmp_path / "guard.safetensors", copy.deepcopy(digit_case().backdoored).half()
    )
    assert halved.info == guard().info


def test_a_guard_knows_its_model(tmp_path: Path) -> None:
    guard().save(tmp_path / "guard.safetensors")
    others = [digit_case().clean, nn.Linear(128, 10), nn.Conv2d(1, 10, 1)]
    for index in (0, -2, -1):
        nudged = copy.deepcopy(digit_case().backdoored)
        with torch.no_grad():
            list(nudged.parameters())[index].mul_(1.001)
        others.append(nudged)
    for other in others:
        with pytest.raises(InputError, match=r"Guard.load: model: expected the model that"):
            Guard.load(tmp_path / "guard.safetensors", other)
    normalised = tacext.Normalized(digit_case().backdoored, [0.4], [0.2])
    Guard.fit(normalised, digit_case().data.defender, 0.05).save(tmp_path / "guard.safetensors")
    with pytest.raises(InputError, match="with the same normalisation around it"):
        Guard.load(
            tmp_path / "guard.safetensors", tacext.Normalized(digit_case().backdoored, [0.5], [0.2])
        )


def test_a_guard_stands_beside_the_model_behind_data_parallel_and_back(tmp_path: Path) -> None:
    images, file = digit_case().data.test[0], tmp_path / "guard.safetensors"
    guard().save(file)
    loaded = Guard.load(file, data_parallel(digit_case().backdoored))
    assert loaded.info.head == "module." + guard().info.head
    loaded.save(file)
    again = Guard.load(file, digit_case().backdoored)
    assert again.info == guard().info
    with torch.no_grad():
        for other in (loaded, again):
            assert same(other(images), guard()(images))
    with pytest.raises(InputError, match=r"Guard.load: model: expected the model that"):
        Guard.load(file, data_parallel(digit_case().clean))


class _Within(nn.Module):
    """The model as `module`, and beside it a layer that nobody calls, of the head's shape."""

    def __init__(self) -> None:
        super().__init__()
        self.module = copy.deepcopy(digit_case().backdoored)
        self.module.add_module("19", self.module.get_submodule(guard().info.head))
        self.add_module("19", nn.Linear(128, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.module(x)  # type: ignore[no-any-return]


def test_another_layer_of_the_heads_shape_is_not_taken_for_it(tmp_path: Path) -> None:
    images, file = digit_case().data.test[0], tmp_path / "guard.safetensors"
    model = _Within()
    fitted = Guard.fit(model, digit_case().data.defender, 0.05)
    assert fitted.info.head == "module.19"
    fitted.save(file)
    loaded = Guard.load(file, data_parallel(model))
    assert loaded.info.head == "module.module.19"
    with torch.no_grad():
        assert same(loaded(images), fitted(images))


def test_on_several_devices_a_head_is_not_looked_at_within(tmp_path: Path) -> None:
    file = tmp_path / "guard.safetensors"
    softmax = nn.Sequential(digit_case().backdoored, nn.Softmax(1)).eval()
    Guard.fit(softmax, digit_case().data.defender, 0.05).save(file)
    wrapped = data_parallel(softmax)
    Guard.load(file, wrapped)
    wrapped.device_ids = [0, 1]
    with pytest.raises(InputError, match=r"one that runs on one device.*pass model\.module"):
        Guard.load(file, wrapped)


def test_a_loaded_guard_no_longer_depends_on_its_file(tmp_path: Path) -> None:
    file, images = tmp_path / "guard.safetensors", digit_case().data.test[0]
    guard().save(file)
    loaded = Guard.load(file, digit_case().backdoored)
    with file.open("r+b") as opened:
        opened.write(bytes(file.stat().st_size))
        opened.truncate(10)
    with torch.no_grad():
        assert same(loaded(images), guard()(images))


@pytest.mark.parametrize("how", DAMAGES)
def test_damaged_and_foreign_files_are_refused(tmp_path: Path, how: str) -> None:
    file = tmp_path / "guard.safetensors"
    guard().save(file)
    file.write_bytes(damaged(file.read_bytes(), how))
    with pytest.raises(FileError, match=r"Guard.load: path: expected a file that Guard.save wrote"):
        Guard.load(file, digit_case().backdoored)


def test_every_byte_cut_off_is_noticed(tmp_path: Path) -> None:
    file = tmp_path / "guard.safetensors"
    guard().save(file)
    content = file.read_bytes()
    for length in (1, 7, 8, 9, 100, 700, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(FileError):
            Guard.load(file, digit_case().backdoored)


def test_files_that_are_not_there_or_cannot_be_written(tmp_path: Path) -> None:
    for bad in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(FileError, match=r"Guard.load: path"):
            Guard.load(bad, digit_case().backdoored)
    with pytest.raises(InputError, match=r"ends in \.safetensors"):
        guard().save(tmp_path / "guard.bin")
    with pytest.raises(FileError, match="folder does not exist"):
        guard().save(tmp_path / "none" / "guard.safetensors")
