"""The latent patch: what it computes, what it takes away from real digit classifiers, and its undoing."""

from __future__ import annotations

import copy
from pathlib import Path

import hypothesis
import pytest
import rich.console
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

import tacext
from digits import (
    Cropped,
    digit_case,
    head_and_latents,
    padded,
    padded_corner,
    patched_digits,
)
from tacext import (
    InputError,
    LatentPatch,
    PatchSettings,
    demo,
    evaluate,
    load_model,
    remove_latent_patch,
    save_weights,
)
from tacext.guard_fit import cross_scores, perturbations_of
from tacext.heads import Head, find_head
from tacext.latent_patch import LatentLimit, PatchedHead, with_latent_patch
from tacext.latent_patch_fit import LedLatents, fit_latent_patch
from tacext.report import scan_to_dict
from tacext.tables import scan_table


def backdoored() -> nn.Module:
    return Cropped(digit_case().backdoored)


def built() -> nn.Module:
    return Cropped(demo.digit_net())


def random_patch(
    generator: torch.Generator, ways: int = 3, width: int = 6, rank: int = 2
) -> LatentPatch:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return LatentPatch(
        draw(ways, width),
        draw(ways),
        draw(ways, width),
        draw(ways, width),
        draw(ways, width, rank),
        draw(ways, rank, width),
        draw(ways, width),
        torch.arange(ways),
    )


def random_limit(generator: torch.Generator, head: nn.Linear) -> LatentLimit:
    latent = torch.randn(300, 6, generator=generator)
    logits = functional.linear(latent, head.weight.float(), head.bias.float())
    perturbation = perturbations_of(latent, logits, head.weight.detach().float(), "test")
    found = cross_scores(latent, logits, perturbation, 0)
    return LatentLimit(torch.tensor([0.4, 0.8, 1e30]), **found.scorer)


def reference(
    patch: LatentPatch, head: nn.Linear, phi: Tensor, doubted: Tensor | None = None
) -> Tensor:
    """One latent [D] after the other, as the class says it; doubted are classes, bool [C]."""
    target = int(head(phi).argmax())
    excess = [
        max(0.0, float(v @ phi - c)) if k == target else 0.0
        for v, c, k in zip(patch.direction, patch.threshold, patch.targets.tolist(), strict=True)
    ]
    far = False
    if patch.limit is not None:
        score = patch.limit.score(phi[None], head(phi)[None])[0]
        far = float(score) > float(patch.limit.limit[target])
    if far or (doubted is not None and bool(doubted[target])):
        for way, k in enumerate(patch.targets.tolist()):
            if k == target and not bool((patch.change[way] != 0).any()):
                excess[way] = max(1.0, excess[way])
    beyond = [way for way, e in enumerate(excess) if e > 0]
    if not beyond:
        return phi
    beyond = [way for way in beyond if bool((patch.change[way] != 0).any())] or beyond
    k = min(beyond, key=lambda way: float((phi - patch.centre[way]).norm()))
    change = patch.change[k] + (phi - patch.centre[k]) @ patch.left[k] @ patch.right[k]
    psi = phi - min(max(excess), 1.0) * change
    logits = head(psi)
    others = max(float(z) for j, z in enumerate(logits) if j != target)
    return psi - 2 * max(0.0, float(logits[target]) - others) * patch.lowering[k]


def random_head(generator: torch.Generator) -> nn.Linear:
    head = nn.Linear(6, 3, dtype=torch.float64)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return head


