"""Early exits: what they compute, which layers they look at, what they bring back, and their undoing."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tacext
from digits import Cropped, digit_case, padded, padded_corner, patched_digits
from tacext import Guard, InputError, PatchSettings, demo, evaluate, load_model, save_weights
from tacext.early_exits import MOST_FEATURES, EarlyExit, EarlyExits, LayerNote, pooled
from tacext.early_exits_fit import MOST_EXITS, fit_early_exits, layers_to_look_at
from tacext.heads import find_head
from tacext.latent_patch import PatchedHead, remove_latent_patch


def patched_head(model: nn.Module) -> PatchedHead:
    return next(m for m in model.modules() if isinstance(m, PatchedHead))


def exits_of(model: nn.Module) -> EarlyExits:
    exits = patched_head(model).exits
    assert exits is not None
    return exits


def hooks_of(model: nn.Module) -> int:
    return sum(isinstance(h, LayerNote) for m in model.modules() for h in m._forward_hooks.values())


def triggered() -> tuple[Tensor, Tensor]:
    images, labels = padded(digit_case().data.test)
    others = labels != demo.TARGET
    return padded_corner(images[others]), labels[others]


@pytest.mark.parametrize("shape", [(5, 7), (4, 4), (1, 1), (2, 1)])
def test_maps_are_averaged_over_quarters(shape: tuple[int, int]) -> None:
    maps = torch.randn(3, 6, *shape, generator=torch.Generator().manual_seed(0))
    expected = functional.adaptive_avg_pool2d(maps.relu(), 2)  # [N, C, 2, 2]
    features = pooled(maps)
    assert features is not None
    torch.testing.assert_close(features, expected.permute(0, 2, 3, 1).flatten(1))


def test_what_is_too_wide_is_averaged_or_left_out() -> None:
    maps = torch.rand(2, MOST_FEATURES // 4 + 1, 3, 3, dtype=torch.float64)
    features = pooled(maps)
    assert features is not None
    torch.testing.assert_close(features, maps.mean((2, 3)).float())
    assert pooled(torch.rand(2, MOST_FEATURES + 1, 3, 3)) is None
    assert pooled(torch.rand(2, MOST_FEATURES + 1)) is None
    assert pooled(torch.rand(2, 3, 4, 5, 6)) is None
    tokens = torch.randn(2, 5, 7)
    features = pooled(tokens)
    assert features is not None
    torch.testing.assert_close(features, torch.cat([tokens.mean(1), tokens.max(1).values], 1))


@pytest.mark.parametrize("positions", [None, (2, 3)])
def test_touched_latents_go_where_the_exits_say(positions: tuple[int, int] | None) -> None:
    generator = torch.Generator().manual_seed(1)
    head: nn.Linear | nn.Conv2d = nn.Linear(8, 4, dtype=torch.float64)
    weight = head.weight.detach().clone()
    if positions is not None:
        head = nn.Conv2d(8, 4, 1, dtype=torch.float64)
        head.weight.data.copy_(weight[:, :, None, None])
    shape = (20, 8, *(positions or ()))
    before = torch.randn(shape, generator=generator, dtype=torch.float64)
    after = before.clone()
    after[::2] += torch.randn(after[::2].shape, generator=generator, dtype=torch.float64)
    layers = {
        f"block.{i}": EarlyExit(
            torch.randn(4, 5, generator=generator), torch.randn(4, generator=generator)
        )
        for i in range(2)
    }
    raising = torch.linalg.pinv(weight - weight.mean(0)).T.contiguous()
    raising[2] = 0  # a class that cannot be raised
    exits = EarlyExits(layers, raising)
    assert exits.names == ("block.0", "block.1")
    features = torch.randn(2, 20, 5, generator=generator)
    for exit_, seen in zip(layers.values(), features, strict=True):
        exit_.note(head, (), functional.pad(seen, (0, 0)))
    moved = exits(before, after, head).detach()
    assert exits(before, after, head) is after  # no note of a second pass: nothing is said
    assert torch.equal(moved[1::2], before[1::2])

    def logits(latent: Tensor) -> Tensor:
        flat = latent if latent.dim() == 1 else latent.flatten(1).mean(1)
        return (weight @ flat + head.bias).detach()

    raised = 0
    for i in range(0, 20, 2):
        scores = sum(e(seen[i]) for e, seen in zip(layers.values(), features, strict=True))
        assert isinstance(scores, Tensor)
        scores = scores + logits(after[i]).log_softmax(0)
        scores[logits(before[i]).argmax()] = -torch.inf
        told = int(scores.argmax())
        if told == 2:
            assert torch.equal(moved[i], after[i])
            continue
        was, now = logits(after[i]), logits(moved[i])
        assert int(now.argmax()) == told
        if int(was.argmax()) == told:
            assert torch.equal(moved[i], after[i])
            continue
        raised += 1
        others = [k for k in range(4) if k != told]
        assert float(now[told] - now[others].max()) >= float(was[others].max() - was[told]) - 1e-9
    assert raised > 2


def test_they_bring_the_classes_back() -> None:
    """Of images with the trigger, which no repair has seen, and of nothing else."""
    test, model = padded(digit_case().data.test), patched_digits().model
    plain = copy.deepcopy(model)
    patched_head(plain).exits = None
    with_exits, without = (evaluate(m, test, padded_corner, demo.TARGET) for m in (model, plain))
    assert with_exits.ra > without.ra + 0.02
    assert with_exits.ra > with_exits.acc - 0.05
    assert with_exits.asr <= without.asr
    assert with_exits.acc >= without.acc - 0.002
    with torch.no_grad():
        inputs = test[0]
        same = (model(inputs) == plain(inputs)).all(1)
        untouched = (Cropped(digit_case().backdoored)(inputs) == plain(inputs)).all(1)
    assert bool(same[untouched].all())


def test_they_can_be_left_out() -> None:
    data = padded(digit_case().data.defender)
    settings = PatchSettings(early_exits=False)
    model = Cropped(digit_case().backdoored)
    result = tacext.repair(
        model, data, targets=[0], method="patch", settings=settings, max_accuracy_drop=None
    )
    assert patched_head(result.model).exits is None
    assert hooks_of(result.model) == 0
    with pytest.raises(InputError, match="PatchSettings: early_exits: expected"):
        PatchSettings(early_exits=1)  # type: ignore[arg-type]


def test_the_model_given_is_left_without_hooks() -> None:
    model = Cropped(digit_case().backdoored)
    head = find_head(model, padded(digit_case().data.test)[0][:4])
    before = hooks_of(model)
    samples = padded(digit_case().data.defender)
    exits = fit_early_exits(model, head, samples, [], batch_size=64, seed=0)
    assert exits is not None
    assert hooks_of(model) == before == 0
    assert hooks_of(patched_digits().model) == len(exits_of(patched_digits().model).names) > 1
    undone = remove_latent_patch(patched_digits().model)
    assert hooks_of(undone) == 0


def test_the_discriminant_is_fishers() -> None:
    """Against one that is written out, on the same features."""

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 7)
            self.fc = nn.Linear(7, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.inner(x).tanh())  # type: ignore[no-any-return]

    torch.manual_seed(0)
    model = Flat()
    labels = torch.arange(300) % 3  # of four classes one has no samples
    inputs = torch.randn(300, 6) + 3 * functional.one_hot(labels, 6)
    head = find_head(model, inputs[:4])
    exits = fit_early_exits(model, head, (inputs, labels), [], batch_size=37, seed=0)
    assert exits is not None
    assert exits.names == ("inner",)
    with torch.no_grad():
        x = model.inner(inputs).double().numpy()
        y = labels.numpy()
    spread = x.std(0)
    z = (x - x.mean(0)) / spread
    means = np.stack([z[y == k].mean(0) for k in range(3)])
    within = (z - means[y]).T @ (z - means[y]) / len(z)
    within += 0.1 * within.diagonal().mean() * np.eye(7)
    expected = np.linalg.solve(within, means.T).T
    scores = z @ expected.T - 0.5 * (expected * means).sum(1)
    exit_ = exits._exits()[0]
    found = exit_(torch.from_numpy(x).float()).numpy()
    np.testing.assert_allclose(found[:, :3], scores, rtol=1e-3, atol=1e-3)
    assert float(found[:, 3].max()) < -1e8
    assert float((found.argmax(1) == y).mean()) > 0.9


class Unusual(nn.Module):
    """With layers that an exit cannot look at, and some that it can."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.never = nn.Conv2d(4, 4, 1)
        self.values = nn.Conv2d(4, 4, 1)  # a name that nn.ModuleDict keeps for itself
        self.add_module("with/slash", nn.Conv2d(4, 4, 1))
        self.across = nn.Linear(4, 4)
        self.fused = nn.Linear(4, 4)
        self.last = nn.Linear(4, 6)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.values(self.twice(self.twice(self.first(x)).relu()))
        x = self.get_submodule("with/slash")(x)
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.across(tokens.transpose(0, 1)).transpose(0, 1)  # positions first
        tokens = self.fused(tokens)
        if self.fused._forward_hooks:  # as where torch has a kernel for all of it, without hooks
            tokens = tokens * (1 + 1e-6)
        return self.fc(self.last(tokens.mean(1)))  # type: ignore[no-any-return]


