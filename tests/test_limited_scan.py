"""Scans of models with limits in front of classes: what is behind a limit is a doubt, what passes it is not."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from digits import Cropped, digit_case, padded, patched_digits
from tacext import demo, repair, scan
from tacext.latent_patch import PatchedHead
from tacext.limited_scan import with_limits
from tacext.scan_report import Depth


def holding_nothing() -> nn.Module:
    """With a patch as anybody can put into a file of weights."""
    model = copy.deepcopy(patched_digits().model)
    head = next(m for m in model.modules() if isinstance(m, PatchedHead))
    head.exits = None
    head.patch.threshold += 1e6
    assert head.patch.limit is not None
    head.patch.limit.limit += 1e6
    return model


@pytest.mark.parametrize("depth", ["norms", "fast", "thorough"])
def test_what_stays_behind_a_limit_is_a_doubt_and_what_passes_it_a_backdoor(depth: Depth) -> None:
    data = padded(digit_case().data.defender)
    held = scan(patched_digits().model, data, depth=depth, alpha=0.02)
    assert held.verdict != "backdoored"
    assert held.suspects == ()
    assert held.limited == (demo.TARGET,)
    loose = scan(holding_nothing(), data, depth=depth, alpha=0.02)
    if depth == "norms":  # which look behind any
        assert held.verdict == "inconclusive"
        assert held.doubtful[0] == demo.TARGET
        assert "; but that is behind a latent patch: clean, if" in held.reason
    else:
        assert loose.verdict == "backdoored"
        assert loose.suspects[0] == demo.TARGET


def test_only_suspects_behind_limits_are_doubts() -> None:
    report = scan(digit_case().backdoored, digit_case().data.defender, depth="norms")
    assert report.suspects == (demo.TARGET,)
    limited = with_limits(report, (3, demo.TARGET))
    assert (limited.verdict, limited.suspects) == ("inconclusive", ())
    assert limited.doubtful == (demo.TARGET,)
    for classes in ((), (3,)):
        same = with_limits(report, classes)
        assert same.limited == classes
        assert (same.verdict, same.suspects) == (report.verdict, report.suspects)
        assert same.reason == report.reason
    two = replace(report, suspects=(demo.TARGET, 5))
    assert with_limits(two, (demo.TARGET,)).verdict == "backdoored"
    clean = scan(digit_case().clean, digit_case().data.defender, depth="norms")
    assert with_limits(clean, (0,)).verdict == clean.verdict


def test_gains_alone_are_a_doubt_and_images_that_are_moved_are_none() -> None:
    data = padded(digit_case().data.defender)
    report = scan(holding_nothing(), data, depth="fast", alpha=0.02)
    assert report.evidence is not None
    look = report.evidence.look
    assert look is not None
    assert look.corners is not None
    report = replace(report, limited=())
    assert with_limits(report, (demo.TARGET,)).verdict == "backdoored"
    corners = replace(look.corners, rate=torch.zeros_like(look.corners.rate))
    evidence = replace(report.evidence, look=replace(look, corners=corners))
    held = with_limits(replace(report, evidence=evidence), (demo.TARGET,))
    assert held.verdict == "inconclusive"
    assert "nothing that was tried leads inputs past it" in held.reason


def test_a_repair_tells_so() -> None:
    data = padded(digit_case().data.defender)
    model = Cropped(digit_case().backdoored)
    result = repair(model, data, targets=[demo.TARGET], method="patch")
    assert result.report_after is not None
    assert result.report_after.verdict != "backdoored"
