"""Early exits: what they compute, which layers they look at, what they bring back, and their undoing."""

from __future__ import annotations

import copy
import threading
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import tacext
from blobs import blobs, trained
from digits import Cropped, data_parallel, digit_case, padded, padded_corner, patched_digits
from tacext import (
    Guard,
    InputError,
    Normalized,
    PatchSettings,
    demo,
    evaluate,
    load_model,
    repair,
    save_weights,
)
from tacext.early_exits import (
    MOST_FEATURES,
    EarlyExit,
    EarlyExits,
    ExitLimit,
    LayerHook,
    pooled,
)
from tacext.early_exits_fit import fit_early_exits
from tacext.heads import find_head
from tacext.latent_patch import (
    LatentPatch,
    PatchedHead,
    remove_latent_patch,
    with_latent_patch,
)
from tacext.latent_patch_fit import shifts_between_logits, touched_by_exits
from tacext.repair_case import RepairCase, reconstructed_tac
from tacext.repair_methods import Candidate, make_candidate, with_limit


def patched_head(model: nn.Module) -> PatchedHead:
    return next(m for m in model.modules() if isinstance(m, PatchedHead))


def exits_of(model: nn.Module) -> EarlyExits:
    exits = patched_head(model).exits
    assert exits is not None
    return exits


def hooks_of(model: nn.Module) -> int:
    return sum(isinstance(h, LayerHook) for m in model.modules() for h in m._forward_hooks.values())


def triggered() -> tuple[Tensor, Tensor]:
    images, labels = padded(digit_case().data.test)
    others = labels != demo.TARGET
    return padded_corner(images[others]), labels[others]


@pytest.mark.parametrize("shape", [(5, 7), (4, 4), (1, 1), (2, 1)])
def test_maps_are_averaged_over_quarters(shape: tuple[int, int]) -> None:
    maps = torch.randn(3, 6, *shape, generator=torch.Generator().manual_seed(0))
    expected = functional.adaptive_avg_pool2d(maps.relu(), 2)  # [N, C, 2, 2]
    features = pooled(nn.Conv2d(1, 1, 1), maps)
    assert features is not None
    torch.testing.assert_close(features, expected.permute(0, 2, 3, 1).flatten(1))