def test_layers_are_those_that_can_be_looked_at_unnoticed() -> None:
    torch.manual_seed(0)
    model, images = Unusual().eval(), torch.rand(40, 1, 5, 5)
    head = find_head(model, images[:4])
    names = layers_to_look_at(model, head, images[:3])
    assert names == ("first", "last")


def test_so_many_layers_are_looked_at_evenly() -> None:
    model = nn.Sequential(*[nn.Linear(5, 5) for _ in range(12)], nn.Linear(5, 3)).eval()
    inputs = torch.rand(9, 5)
    names = layers_to_look_at(model, find_head(model, inputs), inputs[:3])
    assert names == ("0", "3", "6", "8", "11")
    assert len(names) == MOST_EXITS


def test_a_model_of_one_layer_has_none() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    images, labels = digit_case().data.defender
    head = find_head(model, images[:4])
    assert fit_early_exits(model, head, (images, labels), [], batch_size=64, seed=0) is None


def test_the_same_seed_gives_the_same_exits() -> None:
    model, data = digit_case().backdoored, digit_case().data.defender
    head = find_head(model, data[0][:4])
    found = [fit_early_exits(model, head, data, [], batch_size=64, seed=s) for s in (0, 0, 1)]
    states = [exits.state_dict() for exits in found if exits is not None]
    assert all(torch.equal(v, states[1][n]) for n, v in states[0].items())
    assert not all(torch.equal(v, states[2][n]) for n, v in states[0].items())


