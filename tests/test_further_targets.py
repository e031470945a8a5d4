"""Classes that are repaired beside the suspects: which, when, and what is told of the attempts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.nn import functional

from digits import Cropped, digit_case, padded
from tacext import InputError, RepairResult, demo, evaluate, repair, scan
from tacext.attacks import AllToOne, Attack, plan_poisoning
from tacext.further_targets import with_further_targets
from tacext.repair_methods import Method
from tacext.repair_result import Attempt
from tacext.tables import repair_table


def black_and_white(images: Tensor) -> Tensor:
    """Another trigger than the demo's, in the opposite corner."""
    marked = images.clone()
    marked[:, :, :2, :2] = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    return marked


def on_the_last_corner(trigger: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """A trigger on padded images."""
    return functional.pad(trigger(images[:, :, 8:, 8:]), (8, 0, 8, 0))


def outcome(
    targets: tuple[int, ...],
    accepted: bool,
    suspects: tuple[int, ...] = (),
    method: Method = "patch",
    seconds: float = 1.0,
) -> RepairResult:
    """A repair of these classes, after which a scan suspects others."""
    report: Any = type("Report", (), {"suspects": suspects})()
    attempt = Attempt(method, accepted, "why", 0.9, 0.9, report, seconds, targets=targets)
    empty: dict[str, Any] = {f.name: None for f in dataclasses.fields(RepairResult)}
    given: dict[str, Any] = {
        "accepted": accepted, "targets": targets, "method": method, "attempts": (attempt,), "seconds": seconds,
        "warnings": (),
    }  # fmt: skip
    return RepairResult(**(empty | given))


FAILED = InputError("repair: data: no")


@pytest.mark.parametrize(
    ("first", "doubtful", "others", "wanted", "kept"),
    [
        # Accepted: classes in doubt get limits as well, if these are accepted.
        (outcome((2,), True), (), [], [], (2,)),
        (outcome((2,), True), (2,), [], [], (2,)),
        (outcome((2,), True), (5,), [outcome((2, 5), True)], [(2, 5)], (2, 5)),
        (outcome((2,), True), (5,), [outcome((2, 5), False, (7,))], [(2, 5)], (2,)),
        (outcome((2,), True), (5,), [FAILED], [(2, 5)], (2,)),
        (outcome((2,), True, (7,)), (), [], [], (2,)),
        # What was trained does not stand in front of anything.
        (outcome((2,), True, method="finetune"), (5,), [], [], (2,)),
        # Rolled back: only where the scan suspects another class than those that were repaired.
        (outcome((2,), False), (5,), [], [], (2,)),
        (outcome((2,), False, (2,)), (5,), [], [], (2,)),
        (outcome((2,), False, method="finetune"), (5,), [], [], (2,)),
        (outcome((2,), False, (7,)), (), [outcome((2, 7), True)], [(2, 7)], (2, 7)),
        (outcome((2,), False, (7, 2)), (5,), [outcome((2, 7), False)], [(2, 7)], (2,)),
        # A patch in front of both may have one in front of a class in doubt, too; training has not.
        (
            outcome((2,), False, (7,)), (5,),
            [outcome((2, 7), True), outcome((2, 7, 5), True)], [(2, 7), (2, 7, 5)], (2, 7, 5),
        ),
        (
            outcome((2,), False, (7,)), (5,),
            [outcome((2, 7), True), outcome((2, 7, 5), False)], [(2, 7), (2, 7, 5)], (2, 7),
        ),
        (
            outcome((2,), False, (7,)), (5,),
            [outcome((2, 7), True, method="finetune")], [(2, 7)], (2, 7),
        ),
        # And again, while there is another one, but not for ever.
        (
            outcome((2,), False, (7,)), (),
            [outcome((2, 7), False, (1,)), outcome((2, 7, 1), True)], [(2, 7), (2, 7, 1)], (2, 7, 1),
        ),
        (
            outcome((2,), False, (7,)), (),
            [outcome((2, 7), False, (1,)), FAILED], [(2, 7), (2, 7, 1)], (2,),
        ),
        (
            outcome((2,), False, (7,)), (),
            [outcome((2, 7), False, (1,)), outcome((2, 7, 1), False, (0,)), outcome((2, 7, 1, 0), False, (3,))],
            [(2, 7), (2, 7, 1), (2, 7, 1, 0)], (2,),
        ),
        (outcome((2,), False, (7,)), (), [outcome((2, 7), False, (2,))], [(2, 7)], (2,)),
    ],
)  # fmt: skip
def test_which_are_looked_after(
    first: RepairResult,
    doubtful: tuple[int, ...],
    others: list[RepairResult | InputError],
    wanted: list[tuple[int, ...]],
    kept: tuple[int, ...],
) -> None:
    found: list[tuple[int, ...]] = []

    def again(targets: tuple[int, ...], method: Method) -> RepairResult:
        found.append(targets)
        assert method == ("patch" if 5 in targets else "auto")
        outcome = others[len(found) - 1]
        if isinstance(outcome, InputError):
            raise outcome
        return outcome

    result = with_further_targets(first, doubtful, "auto", again)
    assert found == wanted
    assert result.targets == kept
    assert result.accepted == (first.accepted or kept != first.targets)
    tried = [first, *(o for o in others if isinstance(o, RepairResult))]
    assert [a.targets for a in result.attempts] == [r.targets for r in tried]
    assert result.seconds == len(tried)
    left = (
        []
        if result.accepted
        else [k for k in tried[-1].attempts[0].report_after.suspects if k not in kept]
    )  # type: ignore[union-attr]
    told = ", ".join(map(str, left))
    expected = (f"a scan of what came out suspects {told} as well",) if left else ()
    assert result.warnings == expected


def test_classes_out_of_reach_do_not_discard_a_round() -> None:
    """And where there are no others, there is none."""
    asked: list[tuple[int, ...]] = []

    def again(targets: tuple[int, ...], _method: Method) -> RepairResult:
        asked.append(targets)
        return outcome(targets, True)

    def reachable(classes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(k for k in classes if k != 7)

    for suspects, doubtful in (((7, 1), ()), ((7,), ()), ((1,), (5, 7)), ((1,), (7,))):
        result = with_further_targets(
            outcome((2,), False, suspects), doubtful, "patch", again, reachable
        )
        assert result.accepted == (1 in suspects)
    assert asked == [(2, 1), (2, 1), (2, 1, 5), (2, 1)]


def test_of_several_scans_that_of_a_patch_names_the_class() -> None:
    """And where the patch came to none, that of another method."""

    def tried(patch: tuple[int, ...] | None, tuned: tuple[int, ...]) -> list[tuple[int, ...]]:
        first = outcome((2,), False, tuned, "finetune")
        if patch is None:
            refused = Attempt("patch", False, "it loses", 0.5, 0.9, None, 1.0, targets=(2,))
        else:
            refused = outcome((2,), False, patch).attempts[0]
        first = dataclasses.replace(first, attempts=(refused, *first.attempts))
        asked: list[tuple[int, ...]] = []

        def again(targets: tuple[int, ...], _method: Method) -> RepairResult:
            asked.append(targets)
            return outcome(targets, True)

        with_further_targets(first, (), "auto", again)
        return asked

    assert tried((7,), (1,)) == [(2, 7)]
    assert tried(None, (1,)) == [(2, 1)]
    assert tried((), (1,)) == []


def test_of_several_rounds_the_scan_of_the_last_names_the_class() -> None:
    """Also where its patch came to none, and that of a round before is still among the attempts."""
    refused = Attempt("patch", False, "it loses", 0.5, 0.9, None, 1.0, targets=(2, 7))
    second = outcome((2, 7), False, (1,), "finetune")
    second = dataclasses.replace(second, attempts=(refused, *second.attempts))
    rounds = iter([second, outcome((2, 7, 1), True, method="finetune")])
    asked: list[tuple[int, ...]] = []

    def again(targets: tuple[int, ...], _method: Method) -> RepairResult:
        asked.append(targets)
        return next(rounds)

    assert with_further_targets(outcome((2,), False, (7,)), (), "auto", again).accepted
    assert asked == [(2, 7), (2, 7, 1)]


def test_a_second_backdoor_that_the_first_had_hidden_is_repaired_too() -> None:
    case = digit_case()
    images, labels = case.data.training
    attacks = [Attack(demo.white_corner, AllToOne(0)), Attack(black_and_white, AllToOne(6))]
    plan = plan_poisoning(labels, attacks, 0.2, seed=0)
    data, test = padded(case.data.defender), padded(case.data.test)
    model = Cropped(demo.train(*plan.apply(images, labels, torch.arange(len(labels)))))
    with demo.one_thread():
        report = scan(model, data)
        assert set(report.suspects) == {0, 6}
        report = dataclasses.replace(report, suspects=(0,), doubtful=())
        result = repair(model, data, report, method="patch")
        # Asked for one class alone, it repairs one class alone.
        alone = repair(model, data, report, targets=[0], method="patch")
    assert [a.targets for a in result.attempts] == [(0,), (0, 6)]
    assert [a.accepted for a in result.attempts] == [False, True]
    assert (result.accepted, result.targets) == (True, (0, 6))
    for trigger, target in ((demo.white_corner, 0), (black_and_white, 6)):
        led = functools.partial(on_the_last_corner, trigger)
        before, after = (evaluate(m, test, led, target).asr for m in (model, result.model))
        assert before > 0.95
        assert after < 0.1
    assert [a.targets for a in alone.attempts] == [(0,)]
    assert not alone.accepted
    told = Console(width=200, record=True)
    told.print(repair_table(result))
    text = told.export_text()
    assert "patch of 0: rejected" in text
    assert "patch of 0, 6: accepted" in text
