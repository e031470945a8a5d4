"""Repairing a real digit classifier."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from torch import nn

import tacext
from digits import digit_case
from tacext import FinetuneSettings, InputError, demo, evaluate, scan

SETTINGS = FinetuneSettings()
# What the fine-tuning itself does; the gate has tests of its own below.
repair = functools.partial(tacext.repair, max_accuracy_drop=None)
PLAIN = FinetuneSettings(beta=0.0, gamma=0.0, distillation=0.0)


def test_removes_the_backdoor_where_plain_fine_tuning_does_not() -> None:
    case = digit_case()
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
    assert any("only shifted latents were trained against" in w for w in result.warnings)
    assert math.isnan(result.history[0].attacked)


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
    with pytest.raises(InputError, match="report: expected a scan of this model"):
        repair(case.clean, case.data.defender, report, targets=[0])


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
        ({"targets": [0], "method": "magic"}, "method: expected 'finetune'"),
        ({"targets": "12"}, "targets: expected classes from 0 to 9, got '1'"),
        ({"targets": True}, "targets: expected classes from 0 to 9, got True"),
        ({"targets": [True]}, "targets: expected classes from 0 to 9, got True"),
        ({"settings": {"epochs": 1}}, "settings: expected FinetuneSettings or None, got dict"),
        ({"settings": {}}, "settings: expected FinetuneSettings or None, got dict"),
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
    ],
)
def test_bad_settings_are_refused(arguments: dict[str, float]) -> None:
    (name,) = arguments
    with pytest.raises(InputError, match=f"FinetuneSettings: {name}: expected"):
        FinetuneSettings(**arguments)  # type: ignore[arg-type]


# ---- the gate ------------------------------------------------------------------------------------


def test_a_repair_that_keeps_accuracy_and_loses_the_class_is_accepted() -> None:
    case = digit_case()
    result = tacext.repair(case.backdoored, case.data.defender)
    assert result.accepted
    assert result.report_after is not None
    assert demo.TARGET not in result.report_after.suspects
    assert result.reason.startswith("a scan of the repaired model says")
    assert result.accuracy_before - result.accuracy_after <= 0.02
    after = evaluate(result.model, case.data.test, demo.white_corner, demo.TARGET)
    assert after.asr < 0.05


def test_a_repair_that_costs_too_much_is_rolled_back() -> None:
    case = digit_case()
    settings = FinetuneSettings(epochs=6, learning_rate=0.3, optimizer="sgd", beta=5.0)
    result = tacext.repair(case.backdoored, case.data.defender, settings=settings)
    assert not result.accepted
    assert result.accuracy_after < result.accuracy_before - 0.02
    assert "of accuracy on held-out samples, and 2.0% is allowed" in result.reason
    assert any(warning.startswith("rolled back: it loses") for warning in result.warnings)
    assert result.report_after is None
    state = case.backdoored.state_dict()
    assert all(torch.equal(v, state[n]) for n, v in result.model.state_dict().items())
    assert result.model is not case.backdoored


def test_a_repair_that_leaves_the_backdoor_is_rolled_back() -> None:
    case = digit_case()
    settings = dataclasses.replace(PLAIN, epochs=1, learning_rate=1e-6)
    result = tacext.repair(case.backdoored, case.data.defender, settings=settings)
    assert not result.accepted
    assert "a scan still finds class 0" in result.reason
    assert result.report_after is not None
    assert result.report_after.verdict == "backdoored"


@pytest.mark.parametrize("drop", [-0.1, 1.5, "a", math.nan, True])
def test_what_may_be_lost_is_a_share(drop: object) -> None:
    case = digit_case()
    with pytest.raises(InputError, match="repair: max_accuracy_drop: expected a share from 0"):
        tacext.repair(case.backdoored, case.data.defender, max_accuracy_drop=drop)  # type: ignore[arg-type]