def test_a_copy_looks_at_its_own_layers() -> None:
    model, (images, _) = patched_digits().model, triggered()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(images)
        for parameter in copied.parameters():
            parameter.mul_(0.0)
        copied(images)
        assert torch.equal(model(images), expected)
    taken = [exit_.note.taken for exit_ in exits_of(model)._exits()]
    own = [exit_.note.taken for exit_ in exits_of(copied)._exits()]
    assert all(a is not b for a, b in zip(taken, own, strict=True))
    assert all(not note for note in [*taken, *own])  # every pass takes its notes with it


def test_threads_do_not_mix_their_notes() -> None:
    model, (images, _) = patched_digits().model, triggered()
    parts = images[:240].split(30)
    with torch.no_grad():
        expected = [model(part) for part in parts]
    found: dict[int, list[Tensor]] = {}

    def work(i: int) -> None:
        with torch.no_grad():
            found[i] = [model(parts[i]) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, logits in found.items():
        assert all(torch.equal(answer, expected[i]) for answer in logits)


def test_exported_and_compiled_they_say_the_same() -> None:
    model, (images, _) = patched_digits().model, triggered()
    batch = torch.export.Dim("batch", min=2, max=4096)
    exported = torch.export.export(model, (images[:8],), dynamic_shapes=({0: batch},)).module()
    with torch.no_grad():
        expected = model(images)
        torch.testing.assert_close(exported(images), expected)
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(images), expected)


def test_a_guard_beside_them_leaves_the_answers() -> None:
    model, (images, _) = patched_digits().model, triggered()
    guard = Guard.fit(model, padded(digit_case().data.defender), 0.05)
    with torch.no_grad():
        assert torch.equal(guard(images).logits, model(images))


def test_half_precision_keeps_the_classes() -> None:
    model, (images, _) = patched_digits().model, triggered()
    half = copy.deepcopy(model).bfloat16()
    with torch.no_grad():
        answers = half(images.bfloat16())
        assert answers.dtype == torch.bfloat16
        same = (answers.argmax(1) == model(images).argmax(1)).double().mean()
    assert float(same) > 0.95


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
    raising = next(n for n in state if n.endswith("exits.raising"))
    weight = next(n for n in state if ".exits.layers." in n and n.endswith(".weight"))
    bias = weight.removesuffix("weight") + "bias"
    without = {n: v for n, v in state.items() if ".exits." not in n}
    save_weights(without, file)  # as from before there were any
    assert patched_head(load_model(file, built)).exits is None
    for damaged in (
        {n: v for n, v in state.items() if n != raising},
        {n: v for n, v in state.items() if n != bias},
        without | {raising: state[raising]},
        state | {raising: state[raising][:, :5].clone()},
        state | {raising: state[raising].to(torch.int64)},
        state | {weight: state[weight][0].clone()},
        state | {weight: state[weight][:5].clone()},
        state | {bias: state[bias][:5].clone()},
        state | {weight: state[weight].to(torch.int32)},
        state | {bias.replace("bias", "more"): state[bias]},
        state | {weight: state[weight][:, :5].clone()},
        {n.replace("exits.layers.", "exits.layers.no/"): v for n, v in state.items()},
    ):
        save_weights(damaged, file)
        with pytest.raises(InputError, match="load_model: arch: expected"):
            load_model(file, built)