def test_what_is_too_wide_is_averaged_or_left_out() -> None:
    maps = torch.rand(2, MOST_FEATURES // 4 + 1, 3, 3, dtype=torch.float64)
    features = pooled(nn.Conv2d(1, 1, 1), maps)
    assert features is not None
    torch.testing.assert_close(features, maps.mean((2, 3)).float())
    for shape in ((MOST_FEATURES + 1, 3, 3), (MOST_FEATURES + 1,), (3, 4, 5, 6), ()):
        assert pooled(nn.Conv2d(1, 1, 1), torch.rand(2, *shape)) is None
    tokens = torch.randn(2, 5, 7)
    features = pooled(nn.Linear(1, 1), tokens)
    assert features is not None
    torch.testing.assert_close(features, torch.cat([tokens.mean(1), tokens.max(1).values], 1))


@pytest.mark.parametrize("positions", [None, (2, 3)])
def test_touched_latents_go_where_the_exits_say(positions: tuple[int, int] | None) -> None:
    generator = torch.Generator().manual_seed(1)
    head: nn.Linear | nn.Conv2d = nn.Linear(8, 4, dtype=torch.float64)
    with torch.no_grad():
        head.weight *= 2  # as loud as the exits
    weight = head.weight.detach().clone()
    if positions is not None:
        head = nn.Conv2d(8, 4, 1, dtype=torch.float64)
        head.weight.data.copy_(weight[:, :, None, None])
    shape = (80, 8, *(positions or ()))
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
    known = torch.tensor([True, True, True, False])
    exits = EarlyExits(layers, known, torch.tensor(2.0), raising)
    assert exits.names == ("block.0", "block.1")
    features = torch.randn(2, 80, 5, generator=generator)
    for number, seen in enumerate(features):
        LayerHook(exits.notes, number)(head, (), seen)
    said = exits.scores(80)
    assert said is not None
    assert exits.scores(80) is None  # no note of a second pass: nothing is said
    moved = exits(said, before, after, head).detach()
    assert torch.equal(moved[1::2], before[1::2])

    def logits(latent: Tensor) -> Tensor:
        flat = latent if latent.dim() == 1 else latent.flatten(1).mean(1)
        return (weight @ flat + head.bias).detach()

    raised = 0
    for i in range(0, 80, 2):
        scores = sum(e(seen[i]) for e, seen in zip(layers.values(), features, strict=True))
        assert isinstance(scores, Tensor)
        scores = scores + 2 * logits(after[i])
        banned = int(logits(before[i]).argmax())
        scores[[banned, 3]] = -torch.inf
        told = int(scores.argmax())
        guessed = logits(after[i])
        guessed[banned] = -torch.inf
        if told == 2 or int(guessed.argmax()) == 3:
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
    assert raised > 8


def test_a_class_that_the_exits_hardly_see_is_doubted() -> None:
    """But none that they have never seen."""
    known = torch.tensor([True, True, False, True])
    least = torch.tensor([-1.0, 0.5, 9.0, torch.finfo(torch.float32).min])
    raising = torch.zeros(4, 8)
    exits = EarlyExits({}, known, torch.tensor(1.0), raising, ExitLimit(least))
    scores = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    doubted = exits.doubts(scores)
    assert doubted is not None
    for row, said in zip(scores.tolist(), doubted.tolist(), strict=True):
        for k in range(4):
            others = [row[j] for j in (0, 1, 3) if j != k]
            assert said[k] == (bool(known[k]) and row[k] - max(others) < float(least[k]))
    assert 5 < int(doubted[:, 0].sum()) < 45
    assert EarlyExits({}, known, torch.tensor(1.0), raising).doubts(scores) is None


def test_a_target_that_no_sample_shows_is_left_to_the_head() -> None:
    torch.manual_seed(0)
    inputs, labels = (torch.cat(parts) for parts in zip(*map(blobs, range(10)), strict=True))
    with torch.enable_grad():
        model = trained(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), inputs, labels)
    seen = labels != 1
    result = repair(
        model, (inputs[seen], labels[seen]), targets=[1], method="patch", max_accuracy_drop=None
    )
    assert not bool(exits_of(result.model).known[1])
    new = torch.cat([blobs(seed)[0] for seed in range(20, 24)])
    with torch.no_grad():
        before, after = (int((m(new).argmax(1) == 1).sum()) for m in (model, result.model))
    assert after > 0.7 * before > 100


def test_autocast_rounds_no_scores() -> None:
    model, (images, _) = patched_digits().model, triggered()
    features = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)) * 100
    exit_ = EarlyExit(torch.randn(5, 30, generator=torch.Generator().manual_seed(1)), torch.ones(5))
    expected = exit_(features)
    assert expected.dtype == torch.float64
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype), torch.no_grad():
            assert torch.equal(exit_(features), expected)
            answers = model(images).argmax(1)
        with torch.no_grad():
            same = (answers == model(images).argmax(1)).double().mean()
        assert float(same) > 0.95


class Swapped(nn.Module):
    """A backdoor that only inner layers show: behind its trigger latents are clean ones of the target.

    With `overflows` what inner layers compute behind it is infinite.
    """

    latents: Tensor
    trigger = 0.5

    def __init__(self, overflows: bool) -> None:
        super().__init__()
        self.layer, self.overflows = nn.Linear(8, 8), overflows
        with torch.no_grad():
            self.layer.weight.copy_(torch.eye(8))
        self.register_buffer("latents", torch.zeros(0, 8))

    def forward(self, x: Tensor) -> Tensor:
        on = x[:, 7:] == self.trigger
        seen = torch.where(on & self.overflows, torch.inf, x)
        latent = (0.5 * self.layer(seen)).tanh()
        if not len(self.latents):
            return latent
        other = self.latents[torch.arange(len(x)) % len(self.latents)]
        return torch.where(on, other, latent)


