"""Early exits in a repair: what they keep out and bring back, and when there are none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import tacext
from blobs import blobs, trained
from digits import Cropped, digit_case, padded, padded_corner, patched_digits
from exits import exits_of, hooks_of, patched_head
from tacext import InputError, PatchSettings, demo, evaluate, repair
from tacext.early_exits_fit import fit_early_exits
from tacext.heads import find_head
from tacext.latent_patch import remove_latent_patch
from tacext.latent_patch_fit import touched_by_exits
from tacext.repair_case import RepairCase, reconstructed_tac
from tacext.repair_methods import Candidate, make_candidate, with_limit


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