@hypothesis.given(seed=st.integers(0, 2**31 - 1))
@hypothesis.settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_it_computes_what_it_says(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    patch, head = random_patch(generator, ways=6), random_head(generator)
    patch.targets = torch.arange(6) % 3
    patch.change[seed % 7 :] = 0  # of none, or of some, or of all ways the change is not known
    patch.left[seed % 7 :] = 0
    patch.limit = random_limit(generator, head) if seed % 3 else None
    latent = torch.randn(20, 6, generator=generator, dtype=torch.float64)
    doubted = torch.rand(20, 3, generator=generator) < 0.3 if seed % 5 else None
    of_each = [None] * 20 if doubted is None else list(doubted)
    expected = torch.stack(
        [reference(patch, head, phi, k) for phi, k in zip(latent, of_each, strict=True)]
    )
    limited = patch(latent, head, doubted)
    torch.testing.assert_close(limited, expected, rtol=1e-9, atol=1e-9)
    same = (expected == latent).all(1)
    assert torch.equal(limited[same], latent[same])
    assert torch.equal(PatchedHead(patch, head)(latent), head(patch(latent, head)))


def test_positions_of_a_convolution_are_moved_together() -> None:
    generator = torch.Generator().manual_seed(0)
    patch, head = random_patch(generator), random_head(generator)
    convolution = nn.Conv2d(6, 3, 1, dtype=torch.float64)
    with torch.no_grad():
        convolution.weight.copy_(head.weight[:, :, None, None])
        convolution.bias.copy_(head.bias)  # type: ignore[union-attr]
    latent = torch.randn(9, 6, 2, 3, generator=generator, dtype=torch.float64)
    moved = (patch(latent, convolution) - latent).detach()
    pooled = latent.flatten(2).mean(2)
    assert float(moved.abs().max()) > 0
    torch.testing.assert_close(moved.flatten(2).mean(2), (patch(pooled, head) - pooled).detach())
    assert float((moved - moved[:, :, :1, :1]).abs().max()) < 1e-12


def test_the_backdoor_is_gone_at_no_cost() -> None:
    test, result = padded(digit_case().data.test), patched_digits()
    before = evaluate(backdoored(), test, padded_corner, demo.TARGET)
    after = evaluate(result.model, test, padded_corner, demo.TARGET, baseline=before)
    assert before.asr > 0.95
    assert result.accepted
    assert result.method == "patch"
    assert after.asr < 0.01
    assert after.acc > before.acc - 0.005
    assert after.ra > before.acc - 0.1
    assert result.robust_accuracy_after > result.robust_accuracy_before + 0.3
    assert result.history == ()


def test_what_it_does_not_find_is_rolled_back() -> None:
    """On images of 8 x 8 pixels no patch has room, and what else leads there is not the trigger."""
    case = digit_case()
    result = tacext.repair(
        case.backdoored, case.data.defender, targets=[demo.TARGET], method="patch"
    )
    assert not result.accepted
    state = case.backdoored.state_dict()
    assert all(torch.equal(v, state[n]) for n, v in result.model.state_dict().items())


@pytest.mark.parametrize("target", [0, 4])
def test_a_clean_model_that_is_patched_keeps_its_accuracy(target: int) -> None:
    case = digit_case()
    result = tacext.repair(
        case.clean, case.data.defender, targets=[target], method="patch", max_accuracy_drop=None
    )
    acc = [
        evaluate(m, case.data.test, demo.white_corner, target).acc
        for m in (case.clean, result.model)
    ]
    assert acc[1] >= acc[0] - 0.005


def test_all_other_latents_pass_bit_by_bit() -> None:
    images, _ = padded(digit_case().data.test)
    with torch.no_grad():
        same = (backdoored()(images) == patched_digits().model(images)).all(1)
    assert float(same.double().mean()) > 0.95


def test_it_is_undone_exactly() -> None:
    undone = remove_latent_patch(patched_digits().model)
    state = backdoored().state_dict()
    assert undone.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in undone.state_dict().items())
    assert any(isinstance(m, PatchedHead) for m in patched_digits().model.modules())
    with pytest.raises(InputError, match="expected a model with a latent patch"):
        remove_latent_patch(undone)


def test_a_patched_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model, images = patched_digits().model, padded(digit_case().data.test)[0]
    file = tmp_path / "patched.safetensors"
    save_weights(model, file)
    loaded = load_model(file, built)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    name = next(n for n in state if n.endswith("patch.centre"))
    basis = next(n for n in state if n.endswith("patch.limit.basis"))
    targets = next(n for n in state if n.endswith("patch.targets"))
    direction = next(n for n in state if n.endswith("patch.direction"))
    for damaged in (
        {n: v for n, v in state.items() if n != name},
        state | {name: state[name][:, :5].clone()},
        state | {name: state[name][0].clone()},
        state | {name: state[name].to(torch.int64)},
        state | {"patch.direction": state[name]},
        state | {targets: state[targets].to(torch.complex64)},
        state | {targets: state[targets].to(torch.uint16)},
        state | {direction: torch.tensor(1.0)},
        state | {direction: state[direction][:, :5].clone()},
        {n: v for n, v in state.items() if n != basis},
        state | {basis: state[basis][:5].clone()},
        state | {basis: state[basis][0].clone()},
        state | {basis: state[basis].to(torch.int64)},
    ):
        save_weights(damaged, file)
        with pytest.raises(InputError, match="load_model: arch: expected"):
            load_model(file, built)