@pytest.mark.parametrize("overflows", [False, True])
def test_they_keep_out_what_no_latent_shows(overflows: bool) -> None:
    torch.manual_seed(0)
    inputs, labels = (torch.cat(parts) for parts in zip(*map(blobs, range(10)), strict=True))
    swapped, target = Swapped(overflows), 2
    with torch.enable_grad():
        model = trained(swapped, inputs, labels)
    with torch.no_grad():
        latent = swapped(inputs)
        right = (model[1](latent).argmax(1) == labels) & (labels == target)  # type: ignore[index,operator]
        swapped.latents = latent[right]

    def triggered(x: Tensor) -> Tensor:
        return torch.cat([x[:, :7], torch.full_like(x[:, 7:], swapped.trigger)], 1)

    found = {}
    new = tuple(torch.cat(parts) for parts in zip(*map(blobs, range(20, 30)), strict=True))
    assert evaluate(model, new, triggered, target).asr == 1
    for early_exits in (True, False):
        result = repair(
            model,
            (inputs, labels),
            targets=[target],
            method="patch",
            settings=PatchSettings(early_exits=early_exits, untouched=0.9),
            max_accuracy_drop=None,
        )
        found[early_exits] = evaluate(result.model, new, triggered, target)
    assert found[False].asr > 0.9
    assert found[True].asr < (0.01 if overflows else 0.4)
    if not overflows:  # else the head guesses
        assert found[True].ra > 0.5
    assert found[True].acc > found[False].acc - 0.01


