"""Norms that no rescaling of latents changes, and how they are judged beside the others."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from digits import digit_case
from tacext import MinimalPerturbation, SolverSettings, Status, ops, scan, scanning
from tacext.detection import judge_norms
from tacext.latents import LatentMoments
from tacext.observation import Observation, observe, proven_norms, solve_balanced
from tacext.second_look import classes_to_look_at


def head_and_data(classes: int = 6, latents: int = 9) -> tuple[nn.Linear, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(classes)
    head = nn.Linear(latents, classes, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(torch.randn(classes, latents, generator=generator))
    inputs = torch.randn(300, latents, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        labels = head(inputs).argmax(1)
    return head, (inputs, labels)


def observed(head: nn.Linear, data: tuple[Tensor, Tensor]) -> Observation:
    model = nn.Sequential(head)
    return observe(
        model, data, head=None, batch_size=64, progress=False, operation="scan", before_patch=True
    )


@given(st.lists(st.floats(-8, 8), min_size=9, max_size=9), st.integers(0, 2**9 - 1))
def test_no_rescaling_of_latents_changes_them(exponents: list[float], signs: int) -> None:
    head, (inputs, labels) = head_and_data()
    factor = 10 ** torch.tensor(exponents, dtype=torch.float64)
    factor *= torch.tensor([1.0 if signs >> i & 1 else -1.0 for i in range(9)])
    same = copy.deepcopy(head)
    with torch.no_grad():
        same.weight.div_(factor)
    expected = balanced_norms(observed(head, (inputs, labels)))
    found = balanced_norms(observed(same, (inputs * factor, labels)))
    assert expected is not None
    assert bool((expected > 0).all())
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_they_are_norms_in_latents_that_weigh_the_same_in_the_head() -> None:
    head, (inputs, labels) = head_and_data()
    seen = observed(head, (inputs, labels))
    weight = head.weight.detach() - head.weight.detach().mean(0)
    length = weight.norm(dim=0)
    # By hand: latents scaled to columns of length one, and then the scale of their spread.
    spread = (inputs * length).std(0)
    floored = torch.maximum(spread, 0.3 * spread.square().mean().sqrt())
    by_hand = ops.minimal_perturbation(weight / length, seen.margins, scale=1 / floored)
    torch.testing.assert_close(balanced_norms(seen), by_hand.norm, rtol=1e-9, atol=0)


def test_what_all_classes_share_tells_nothing() -> None:
    head, (inputs, labels) = head_and_data()
    expected = balanced_norms(observed(head, (inputs, labels)))
    shared = copy.deepcopy(head)
    with torch.no_grad():
        shared.weight.add_(torch.arange(9.0) * 100)
    found = balanced_norms(observed(shared, (inputs, labels)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    # A latent of which nothing else is left weighs nothing, however much it varies.
    wider = nn.Linear(10, 6, dtype=torch.float64)
    with torch.no_grad():
        wider.weight[:, :9] = head.weight
        wider.weight[:, 9] = 0.1
        wider.bias.copy_(head.bias)
    more = torch.cat([inputs, 1e6 * inputs[:, :1]], 1)
    found = balanced_norms(observed(wider, (more, labels)))
    assert expected is not None
    assert found is not None
    # But for the floor, which is a share of the usual spread.
    floor = (10 / 9) ** 0.5
    assert bool(((found > expected / floor) & (found < expected * floor)).all())


def test_latents_that_do_not_vary_have_none_and_what_is_not_solved_is_unknown() -> None:
    head, data = head_and_data()
    moments = LatentMoments(10, torch.zeros(9), torch.zeros(9, dtype=torch.float64))
    assert moments.balanced(head.weight) is None
    few = SolverSettings(max_iterations=1, closed_form=False)
    found = solve_balanced(observed(head, data), few)
    assert found is not None
    unproven = (found.status == Status.ITERATION_LIMIT).numpy()
    assert unproven.any()
    np.testing.assert_array_equal(np.isnan(proven_norms(found)), unproven)


def test_a_class_without_a_certificate_in_either_metric_leaves_no_verdict(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = digit_case()
    assert scan(case.clean, case.data.defender, depth="norms", alpha=0.05).verdict == "clean"

    def stopped(*arguments: Any, **settings: Any) -> MinimalPerturbation | None:
        found = solve_balanced(*arguments, **settings)
        assert found is not None
        status = found.status.clone()
        status[3] = Status.ITERATION_LIMIT
        return replace(found, status=status)

    monkeypatch.setattr(scanning, "solve_balanced", stopped)
    report = scan(case.clean, case.data.defender, depth="norms", alpha=0.05)
    assert report.verdict == "inconclusive"
    assert report.warnings == ("classes without a certificate: 3",)


def balanced_norms(observation: Observation) -> Tensor | None:
    found = solve_balanced(observation)
    return None if found is None else found.norm


def norms(*changes: tuple[int, float]) -> np.ndarray:
    found = np.exp(0.02 * np.random.default_rng(3).standard_normal(20))
    for k, value in changes:
        found[k] = value
    return found


def test_either_of_the_two_betrays_a_class_and_both_clear_a_model() -> None:
    nothing = norms()
    clean = judge_norms(nothing, 0.01, nothing)
    assert (clean.verdict, clean.reason) == ("clean", judge_norms(nothing, 0.005).reason)
    assert "rescaled" not in clean.reason
    for plain, balanced in ((norms((4, 0.6)), nothing), (nothing, norms((4, 0.6)))):
        found = judge_norms(plain, 0.01, balanced)
        assert (found.verdict, found.suspects) == ("backdoored", (4,))
        assert found.reason.endswith("latents are rescaled to weigh the same in the head") == (
            plain is nothing
        )
        alone = judge_norms(norms((4, 0.6)), 0.01)
        assert found.p_value == pytest.approx(2 * alone.p_value, rel=1e-9)
        assert found.class_p_values[4] == found.p_value
        np.testing.assert_array_equal(found.norm, plain)
        assert found.balanced is balanced
    both = judge_norms(norms((4, 0.6)), 0.01, norms((7, 0.5)))
    assert both.suspects == (7, 4)
    # What does not scatter as clean norms do has no say, neither in suspects nor in p.
    odd = norms(*((k, 1e-3) for k in range(3)))
    assert not judge_norms(odd, 0.01).applies
    for pair in ((norms((4, 0.6)), odd), (odd, norms((4, 0.6)))):
        found = judge_norms(pair[0], 0.01, pair[1])
        assert (found.verdict, found.suspects, found.applies) == ("backdoored", (4,), True)
        assert found.p_value == found.class_p_values[4] == pytest.approx(2 * alone.p_value)
    assert not judge_norms(odd, 0.01, odd).applies
    # Each has half of alpha.
    edge = next(x for x in np.linspace(0.96, 0.6, 2000) if judge_norms(norms((4, x))).suspects)
    assert judge_norms(norms((4, edge)), 0.01, nothing).verdict == "inconclusive"
    assert judge_norms(norms((4, edge)), 0.02, nothing).suspects == (4,)


def test_of_many_classes_the_smallest_by_either_are_looked_at() -> None:
    plain, balanced = np.arange(1.0, 201), np.arange(1.0, 201)
    balanced[147], plain[180] = 0.5, np.nan
    assert 147 not in classes_to_look_at(plain)
    chosen = classes_to_look_at(plain, balanced)
    assert {147, 180, 0, 1} <= set(chosen)
    assert len(chosen) == 64
