"""The gate looks at the classes that were repaired, however many there are, and hears all that is doubted."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from digits import Cropped, digit_case, padded, scan_of
from tacext import InputError, ScanReport, repair_gate, scan
from tacext.detection import judge_norms
from tacext.heads import find_head
from tacext.input_adversary import Effects, InputAdversary
from tacext.joint_test import shipped_calibration
from tacext.limited_scan import without_norms
from tacext.repair_gate import check_repair, judge_scan
from tacext.scanning import scan_looking_at
from tacext.second_look import SecondLook
from tacext.verdict import weigh
from test_verdict import look_of


def test_of_many_classes_those_that_are_named_are_looked_at() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 100))
    inputs = torch.rand(500, 20)
    data = inputs, model(inputs).argmax(1)

    def looked_at(*classes: int) -> set[int]:
        report = scan_looking_at(
            classes, model, data, head=None, metric="standardized", quantile=1.0, alpha=0.01, batch_size=256,
            trust_patch=False, seed=0, progress=False,
        )  # fmt: skip
        assert report.evidence is not None
        assert report.evidence.look is not None
        assert report.evidence.look.reach is not None
        assert report.evidence.look.reach.classes == report.evidence.look.classes
        return set(report.evidence.look.classes)

    chosen = looked_at()
    assert len(chosen) == 64
    left, seen = min(set(range(100)) - chosen), min(chosen)
    assert looked_at(left, seen) == chosen | {left}


def test_the_gate_has_the_targets_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    case = digit_case()
    images, labels = case.data.defender
    head = find_head(case.backdoored, images[:4])
    adversary = InputAdversary.sought(case.backdoored, head, images, labels, (0, 4), progress=False)
    moved, still = Effects(torch.full((2, 1), 0.9), torch.full((2, 1), 0.1)), torch.zeros(2, 1)
    adversary.effects = lambda *_: Effects(still, still)  # type: ignore[method-assign]
    asked: list[tuple[int, ...]] = []

    def scanning(classes: tuple[int, ...], *_: object, **_how: object) -> ScanReport:
        asked.append(classes)
        raise InputError("scan: data: no")

    monkeypatch.setattr(repair_gate, "scan_looking_at", scanning)
    monkeypatch.setattr(repair_gate, "_still_led_from_corner", lambda *_: None)
    gate = check_repair(
        case.backdoored, (images, labels), (images[:80], labels[:80]), scan_of("backdoored"), adversary, moved,
        (80, 80), 0.02, head=head.name, limited=False, batch_size=64,
    )  # fmt: skip
    assert "it cannot be scanned again" in gate.reason
    assert asked == [(0, 4)]


def without_class(look: SecondLook, target: int) -> SecondLook:
    """As if that class had not been looked at."""
    kept = torch.tensor([j for j, k in enumerate(look.classes) if k != target])
    classes = tuple(look.classes[j] for j in kept)
    assert look.reach is not None
    assert look.patch is not None
    assert look.corners is not None

    def cut(found: Any, *names: str) -> Any:
        changed = {name: getattr(found, name)[..., kept] for name in names}
        return dataclasses.replace(found, classes=classes, **changed)

    return dataclasses.replace(
        look,
        classes=classes,
        reach=cut(look.reach, "gain", "rate"),
        patch=cut(look.patch, "rate", "gain"),
        corners=cut(look.corners, "rate", "gain"),
    )


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("seen", [(), (4,)])
def test_a_target_that_was_not_looked_at_again_is_not_accepted(
    limited: bool, seen: tuple[int, ...]
) -> None:
    report = scan(Cropped(digit_case().clean), padded(digit_case().data.defender))
    assert report.evidence is not None
    assert report.evidence.look is not None
    assert judge_scan(report, (4,), seen, limited=limited)[0]
    look = without_class(report.evidence.look, 4)
    unseen = dataclasses.replace(report, evidence=dataclasses.replace(report.evidence, look=look))
    accepted, reason = judge_scan(unseen, (4,), seen, limited=limited)
    assert (accepted, reason) == (False, "class 4 was not looked at again")


@pytest.mark.parametrize("seen", [True, False])
def test_a_doubt_of_a_target_counts_though_another_class_comes_first(seen: bool) -> None:
    norm, look = look_of({3: 3.4, 6: 3.4}, cornered=True)
    test = judge_norms(norm)
    finding, evidence = weigh(test, look, 0.01, shipped_calibration())
    assert (finding.verdict, evidence.joint.most_suspicious) == ("inconclusive", 3)
    report = dataclasses.replace(
        scan_of("clean"), test=test, evidence=evidence, warnings=(), verdict=finding.verdict,
        suspects=finding.suspects, doubtful=finding.doubtful, p_value=finding.p_value, reason=finding.reason,
    )  # fmt: skip
    known = without_norms(report, (6,) if seen else (), False)[0]
    assert known.doubtful == (3, 6)
    accepted, reason = judge_scan(report, (6,), (6,) if seen else ())
    assert not accepted
    assert reason.startswith("a scan of the repaired model says inconclusive")
    accepted, reason = judge_scan(report, (7,), (7,) if seen else ())
    assert accepted
    assert "of other classes than were repaired" in reason