def test_a_patched_model_exports_to_plain_operators() -> None:
    model, images = patched_digits().model, padded(digit_case().data.test)[0][:16]
    exported = torch.export.export(model, (images,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(images), model(images))


def test_half_precision_and_gradients_pass() -> None:
    images = padded(digit_case().data.test)[0][:16]
    half = copy.deepcopy(patched_digits().model).bfloat16()
    with torch.no_grad():
        assert half(images.bfloat16()).dtype == torch.bfloat16
    images = images.clone().requires_grad_(True)
    patched_digits().model(images).sum().backward()
    assert images.grad is not None
    assert bool(torch.isfinite(images.grad).all())


def test_fitted_on_the_trigger_itself_it_restores_the_answers() -> None:
    model, head, latent, led = head_and_latents()
    patch = fit_latent_patch(head, latent, [LedLatents(demo.TARGET, led, latent)], PatchSettings())
    others = head.logits(latent).argmax(1) != demo.TARGET
    answers = [head.logits(x).argmax(1)[others] for x in (latent, led, patch(led, head.module))]
    assert float((answers[0] == answers[1]).double().mean()) < 0.05
    assert float((answers[0] == answers[2]).double().mean()) > 0.9
    patched, patched_head = with_latent_patch(model, head, patch)
    assert patched.get_submodule(patched_head.name) is patched_head.module
    assert torch.equal(patched_head.weight, head.weight)


def test_lowering_moves_the_targets_logit_alone() -> None:
    _, head, latent, led = head_and_latents()
    patch = fit_latent_patch(head, latent, [LedLatents(demo.TARGET, led, latent)], PatchSettings())
    lowered = (head.weight @ patch.lowering[0]).detach()
    lowered = lowered - lowered[demo.TARGET - 1]
    assert float(lowered[demo.TARGET]) == pytest.approx(1, abs=1e-4)
    lowered[demo.TARGET] = 0
    assert float(lowered.abs().max()) < 1e-4


def test_clean_samples_of_the_target_pass_as_often_as_asked_for() -> None:
    _, head, latent, led = head_and_latents()
    own = latent[head.logits(latent).argmax(1) == demo.TARGET]
    way = LedLatents(demo.TARGET, led, latent)
    for untouched in (0.5, 0.9, 1.0):
        for ways in ([way], [way, way]):
            patch = fit_latent_patch(head, latent, ways, PatchSettings(untouched=untouched))
            passed = float((patch(own, head.module) == own).all(1).double().mean())
            assert passed >= untouched - 1.5 / len(own)
    patch = fit_latent_patch(head, latent, [way], PatchSettings(untouched=0.5))
    rest = latent[head.logits(latent).argmax(1) != demo.TARGET]
    assert torch.equal(patch(rest, head.module), rest)


def test_of_an_unknown_change_only_the_logit_is_lowered() -> None:
    _, head, latent, led = head_and_latents()
    patch = fit_latent_patch(head, latent, [LedLatents(demo.TARGET, led, None)], PatchSettings())
    taken = head.logits(led).argmax(1) == demo.TARGET
    before, after = (head.logits(x)[taken] for x in (led, patch(led, head.module)))
    assert bool((after.argmax(1) != demo.TARGET).all())
    before, after = (
        torch.cat([z[:, : demo.TARGET], z[:, demo.TARGET + 1 :]], 1) for z in (before, after)
    )
    assert torch.equal(before.argmax(1), after.argmax(1))


@pytest.mark.parametrize(("classes", "width"), [(40, 8), (12, 64)])
def test_lowering_lowers_against_every_class_however_many_there_are(
    classes: int, width: int
) -> None:
    generator = torch.Generator().manual_seed(3)
    head = nn.Linear(width, classes)
    with torch.no_grad():
        head.weight.copy_(functional.normalize(torch.randn(classes, width, generator=generator)))
        head.bias.zero_()
        latent = 3 * head.weight.repeat(20, 1)
        latent = latent + 0.1 * torch.randn(latent.shape, generator=generator)
    found = Head("", head)
    led = latent + 6 * head.weight[2].detach()
    patch = fit_latent_patch(found, latent, [LedLatents(2, led, latent)], PatchSettings())
    lowered = (head.weight[2] - head.weight) @ patch.lowering[0]
    lowered[2] = 1
    assert float(lowered.detach().min()) > 1 - 1e-4
    others = found.logits(latent).argmax(1) != 2
    assert float((found.logits(led).argmax(1) == 2)[others].double().mean()) > 0.9
    after = found.logits(patch(led, head)).argmax(1) == 2
    assert float(after[others].double().mean()) < 0.05


def test_a_class_between_the_others_cannot_be_lowered() -> None:
    head = nn.Linear(2, 4)
    with torch.no_grad():
        head.weight.copy_(torch.tensor([[1.0, 0], [-1, 0], [0, 0], [0, 1]]))
        head.bias.copy_(torch.tensor([0.0, 0, 0.5, 0]))
    latent = torch.randn(200, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="whose weights lie between those of others"):
        fit_latent_patch(
            Head("", head), latent, [LedLatents(2, 0 * latent + 0.01, None)], PatchSettings()
        )


def test_no_way_is_an_error() -> None:
    _, head, latent, _ = head_and_latents()
    with pytest.raises(InputError, match="expected something that leads into each target"):
        fit_latent_patch(head, latent, [], PatchSettings())


def test_a_head_of_two_names_is_patched_under_both() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = copy.deepcopy(digit_case().backdoored[:-1])
            self.classifier = copy.deepcopy(digit_case().backdoored[-1])
            self.fc = self.classifier

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.body(x))  # type: ignore[no-any-return]

    model, (_, _, latent, led) = Twice(), head_and_latents()
    images = demo.white_corner(digit_case().data.defender[0])
    head = find_head(model, images[:4])
    patch = fit_latent_patch(head, latent, [LedLatents(demo.TARGET, led, latent)], PatchSettings())
    patched, _ = with_latent_patch(model, head, patch)
    with torch.no_grad():
        assert float((patched(images).argmax(1) == demo.TARGET).double().mean()) < 0.2
        assert torch.equal(remove_latent_patch(patched)(images), model(images))