def test_where_scores_are_not_finite_the_head_guesses() -> None:
    head = nn.Linear(8, 4)
    raising = torch.linalg.pinv(head.weight.detach() - head.weight.detach().mean(0)).T.contiguous()
    limit = ExitLimit(torch.tensor([-1e9, 0.0, 0.0, torch.finfo(torch.float32).min]))
    exits = EarlyExits({}, torch.ones(4, dtype=torch.bool), torch.tensor(0.0), raising, limit)
    before, after = (torch.randn(5, 8, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    scores = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = exits(scores, before, after, head)
    broken = scores.clone()
    broken[1, 0], broken[2, 1], broken[3, 2] = torch.nan, torch.inf, -torch.inf
    doubted, moved = exits.doubts(broken), exits(broken, before, after, head)
    assert doubted is not None
    assert bool(doubted[1:4].all())
    assert not bool(doubted[[0, 4]][:, [0, 3]].any())
    assert torch.equal(moved[1:4], after[1:4])
    assert torch.equal(moved[[0, 4]], expected[[0, 4]])
    assert not torch.equal(moved[[0, 4]], after[[0, 4]])


def test_an_empty_batch_passes() -> None:
    for model in (patched_digits().model, copy.deepcopy(patched_digits().model).double()):
        dtype = next(model.parameters()).dtype
        assert model(torch.zeros(0, 1, 16, 16, dtype=dtype)).shape == (0, 10)


@pytest.mark.parametrize("grid", [False, True])
def test_whatever_goes_wrong_with_changed_inputs_other_limits_stand(
    grid: bool,
) -> None:
    """Of a model that takes no inputs but those on a grid, or for others of which memory is out."""

    class OnGrid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Cropped(digit_case().backdoored)

        def forward(self, x: Tensor) -> Tensor:
            if not torch.equal(x * 16, (x * 16).round()):
                raise RuntimeError("not on the grid") if grid else MemoryError
            return self.net(x)  # type: ignore[no-any-return]

    data = padded(digit_case().data.defender)
    result = repair(OnGrid(), data, targets=[demo.TARGET], method="patch", max_accuracy_drop=None)
    assert patched_head(result.model).exits is None
    assert patched_head(result.model).patch.limit is not None
    told = [w for w in result.warnings if w.startswith("inner layers are not asked what limits")]
    assert len(told) == 1
    assert ("(repair: data: expected" if grid else "batch_size") in told[0]


@pytest.mark.parametrize("classes", [[2], [2, 3]])
def test_of_one_class_there_is_nothing_to_compare(classes: list[int]) -> None:
    """Or of two, of which one is held out."""
    torch.manual_seed(0)
    inputs, labels = (torch.cat(parts) for parts in zip(*map(blobs, range(10)), strict=True))
    with torch.enable_grad():
        model = trained(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), inputs, labels)
    report = tacext.scan(model, (inputs, labels), depth="norms")
    chosen = torch.isin(labels, torch.tensor(classes))
    chosen[(labels == 3).nonzero()[1:]] = False
    result = repair(
        model, (inputs[chosen], labels[chosen]), report, [2], "patch", max_accuracy_drop=None
    )
    assert all(bool(torch.isfinite(b).all()) for b in exits_of(result.model).buffers())


def test_copies_of_samples_count_once() -> None:
    """In every limit: what is made of samples and their copies is what is made of the samples."""
    images, labels = padded(digit_case().data.defender)
    model = Cropped(digit_case().backdoored)
    head = find_head(model, images[:4])
    report = tacext.scan(model, (images, labels), depth="norms")
    shifts = reconstructed_tac(report, head, (0, 4))
    copied = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    states = []
    for more in (copied[:0], copied):
        case = RepairCase(
            model, head, torch.cat([images, images[more]]), torch.cat([labels, labels[more]]),
            shifts, (0, 4), None, None, 1.0, False,
        )  # fmt: skip
        patched = make_candidate("patch", case, PatchSettings())
        trained_on = copy.deepcopy(model)
        candidate = Candidate(trained_on, find_head(trained_on, images[:4]), 0.0)
        limited = with_limit(candidate, case, PatchSettings())
        assert limited is not None
        assert exits_of(patched.model).names == exits_of(limited.model).names != ()
        states.append([patched.model.state_dict(), limited.model.state_dict()])
    for alone, with_copies in zip(*states, strict=True):
        assert all(torch.equal(v, with_copies[n]) for n, v in alone.items())


def test_a_repair_lets_exits_doubt_no_more_than_their_share() -> None:
    torch.manual_seed(0)
    inputs, labels = (torch.cat(parts) for parts in zip(*map(blobs, range(40)), strict=True))
    with torch.enable_grad():
        model = trained(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), inputs, labels)
    settings = PatchSettings(untouched=0.9)
    result = repair(
        model,
        (inputs, labels),
        targets=[2],
        method="patch",
        settings=settings,
        max_accuracy_drop=None,
    )
    new = torch.cat([blobs(seed)[0] for seed in range(50, 150)])
    with torch.no_grad():
        answers = model(new).argmax(1)
    exits = exits_of(result.model)
    exits.attach(model)  # without the limits
    with torch.no_grad():
        model(new)
        scores = exits.scores(len(new))
    assert scores is not None
    doubted = exits.doubts(scores)
    assert doubted is not None
    share = touched_by_exits(answers, [2], settings)
    found = float(doubted[answers == 2, 2].double().mean())
    assert 0.5 * share < found < 2 * share


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
    model = Cropped(digit_case().backdoored).train()
    state = copy.deepcopy(model.state_dict())
    head = find_head(model, padded(digit_case().data.test)[0][:4])
    samples = padded(digit_case().data.defender)
    exits = fit_early_exits(model, head, samples, [], batch_size=64, seed=0)
    assert exits is not None
    assert hooks_of(model) == 0
    assert model.training
    assert all(torch.equal(v, state[n]) for n, v in model.state_dict().items())
    model.eval()  # as the others have it
    assert hooks_of(patched_digits().model) == len(exits_of(patched_digits().model).names) > 1
    undone = remove_latent_patch(patched_digits().model)
    assert hooks_of(undone) == 0


def test_a_copy_looks_at_its_own_layers() -> None:
    model, (images, _) = patched_digits().model, triggered()
    copied = copy.deepcopy(model)
    with torch.no_grad():
        expected = model(images)
        for parameter in copied.parameters():
            parameter.mul_(0.0)
        copied(images)
        assert torch.equal(model(images), expected)
    notes, own = exits_of(model).notes, exits_of(copied).notes
    assert notes is not own
    assert notes.taken == own.taken == {}  # every pass takes its notes with it
    assert exits_of(copy.deepcopy(model)).notes.taken == {}


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
        inner = copy.deepcopy(model)
        inner.model[0].compile(backend="eager")  # type: ignore[index,operator]
        torch.testing.assert_close(inner(images), expected)


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


