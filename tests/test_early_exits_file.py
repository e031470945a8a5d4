"""Early exits in files of weights: what is read again is what was written, and nothing damaged is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tacext
from digits import Cropped, data_parallel, digit_case, padded, patched_digits
from exits import exits_of, hooks_of, patched_head, triggered
from tacext import InputError, Normalized, demo, load_model, repair, save_weights


def test_they_are_saved_and_loaded(tmp_path: Path) -> None:
    model, (images, _) = patched_digits().model, triggered()
    file = tmp_path / "patched.safetensors"
    save_weights(model, file)

    def built() -> nn.Module:
        return Cropped(demo.digit_net())

    loaded = load_model(file, built)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert hooks_of(loaded) == hooks_of(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    raising, known, votes, least = (
        next(n for n in state if n.endswith(f"exits.{part}"))
        for part in ("raising", "known", "votes", "limit.least")
    )
    weight = next(n for n in state if ".exits.layers.0:" in n and n.endswith(".weight"))
    bias = weight.removesuffix("weight") + "bias"
    without = {n: v for n, v in state.items() if ".exits." not in n}
    save_weights(without, file)  # as from before there were any
    assert patched_head(load_model(file, built)).exits is None
    save_weights(
        {n: v for n, v in state.items() if n != least}, file
    )  # and from before they doubted
    assert exits_of(load_model(file, built)).limit is None

    def renamed(new: str) -> dict[str, Tensor]:
        layer = weight.removesuffix(".weight").rpartition(".")[2]
        return {n.replace(layer, new): v for n, v in state.items()}

    for damaged in (
        {n: v for n, v in state.items() if n != raising},
        {n: v for n, v in state.items() if n != known},
        {n: v for n, v in state.items() if n != votes},
        {n: v for n, v in state.items() if n != bias},
        {n: v for n, v in state.items() if n not in (weight, bias)},  # no number 0
        without | {n: state[n] for n in (raising, known, votes)},
        state | {votes: state[votes][None].clone()},
        state | {votes: state[votes].to(torch.int64)},
        state | {least: state[least][:5].clone()},
        state | {least: state[least].to(torch.int64)},
        state | {raising: state[raising][:, :5].clone()},
        state | {raising: state[raising].to(torch.int64)},
        state | {known: state[known].to(torch.uint8)},
        state | {known: state[known][:5].clone()},
        state | {weight: state[weight][0].clone()},
        state | {weight: state[weight][:5].clone()},
        state | {weight: state[weight][:, :5].clone()},
        state | {bias: state[bias][:5].clone()},
        state | {weight: state[weight][:5].clone(), bias: state[bias][:5].clone()},
        state | {weight: state[weight].to(torch.int32)},
        state | {bias.replace("bias", "more"): state[bias]},
        renamed("0:no/layer"),
        renamed("0:model/19"),  # the head
        renamed("0:"),
        renamed("0"),
        renamed(":values"),
        renamed("-1:model/0"),
        renamed("7:model/0"),
        renamed("1:model/0"),  # two of one number
        renamed("0:model/0:0"),
    ):
        save_weights(damaged, file)
        with pytest.raises(InputError, match="load_model: arch: expected"):
            load_model(file, built)


def test_behind_data_parallel_they_are_saved_for_the_plain_model(tmp_path: Path) -> None:
    data, images = padded(digit_case().data.defender), triggered()[0]
    wrapped = data_parallel(Cropped(digit_case().backdoored))
    result = tacext.repair(
        wrapped, data, targets=[0], method="patch", max_accuracy_drop=None, progress=False
    )
    assert not any("module" in name for name in exits_of(result.model).names)
    file = tmp_path / "parallel.safetensors"
    save_weights(result.model, file)
    loaded = load_model(file, lambda: Cropped(demo.digit_net()))
    assert exits_of(loaded).names == exits_of(result.model).names
    with torch.no_grad():
        assert torch.equal(loaded(images), result.model(images))


class Scaled(nn.Module):
    """Takes back what `Normalized` did, as the digits were trained without."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 + 0.1


@pytest.mark.parametrize("whole", [False, True])
def test_a_normalised_model_is_saved_and_read_again(whole: bool, tmp_path: Path) -> None:
    """As the command line does with --mean and --std: the weights are those of the model inside."""
    images, labels = padded(digit_case().data.defender)
    shift = {"mean": [0.1], "std": [0.5]}

    def inner() -> nn.Module:
        return nn.Sequential(Scaled(), Cropped(demo.digit_net()))

    model = inner()
    model[1].model.load_state_dict(digit_case().backdoored.state_dict())  # type: ignore[index,union-attr]
    model = Normalized(model, **shift)
    result = repair(
        model, (images, labels), targets=[demo.TARGET], method="patch", max_accuracy_drop=None
    )
    assert exits_of(result.model).names
    assert isinstance(result.model, Normalized)
    file = tmp_path / "patched.safetensors"
    if whole:
        save_weights(result.model, file)
        read = load_model(file, lambda: Normalized(inner(), **shift))
    else:
        save_weights(result.model.model, file)
        read = Normalized(load_model(file, inner), **shift)
    attacked, _ = triggered()
    with torch.no_grad():
        expected, found = (m.eval()(attacked) for m in (result.model, read))
    assert torch.equal(expected, found)
    assert hooks_of(read) == hooks_of(result.model) > 0
