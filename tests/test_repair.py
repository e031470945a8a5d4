"""Repairing a real digit classifier."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

import tacext
from digits import digit_case, scan_of, steady_case
from tacext import (
    FinetuneSettings,
    InputError,
    demo,
    evaluate,
    remove_latent_patch,
    save_weights,
    scan,
)
from tacext.early_exits_fit import fit_early_exits
from tacext.latent_patch import PatchedHead
from tacext.repair_result import Attempt, reasons_of

SETTINGS = FinetuneSettings()
# What the fine-tuning itself does; the gate has tests of its own below.
repair = functools.partial(tacext.repair, method="finetune", max_accuracy_drop=None)
PLAIN = FinetuneSettings(beta=0.0, gamma=0.0, distillation=0.0)


def test_removes_the_backdoor_where_plain_fine_tuning_does_not() -> None:
    case = steady_case()
    before = evaluate(case.backdoored, case.data.test, demo.white_corner, demo.TARGET)
    assert before.asr > 0.95
    repaired = repair(case.backdoored, case.data.defender, settings=SETTINGS)
    plain = repair(case.backdoored, case.data.defender, targets=[demo.TARGET], settings=PLAIN)
    arguments = case.data.test, demo.white_corner, demo.TARGET
    after = evaluate(repaired.model, *arguments, baseline=before)
    without = evaluate(plain.model, *arguments, baseline=before)
    assert repaired.targets == (demo.TARGET,)
    assert after.asr < 0.05
    assert without.asr > 0.9
    assert after.acc > before.acc - 0.01
    assert after.ra > 0.75
    assert after.der is not None
    assert without.der is not None
    assert after.der > without.der


def test_reports_held_out_accuracy_and_the_split() -> None:
    case = digit_case()
    result = repair(case.backdoored, case.data.defender, settings=SETTINGS)
    assert (result.training_samples, result.holdout_samples) == (320, 80)
    # The held-out part is never trained on: measure it again by hand.
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))[:80]
    images, labels = (part[order] for part in case.data.defender)
    with torch.no_grad():
        for model, accuracy in (
            (case.backdoored, result.accuracy_before),
            (result.model, result.accuracy_after),
        ):
            expected = (model(images).argmax(1) == labels).double().mean()
            assert float(expected) == pytest.approx(accuracy)
    assert len(result.history) == 34  # of three steps each: a hundred steps at least
    assert result.history[-1].shifted < result.history[0].shifted
    assert result.history[-1].attacked < result.history[0].attacked


def test_leaves_the_callers_model_and_random_state_untouched() -> None:
    case = digit_case()
    model = copy.deepcopy(case.backdoored)
    model[0].weight.requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    result = repair(model, case.data.defender, targets=[0], settings=FinetuneSettings(epochs=1))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not result.model.training
    assert not result.model[0].weight.requires_grad
    assert not torch.equal(result.model[0].weight, model[0].weight)
    assert all(parameter.grad is None for parameter in result.model.parameters())
    assert not result.model[-1]._forward_pre_hooks


def test_the_same_seed_gives_the_same_model() -> None:
    case = digit_case()
    settings = FinetuneSettings(epochs=1, seed=3)
    first, second = (
        repair(case.backdoored, case.data.defender, targets=[0], settings=settings).model
        for _ in range(2)
    )
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_targets_override_the_report() -> None:
    case = digit_case()
    report = scan(case.backdoored, case.data.defender)
    settings = FinetuneSettings(epochs=1)
    result = repair(
        case.backdoored, case.data.defender, report, targets=[4, 2, 4], settings=settings
    )
    assert result.targets == (4, 2)
    assert repair(case.backdoored, case.data.defender, report, settings=settings).targets == (0,)


def test_one_target_needs_no_list_and_a_number_is_no_report() -> None:
    case = digit_case()
    settings = FinetuneSettings(epochs=1)
    assert repair(case.backdoored, case.data.defender, targets=3, settings=settings).targets == (3,)
    with pytest.raises(InputError, match="report: expected a ScanReport or None, got int"):
        repair(case.backdoored, case.data.defender, 3)  # type: ignore[arg-type]


def test_beats_the_published_loss_on_the_same_model() -> None:
    case = digit_case()
    arguments = case.data.test, demo.white_corner, demo.TARGET
    before = evaluate(case.backdoored, *arguments)
    ours, published = (
        repair(case.backdoored, case.data.defender, targets=[demo.TARGET], settings=settings)
        for settings in (SETTINGS, FinetuneSettings.of_the_paper())
    )
    der = [evaluate(r.model, *arguments, baseline=before).der or 0 for r in (ours, published)]
    assert der[0] > der[1] + 0.01
    assert math.isnan(published.history[0].attacked)


def test_a_clean_model_wrongly_repaired_stays_as_good() -> None:
    case = digit_case()
    arguments = case.data.test, demo.white_corner, demo.TARGET
    repaired = repair(case.clean, case.data.defender, targets=[3], settings=SETTINGS).model
    before, after = (evaluate(model, *arguments) for model in (case.clean, repaired))
    assert after.acc > before.acc - 0.04  # of 400 samples; unlearning what a class looks like costs


def test_a_model_without_gradients_at_its_inputs_is_tuned_on_latents_alone() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = copy.deepcopy(digit_case().backdoored)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.model((16 * x).round() / 16)  # type: ignore[no-any-return]

    settings = FinetuneSettings(epochs=1)
    result = repair(Rounded(), digit_case().data.defender, targets=[0], settings=settings)
    assert any("only shifted latents are known to lead" in w for w in result.warnings)
    assert math.isnan(result.history[0].attacked)


def test_a_reason_that_several_methods_share_is_said_once() -> None:
    tried = [("patch", "it loses"), ("prune", "it still leads"), ("finetune", "it loses")]
    attempts = [Attempt(name, False, why, 1.0, 1.0, None, 0.0) for name, why in tried]  # type: ignore[arg-type]
    assert reasons_of(attempts) == "patch, finetune: it loses; prune: it still leads"


@pytest.mark.parametrize("activation", [nn.Softmax(1), nn.LogSoftmax(1)])
def test_models_of_probabilities_are_repaired_alike(activation: nn.Module) -> None:
    case = digit_case()
    settings = FinetuneSettings(epochs=2)
    plain = repair(case.backdoored, case.data.defender, targets=[0], settings=settings)
    wrapped = nn.Sequential(copy.deepcopy(case.backdoored), activation)
    found = repair(wrapped, case.data.defender, targets=[0], settings=settings)
    for a, b in zip(plain.history, found.history, strict=True):
        assert dataclasses.astuple(a) == pytest.approx(dataclasses.astuple(b), rel=0.02, abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_trained_in_single_and_comes_back_as_it_was(dtype: torch.dtype) -> None:
    case = digit_case()
    model = copy.deepcopy(case.backdoored).to(dtype)
    result = repair(model, case.data.defender, targets=[0], settings=SETTINGS)
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    arguments = case.data.test, demo.white_corner, demo.TARGET
    assert evaluate(result.model, *arguments).asr < 0.2
    assert evaluate(result.model, *arguments).acc > 0.95


def test_inference_mode_around_it_changes_nothing() -> None:
    case = digit_case()
    settings = FinetuneSettings(epochs=1)
    expected = repair(case.backdoored, case.data.defender, targets=[0], settings=settings)
    with torch.inference_mode():
        images, labels = (part.clone() for part in case.data.defender)
        unborn = copy.deepcopy(case.backdoored)
        for model in (case.backdoored, unborn):
            found = repair(model, (images, labels), targets=[0], settings=settings)
            assert found.history == expected.history


def test_attacked_inputs_stay_out_of_the_statistics() -> None:
    case = digit_case()
    states = []
    for gamma in (0.0, 1.0):
        settings = FinetuneSettings(
            epochs=1, learning_rate=1e-12, gamma=gamma, frozen_statistics=False
        )
        result = repair(case.backdoored, case.data.defender, targets=[0], settings=settings)
        states.append({n: v for n, v in result.model.named_buffers() if "running" in n})
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], rtol=1e-5, atol=1e-7)


def test_settings_of_numpy_can_be_written() -> None:
    settings = FinetuneSettings(learning_rate=np.float32(1e-3), beta=1)  # type: ignore[arg-type]
    assert type(settings.learning_rate) is type(settings.beta) is float


def test_frozen_statistics_are_left_as_they_are() -> None:
    case = digit_case()
    names = [n for n, _ in case.backdoored.named_buffers() if "running" in n]
    assert names
    before = case.backdoored.state_dict()
    for frozen in (True, False):
        settings = FinetuneSettings(epochs=1, frozen_statistics=frozen)
        after = repair(case.backdoored, case.data.defender, targets=[0], settings=settings)
        state = after.model.state_dict()
        assert all(torch.equal(state[n], before[n]) for n in names) is frozen


def test_nothing_to_repair_says_what_to_do() -> None:
    case = digit_case()
    with pytest.raises(InputError, match=r"targets: .*none \(the scan's verdict: .*with targets="):
        repair(case.clean, case.data.defender)


def test_a_report_of_another_model_is_refused() -> None:
    case = digit_case()
    report = scan(nn.Linear(4, 10), (torch.rand(50, 4), torch.arange(50) % 10))
    with pytest.raises(InputError, match="report: expected a scan of this very model"):
        repair(case.clean, case.data.defender, report, targets=[0])
    by_hand = dataclasses.replace(report, model_norms=())
    with pytest.raises(InputError, match=r"a scan of this model \(10 classes, 128 latents\)"):
        repair(case.clean, case.data.defender, by_hand, targets=[0])


def test_an_unreachable_target_is_refused() -> None:
    case = digit_case()
    model = copy.deepcopy(case.clean)
    with torch.no_grad():
        model[-1].weight[3] = model[-1].weight[4]
        model[-1].bias[3] = model[-1].bias[4] - 1
    with pytest.raises(InputError, match="3, whose status is UNREACHABLE"):
        repair(model, case.data.defender, targets=[3])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": [10]}, "targets: expected classes from 0 to 9"),
        ({"targets": [-1]}, "targets"),
        ({"targets": [1.7]}, "targets"),
        ({"targets": []}, "at least one class"),
        (
            {"targets": [0], "method": "magic"},
            "method: expected 'auto' or 'patch' or 'prune' or 'finetune'",
        ),
        ({"targets": "12"}, "targets: expected classes from 0 to 9, got '1'"),
        ({"targets": True}, "targets: expected classes from 0 to 9, got True"),
        ({"targets": [True]}, "targets: expected classes from 0 to 9, got True"),
        (
            {"settings": {"epochs": 1}},
            "settings: expected the settings of a method, or None, got dict",
        ),
        ({"settings": {}}, "settings: expected the settings of a method, or None, got dict"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, object], message: str) -> None:
    case = digit_case()
    with pytest.raises(InputError, match=message):
        repair(case.backdoored, case.data.defender, **arguments)


def test_a_rate_that_diverges_is_named() -> None:
    case = digit_case()
    settings = FinetuneSettings(learning_rate=1e12, epochs=2)
    with pytest.raises(InputError, match=r"settings: .*lower the learning_rate"):
        repair(case.backdoored, case.data.defender, targets=[0], settings=settings)


@pytest.mark.parametrize("rate", [1e4, 1e5, 1e6])
def test_a_rate_that_diverges_in_its_last_steps_is_named(rate: float) -> None:
    case = digit_case()
    settings = FinetuneSettings(learning_rate=rate, epochs=1)
    with pytest.raises(InputError, match=r"repair: settings: .*lower the learning_rate"):
        repair(case.backdoored, case.data.defender, targets=[0], settings=settings)


def test_what_was_not_finite_before_does_not_count() -> None:
    case = digit_case()
    model = copy.deepcopy(case.backdoored)
    model.register_buffer("mask", torch.full((2,), -math.inf))
    settings = FinetuneSettings(epochs=1)
    result = repair(model, case.data.defender, targets=[0], settings=settings)
    assert result.targets == (0,)


def test_a_holdout_that_leaves_nothing_is_named() -> None:
    case = digit_case()
    images, labels = case.data.defender
    message = (
        r"repair: holdout: expected a share that leaves at least 2 samples to train on, got 0\.999, "
        "which splits 300 samples into 0 to train on and 300 to measure with; lower it"
    )
    with pytest.raises(InputError, match=message):
        repair(
            case.backdoored,
            (images[:300], labels[:300]),
            targets=[0],
            settings=FinetuneSettings(holdout=0.999),
        )


@pytest.mark.parametrize(
    ("targets", "chosen"),
    [
        (np.int64(1), (1,)),
        (torch.tensor(1), (1,)),
        ([torch.tensor(1), np.int32(4)], (1, 4)),
        (torch.tensor([1, 2]), (1, 2)),
        (np.array([3, 3]), (3,)),
    ],
)
def test_targets_may_be_of_numpy_or_torch(targets: object, chosen: tuple[int, ...]) -> None:
    case = digit_case()
    settings = FinetuneSettings(epochs=1)
    result = repair(case.backdoored, case.data.defender, targets=targets, settings=settings)  # type: ignore[arg-type]
    assert result.targets == chosen
    assert all(type(target) is int for target in result.targets)


def test_the_margins_of_the_report_are_used() -> None:
    case = digit_case()
    settings = FinetuneSettings(epochs=1)
    reports = [scan(case.backdoored, case.data.defender, quantile=q) for q in (1.0, 0.9)]
    losses = [
        repair(case.backdoored, case.data.defender, report, targets=[0], settings=settings).history
        for report in reports
    ]
    assert losses[0] != losses[1]


def test_labels_out_of_range_are_refused_also_with_a_report() -> None:
    case = digit_case()
    images, labels = case.data.defender
    report = scan(case.backdoored, (images, labels))
    with pytest.raises(InputError, match="repair: data: expected labels from 0 to 9"):
        repair(case.backdoored, (images, labels + 2), report)


def test_too_few_samples_are_refused() -> None:
    case = digit_case()
    images, labels = case.data.defender
    with pytest.raises(InputError, match="at least 3 samples"):
        repair(case.backdoored, (images[:2], labels[:2]), targets=[0])


@pytest.mark.parametrize(
    "arguments",
    [
        {"epochs": 0},
        {"learning_rate": "a"},
        {"learning_rate": None},
        {"beta": "a"},
        {"holdout": "a"},
        {"weight_decay": "a"},
        {"learning_rate": 0.0},
        {"learning_rate": math.nan},
        {"beta": -1.0},
        {"batch_size": 1},
        {"holdout": 0.0},
        {"holdout": 1.0},
        {"weight_decay": -0.1},
        {"epochs": 1.5},
        {"seed": 2**62},
        {"gamma": -1.0},
        {"distillation": "a"},
        {"optimizer": "adam"},
        {"frozen_statistics": 1},
        {"solve_again": None},
        {"learning_rate": True},
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, float]) -> None:
    (name,) = arguments
    with pytest.raises(InputError, match=f"FinetuneSettings: {name}: expected"):
        FinetuneSettings(**arguments)  # type: ignore[arg-type]


def test_auto_puts_limits_in_front_of_what_it_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = digit_case()
    data, settings = case.data.defender, SETTINGS
    trained = repair(case.backdoored, data, targets=[demo.TARGET], settings=settings)
    assert trained.method == "finetune"
    assert not trained.limits_added
    fitted = mock.Mock(side_effect=fit_early_exits)
    monkeypatch.setattr("tacext.repair_methods.fit_early_exits", fitted)
    found = tacext.repair(case.backdoored, data, targets=[demo.TARGET], settings=settings)
    assert found.accepted
    assert found.method == "finetune"
    assert found.limits_added
    assert [attempt.limits_added for attempt in found.attempts] == [False, False, True]
    assert found.attempts[-1].accuracy_after == found.accuracy_after
    # Behind the limits is the trained model, and in front of them all is as it was.
    undone = remove_latent_patch(found.model).state_dict()
    assert all(torch.equal(v, undone[n]) for n, v in trained.model.state_dict().items())
    images, labels = case.data.test
    with torch.no_grad():
        before, after = trained.model(images), found.model(images)
    elsewhere = before.argmax(1) != demo.TARGET
    assert torch.equal(before[elsewhere], after[elsewhere])
    assert float((after.argmax(1) == labels).double().mean()) > 0.98
    limited = next(m for m in found.model.modules() if isinstance(m, PatchedHead))
    assert limited.patch.limit is not None
    assert limited.exits is not None
    # They look at the trained model, not at what it was.
    fitted_on, _ = fitted.call_args.args[:2]
    state = trained.model.state_dict()
    assert all(torch.equal(v, state[n]) for n, v in fitted_on.state_dict().items())
    # What lies far from all clean latents, on the side of the target, is no longer taken for it.
    with torch.no_grad():
        latent = trained.model[:-1](images)
        far = latent + 30 * trained.model[-1].weight[demo.TARGET]
        assert bool((trained.model[-1](far).argmax(1) == demo.TARGET).all())
        assert not bool((found.model[-1](far).argmax(1) == demo.TARGET).any())
    save_weights(found.model, tmp_path / "limited.safetensors")
    loaded = tacext.load_model(tmp_path / "limited.safetensors", demo.digit_net)
    with torch.no_grad():
        assert torch.equal(loaded(images), after)
    # Limits that cost more than is allowed are left out.
    monkeypatch.setattr(
        "tacext.repair_attempts.with_limit",
        lambda candidate, *_: dataclasses.replace(candidate, model=demo.digit_net().eval()),
    )
    without = tacext.repair(case.backdoored, data, targets=[demo.TARGET], settings=settings)
    assert without.accepted
    assert not without.limits_added
    state = without.model.state_dict()
    assert all(torch.equal(v, state[n]) for n, v in trained.model.state_dict().items())


def test_what_a_compiled_model_compiles_is_repaired() -> None:
    case = digit_case()
    compiled = torch.compile(copy.deepcopy(case.backdoored), backend="eager")
    assert isinstance(compiled, nn.Module)
    with torch.no_grad():
        compiled(case.data.defender[0][:4])
    report = scan(compiled, case.data.defender, depth="fast")
    patched = functools.partial(tacext.repair, targets=[0], method="patch", max_accuracy_drop=None)
    found = patched(compiled, case.data.defender, report)
    plain = patched(case.backdoored, case.data.defender)
    images = demo.white_corner(case.data.test[0])
    with torch.no_grad():
        assert torch.equal(found.model(images), plain.model(images))
    assert found.report_before.head == plain.report_before.head
    report = found.report_before
    assert patched(case.backdoored, case.data.defender, report).report_before is report


def test_a_report_of_other_weights_or_another_normalisation_is_refused() -> None:
    case = digit_case()
    report = scan_of("backdoored")
    told = r"repair: report: expected a scan of this very model, got one of other weights"
    with pytest.raises(InputError, match=told):
        repair(case.clean, case.data.defender, report)
    wrapped = tacext.Normalized(case.backdoored, [0.0], [1.0])
    with pytest.raises(InputError, match=told):
        repair(wrapped, case.data.defender, report)
    unknown = dataclasses.replace(report, model_norms=())  # as of a report that was made by hand
    refused = "repair: targets: expected classes from 0 to 9"
    for known in (report, unknown):
        with pytest.raises(InputError, match=refused):
            repair(copy.deepcopy(case.backdoored), case.data.defender, known, [10])