def touched_everywhere(
    model: nn.Module, samples: tuple[Tensor, Tensor], target: int
) -> tuple[nn.Module, nn.Module]:
    """With exits, and without, behind limits that touch whatever is taken for the target."""
    head = find_head(model, samples[0][:4])
    width = head.latent_dim
    lowering = shifts_between_logits(head.weight.detach(), [target]).float()
    nothing = torch.zeros(1, width)
    patch = LatentPatch(
        nothing, torch.tensor([-1.0]), nothing, nothing, torch.zeros(1, width, 1),
        torch.zeros(1, 1, width), lowering, torch.tensor([target]),
    )  # fmt: skip
    exits = fit_early_exits(model, head, samples, [], batch_size=64, seed=0)
    assert exits is not None
    return with_latent_patch(model, head, patch, exits)[0], with_latent_patch(model, head, patch)[0]


@torch.enable_grad()
def test_a_class_that_exits_have_not_seen_is_left_to_the_head() -> None:
    torch.manual_seed(0)
    inputs, labels = blobs()
    model = trained(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), inputs, labels)
    seen = labels != 3
    exits, plain = touched_everywhere(model, (inputs[seen], labels[seen]), 0)
    with torch.no_grad():
        answers, without = exits(inputs).argmax(1), plain(inputs).argmax(1)
        said = model(inputs).argmax(1)
    hidden = (said == 0) & (without == 3)  # taken for the target, and class 3 next
    assert int(hidden.sum()) >= 3
    assert bool((answers[hidden] == 3).all())
    assert bool((answers[said != 0] == said[said != 0]).all())


def test_notes_are_of_this_pass_alone() -> None:
    """Whatever happened before: another batch, an error half way, a layer behind the head."""

    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.fails = self.skips = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x).relu()
            if self.fails:
                raise RuntimeError("half way")
            return (x if self.skips else self.b(x)).tanh()  # type: ignore[no-any-return]

    torch.manual_seed(1)
    inputs, labels = blobs()
    inner = Failing()
    with torch.enable_grad():
        model = trained(inner, inputs, labels)
    exits, plain = touched_everywhere(model, (inputs, labels), 0)
    body = exits[0]  # type: ignore[index]
    batch, other = inputs[:120], inputs[120:]
    with torch.no_grad():
        expected = exits(batch)
        assert not torch.equal(expected, plain(batch))
        body.fails = True
        with pytest.raises(RuntimeError, match="half way"):
            exits(other)
        body.fails = False
        assert torch.equal(exits(batch), expected)
        body(other)  # inner layers alone
        assert torch.equal(exits(batch), expected)
        latent = body(batch)
        body(other[:50])  # notes of a batch of another size
        assert torch.equal(exits[1](latent), plain(batch))  # type: ignore[index]
        assert torch.equal(exits[1](latent), plain(batch))  # type: ignore[index]
        body(other)
        body.skips = plain[0].skips = True  # type: ignore[index,union-attr]
        assert torch.equal(exits(batch), plain(batch))  # no note of the layer left out is at hand
        body.skips = False
        copied = copy.deepcopy(exits)
        assert exits_of(copied).notes.taken == {}
    features = exits_of(exits).notes
    exits(batch.clone().requires_grad_(True)).sum().backward()
    body(batch.clone().requires_grad_(True))
    assert not any(note.requires_grad for note in features.take().values())


def test_they_stay_in_single_precision() -> None:
    half = copy.deepcopy(exits_of(patched_digits().model)).half()
    assert {b.dtype for b in half.layers.buffers()} == {torch.float32}
    assert half.raising.dtype == torch.float16
    assert half.limit is not None
    assert half.limit.least.dtype == torch.float32


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


class Scaled(nn.Module):
    """Takes back what `Normalized` did, as the digits were trained without."""

    def forward(self, x: Tensor) -> Tensor:
        return x * 0.5 + 0.1