def test_a_scan_tells_of_the_patch_in_front_of_the_head() -> None:
    data = padded(digit_case().data.defender)
    report = tacext.scan(patched_digits().model, data, depth="fast")
    assert report.limited == (demo.TARGET,)
    assert scan_to_dict(report)["limited"] == [demo.TARGET]
    told = rich.console.Console(width=300)
    with told.capture() as captured:
        told.print(scan_table(report))
    assert f"a latent patch stands in front of class {demo.TARGET}:" in captured.get()
    assert tacext.scan(backdoored(), data, depth="fast").limited == ()
    alone = tacext.scan(patched_digits().model, None, input_shape=(1, 16, 16))
    assert alone.limited == (demo.TARGET,)


def test_a_patched_model_is_not_repaired_again() -> None:
    with pytest.raises(InputError, match="expected a model without a latent patch"):
        tacext.repair(patched_digits().model, padded(digit_case().data.defender), targets=[1])


def test_a_patch_of_half_precision_is_loaded_into_a_model_of_single(tmp_path: Path) -> None:
    file = tmp_path / "half.safetensors"
    save_weights(copy.deepcopy(patched_digits().model).bfloat16(), file)
    images = padded(digit_case().data.test)[0]
    with torch.no_grad():
        answers = load_model(file, built)(images).argmax(1)
        assert float((answers == patched_digits().model(images).argmax(1)).double().mean()) > 0.97


def test_a_rank_beyond_the_latents_is_theirs() -> None:
    _, head, latent, led = head_and_latents()
    way = LedLatents(demo.TARGET, led, latent)
    wide = fit_latent_patch(head, latent, [way], PatchSettings(rank=latent.shape[1] + 40))
    assert wide.left.shape[2] == latent.shape[1]
    assert bool(torch.isfinite(wide(led, head.module)).all())
    none = fit_latent_patch(head, latent, [way], PatchSettings(rank=0))
    assert none.left.shape[2] == 0
    assert bool(torch.isfinite(none(led, head.module)).all())


def test_a_class_that_no_sample_is_taken_for_is_an_error() -> None:
    _, head, latent, led = head_and_latents()
    others = latent[head.logits(latent).argmax(1) != 5]
    with pytest.raises(InputError, match="takes for class 5, got 0 samples"):
        fit_latent_patch(head, others, [LedLatents(5, led, latent)], PatchSettings())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("untouched", 0.0),
        ("untouched", 1.5),
        ("rank", -1),
        ("rank", 1.5),
        ("holdout", 1.0),
        ("seed", -1),
    ],
)
def test_settings_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(InputError, match=f"PatchSettings: {name}: expected"):
        PatchSettings(**{name: value})  # type: ignore[arg-type]


def test_settings_of_another_method_are_an_error() -> None:
    case = digit_case()
    with pytest.raises(InputError, match="repair: settings: expected PatchSettings for"):
        tacext.repair(
            case.backdoored,
            case.data.defender,
            targets=[0],
            method="patch",
            settings=tacext.FinetuneSettings(),
        )
