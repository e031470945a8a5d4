"""The joint test: against plain formulas, and by simulation of clean and backdoored models."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tacext.joint_test import (
    KINDS,
    Calibration,
    JointNull,
    KindNull,
    calibration_from_json,
    fisher_sums,
    joint_p_values,
    judge_jointly,
    moderated_p_values,
    most_suspects,
)

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "detection")]

import calibrate

SPREAD, WEIGHT, CORRELATION = 0.2, 6.0, 0.4
Evidence = dict[str, npt.NDArray[np.float64]]


def simulate(
    generator: np.random.Generator, count: int, shift: dict[int, float] | None = None
) -> Evidence:
    """One model: spreads from the prior, correlated kinds, and `shift` spreads for some classes."""
    common = generator.standard_normal(count)
    evidence = {}
    for kind in KINDS:
        own = generator.standard_normal(count)
        spread = SPREAD * np.sqrt(WEIGHT / generator.chisquare(WEIGHT))
        scatter = np.sqrt(CORRELATION) * common + np.sqrt(1 - CORRELATION) * own
        values = 3.0 + spread * scatter
        for k, size in (shift or {}).items():
            values[k] += size * spread
        evidence[kind] = values
    return evidence


def case_of(evidence: Evidence) -> calibrate.Case:
    return calibrate.Case("clean", "clean", "resnet", "cifar10", (), evidence, {})


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    generator = np.random.default_rng(0)
    return calibrate.fit([case_of(simulate(generator, 10)) for _ in range(400)])


def test_without_prior_knowledge_it_is_the_leave_one_out_t_test() -> None:
    values = np.random.default_rng(1).standard_normal(9)
    found = moderated_p_values(values, KindNull(1.0, 1e-12))
    for k in range(9):
        others = np.delete(values, k)
        t = (values[k] - others.mean()) / (others.std(ddof=1) * np.sqrt(1 + 1 / 8))
        assert found[k] == pytest.approx(stats.t.sf(t, 7))


def test_with_certain_knowledge_it_is_the_normal_test() -> None:
    values = np.random.default_rng(1).standard_normal(9)
    found = moderated_p_values(values, KindNull(2.0, 1e9))
    for k in range(9):
        z = (values[k] - np.delete(values, k).mean()) / (2 * np.sqrt(1 + 1 / 8))
        assert found[k] == pytest.approx(stats.norm.sf(z), rel=1e-6)


@given(st.integers(4, 30), st.integers(0, 1000))
def test_the_level_means_nothing_and_classes_keep_their_p_values(count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    values, null = generator.standard_normal(count), KindNull(0.5, 4.0)
    found = moderated_p_values(values, null)
    np.testing.assert_allclose(moderated_p_values(values + 100, null), found, rtol=1e-6)
    order = generator.permutation(count)
    np.testing.assert_allclose(moderated_p_values(values[order], null), found[order], rtol=1e-9)


def test_fisher_is_exact_for_independent_kinds() -> None:
    p_values = [np.array([0.02, 0.5]), np.array([0.3, 0.9])]
    null = JointNull(shape=2.0, scale=2.0)  # chi squared with four degrees of freedom
    expected = [
        stats.combine_pvalues([a, b], "fisher").pvalue for a, b in zip(*p_values, strict=True)
    ]
    np.testing.assert_allclose(joint_p_values(fisher_sums(p_values), null), expected)


def test_the_fit_finds_the_constants_that_made_the_models(calibration: Calibration) -> None:
    for null in calibration.kinds.values():
        assert null.spread == pytest.approx(SPREAD, rel=0.1)
        assert null.weight == pytest.approx(WEIGHT, rel=0.5)
    assert calibration.models == 400
    again = calibration_from_json(calibrate.to_json(calibration))
    assert again.kinds == calibration.kinds
    assert again.joint == calibration.joint


@pytest.mark.parametrize("kinds", [KINDS, ("norm",)])
def test_false_alarms_keep_to_their_rate(calibration: Calibration, kinds: tuple[str, ...]) -> None:
    generator = np.random.default_rng(2)
    p_values = np.array(
        [
            judge_jointly(
                {kind: values for kind, values in simulate(generator, 10).items() if kind in kinds},
                0.05,
                calibration,
            ).p_value
            for _ in range(1500)
        ]
    )
    # Two standard errors above what was promised would be .011.
    assert (p_values < 0.05).mean() < 0.061
    assert (p_values < 0.01).mean() < 0.016
    assert (p_values < 0.5).mean() > 0.2  # and is not merely timid


def test_single_and_joint_outliers_are_found(calibration: Calibration) -> None:
    generator = np.random.default_rng(3)
    found = [
        judge_jointly(simulate(generator, 10, {4: 6.0}), 0.01, calibration) for _ in range(200)
    ]
    assert np.mean([test.suspects == (4,) for test in found]) > 0.9
    found = [
        judge_jointly(simulate(generator, 10, {2: 7.0, 7: 7.0}), 0.01, calibration)
        for _ in range(200)
    ]
    assert np.mean([set(test.suspects) == {2, 7} for test in found]) > 0.8


def test_suspects_are_named_exactly_where_the_p_value_is_below_alpha(
    calibration: Calibration,
) -> None:
    generator = np.random.default_rng(5)
    for shift in np.linspace(0, 6, 200):
        test = judge_jointly(simulate(generator, 10, {4: float(shift)}), 0.05, calibration)
        assert bool(test.suspects) == (test.p_value < 0.05)


def test_what_is_reported_belongs_together(calibration: Calibration) -> None:
    evidence = simulate(np.random.default_rng(4), 20, {3: 9.0})
    test = judge_jointly(evidence, 0.01, calibration)
    assert test.order[0] == 3 == int(test.class_p_values.argmin())
    assert len(test.order) == len(test.step_p_values) == most_suspects(20) == 3
    assert test.p_value == pytest.approx(3 * min(test.step_p_values))
    assert set(test.kind_p_values) == set(KINDS)
    for kind in KINDS:
        np.testing.assert_allclose(
            test.kind_p_values[kind], moderated_p_values(evidence[kind], calibration.kinds[kind])
        )
    assert [most_suspects(c) for c in (2, 9, 10, 14, 15, 1000)] == [1, 1, 2, 2, 3, 3]


def test_the_evidence_of_the_zoo_can_be_read() -> None:
    files = sorted(calibrate.EVIDENCE.glob("*.json"))
    assert files, "no evidence: run collect_evidence.py"
    for file in files:
        case = calibrate.read_case(file)
        sizes = {len(values) for values in case.evidence.values()}
        assert len(sizes) == 1
        assert all(np.isfinite(values).all() for values in case.evidence.values())
        assert all(0 <= target < sizes.copy().pop() for target in case.targets)
        assert bool(case.targets) == (case.attack != "clean")
        assert file.stat().st_size < 20_000
        assert json.loads(file.read_text())["norms"]
