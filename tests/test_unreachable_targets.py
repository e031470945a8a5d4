"""Classes that no latent perturbation reaches: an error where they are named, left out where a scan names them."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from torch import nn

from digits import digit_case
from tacext import InputError, ScanReport, repair, scan
from tacext.ops import Status

TOLD = "class 3 was left out: no latent perturbation into it is known (unreachable)"


@functools.cache
def unreachable() -> tuple[nn.Module, ScanReport]:
    """A backdoored network of which class 3 is always behind class 4."""
    model = copy.deepcopy(digit_case().backdoored)
    with torch.no_grad():
        model[-1].weight[3] = model[-1].weight[4]  # type: ignore[index,union-attr,operator]
        model[-1].bias[3] = model[-1].bias[4] - 1  # type: ignore[index,union-attr,operator]
    report = scan(model, digit_case().data.defender, depth="fast")
    assert int(report.perturbations.status[3]) == Status.UNREACHABLE
    return model, report


unseen = functools.partial(repair, method="patch", max_accuracy_drop=None)


@pytest.mark.parametrize(
    ("suspects", "doubtful", "repaired"),
    [((0, 3), (), (0,)), ((3, 0), (), (0,)), ((), (3, 0), (0,)), ((0,), (3, 5), (0, 5)), ((0,), (3,), (0,))],
)  # fmt: skip
def test_of_those_that_a_scan_names_they_are_left_out(
    suspects: tuple[int, ...], doubtful: tuple[int, ...], repaired: tuple[int, ...]
) -> None:
    model, report = unreachable()
    named = dataclasses.replace(report, suspects=suspects, doubtful=doubtful)
    result = unseen(model, digit_case().data.defender, named)
    assert (result.accepted, result.targets) == (True, repaired)
    assert [warning for warning in result.warnings if "left out" in warning] == [TOLD]


def test_where_none_is_left_or_it_was_asked_for_it_is_an_error() -> None:
    model, report = unreachable()
    named = dataclasses.replace(report, suspects=(3,), doubtful=())
    with pytest.raises(InputError, match="3, whose status is UNREACHABLE"):
        unseen(model, digit_case().data.defender, named)
    with pytest.raises(InputError, match="3, whose status is UNREACHABLE"):
        unseen(model, digit_case().data.defender, report, targets=[0, 3])
    result = unseen(model, digit_case().data.defender, report, targets=[0])
    assert not any("left out" in warning for warning in result.warnings)
