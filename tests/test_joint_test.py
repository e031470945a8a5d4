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
    COMBINATIONS,
    FEWEST_CLASSES_TO_TRIM,
    KINDS,
    Calibration,
    JointNull,
    KindNull,
    NormalNull,
    calibration_from_json,
    joint_p_values,
    joint_scores,
    judge_jointly,
    logit_of_share,
    moderated_p_values,
    shipped_calibration,
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


def case_of(evidence: Evidence, shuffle: float) -> calibrate.Case:
    lead = 2 * logit_of_share(shuffle) + 1
    return calibrate.Case(
        "clean", "clean", "resnet", "cifar10", (), evidence, shuffle, shuffle, lead, lead + 5, {}
    )


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    generator = np.random.default_rng(0)
    shares = 1 / (1 + np.exp(1.5 + 0.4 * generator.standard_normal(400)))
    return calibrate.fit([case_of(simulate(generator, 10), share) for share in shares])


def others_of(values: npt.NDArray[np.float64], k: int) -> npt.NDArray[np.float64]:
    """All values but that of class k and, among many, but the largest of the rest."""
    others = np.sort(np.delete(values, k))
    return others[:-1] if len(values) >= FEWEST_CLASSES_TO_TRIM else others


@pytest.mark.parametrize("count", [4, 7, 8, 9, 40])
def test_without_prior_knowledge_it_is_the_leave_one_out_t_test(count: int) -> None:
    values = 100 + np.random.default_rng(count).standard_normal(count)
    found = moderated_p_values(values, KindNull(1.0, 1e-12))
    for k in range(count):
        others = others_of(values, k)
        n = len(others)
        t = (values[k] - others.mean()) / (others.std(ddof=1) * np.sqrt(1 + 1 / n))
        assert found[k] == pytest.approx(stats.t.sf(t, n - 1), rel=1e-6)


def test_with_certain_knowledge_it_is_the_normal_test() -> None:
    values = np.random.default_rng(1).standard_normal(9)
    found = moderated_p_values(values, KindNull(2.0, 1e9))
    for k in range(9):
        z = (values[k] - others_of(values, k).mean()) / (2 * np.sqrt(1 + 1 / 7))
        assert found[k] == pytest.approx(stats.norm.sf(z), rel=1e-6)


def test_equal_values_are_all_usual_and_what_was_not_measured_is_no_number() -> None:
    assert moderated_p_values(np.full(9, 2.0), KindNull(0.5, 4.0)) == pytest.approx(0.5)
    values = np.array([1.0, np.nan, 1.5, 0.7, np.inf, 1.1])
    known = np.isfinite(values)
    found = moderated_p_values(values, KindNull(0.5, 4.0))
    assert np.isnan(found[~known]).all()
    np.testing.assert_allclose(
        found[known], moderated_p_values(values[known], KindNull(0.5, 4.0)), rtol=1e-12
    )
    assert np.isnan(moderated_p_values(np.array([1.0, np.nan]), KindNull(0.5, 4.0))).all()


@given(st.integers(4, 30), st.integers(0, 1000))
def test_the_level_means_nothing_and_classes_keep_their_p_values(count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    values, null = generator.standard_normal(count), KindNull(0.5, 4.0)
    found = moderated_p_values(values, null)
    np.testing.assert_allclose(moderated_p_values(values + 100, null), found, rtol=1e-6)
    order = generator.permutation(count)
    np.testing.assert_allclose(moderated_p_values(values[order], null), found[order], rtol=1e-9)


def test_one_kind_alone_is_fishers_method() -> None:
    p_values = np.array([0.02, 0.5, 1e-5])
    null = JointNull(shape=1.0, scale=2.0, models=10**9)  # chi squared, two degrees of freedom
    found = joint_p_values(joint_scores([p_values]), null, 1)
    np.testing.assert_allclose(found, p_values, rtol=1e-6)
    found = joint_p_values(joint_scores([p_values]), null, 7)
    np.testing.assert_allclose(found, 1 - (1 - p_values) ** 7, rtol=1e-6)


def test_the_score_is_the_length_of_the_logarithms() -> None:
    p_values = [np.array([0.02, 0.5]), np.array([0.3, 0.9])]
    expected = np.sqrt((2 * np.log([0.02, 0.5])) ** 2 + (2 * np.log([0.3, 0.9])) ** 2)
    np.testing.assert_allclose(joint_scores(p_values), expected)
    # A clear sign in one kind counts for more than half a sign in each of two.
    one, two = [np.array([1e-4]), np.array([1.0])], [np.array([1e-2]), np.array([1e-2])]
    assert joint_scores(one)[0] > joint_scores(two)[0]


def test_what_was_not_measured_adds_no_suspicion() -> None:
    with_gaps = [np.array([0.02, np.nan]), np.array([np.nan, 0.3])]
    assert joint_scores(with_gaps) == pytest.approx(-2 * np.log([0.02, 0.3]))


def test_an_uncertain_scale_makes_every_p_value_of_the_tail_larger() -> None:
    scores = np.array([20.0, 40.0])
    certain, few = (joint_p_values(scores, JointNull(2.0, 2.0, n), 10) for n in (10**9, 45))
    assert (few > certain).all()
    generator = np.random.default_rng(8)  # the law of a draw divided by an estimate of the scale
    draws = generator.gamma(2.0, 2.0, 200_000) / (generator.gamma(45, 1 / 45, 200_000))
    single = joint_p_values(scores[:1], JointNull(2.0, 2.0, 45), 1)[0]
    assert (draws > 20.0).mean() == pytest.approx(single, rel=0.15)


def test_the_fit_finds_the_constants_that_made_the_models(calibration: Calibration) -> None:
    for null in calibration.kinds.values():
        assert null.spread == pytest.approx(SPREAD, rel=0.1)
        assert null.weight == pytest.approx(WEIGHT, rel=0.5)
    assert calibration.models == 400
    assert calibration.shuffle.mean == pytest.approx(-1.5, abs=0.06)
    assert calibration.shuffle.spread == pytest.approx(0.4, rel=0.1)
    assert calibration.source.mean == pytest.approx(-2.0, abs=0.12)
    assert calibration.source.spread == pytest.approx(0.8, rel=0.1)
    assert calibration.wave.mean == pytest.approx(3.0, abs=0.12)
    again = calibration_from_json(calibrate.to_json(calibration))
    for name, null in calibration.joint.items():
        assert again.joint[name].shape == pytest.approx(null.shape, rel=1e-3)
        assert again.joint[name].scale == pytest.approx(null.scale, rel=1e-3)


def test_the_largest_of_gamma_draws_gives_their_law_back() -> None:
    generator = np.random.default_rng(6)
    classes = generator.choice([10, 43], 4000)
    largest = np.array([generator.gamma(2.5, 3.0, size).max() for size in classes])
    null = calibrate.fit_joint(largest, classes.astype(float))
    assert null.models == 4000
    assert null.scale == pytest.approx(3.0, rel=0.06)
    assert null.shape == pytest.approx(2.5, rel=0.15)


def test_numbers_of_clean_models_are_as_rare_as_they_are() -> None:
    null = NormalNull(mean=-1.5, spread=0.4, models=45)
    generator = np.random.default_rng(7)
    numbers = -1.5 + 0.4 * generator.standard_normal(4000)
    p_values = np.array([null.p_value(number) for number in numbers])
    assert (p_values < 0.05).mean() == pytest.approx(0.05, abs=0.012)
    assert null.p_value(logit_of_share(0.98)) < 1e-9
    assert 0 < null.p_value(logit_of_share(1.0)) < 1e-6
    assert null.p_value(logit_of_share(0.0)) > 0.999


@pytest.mark.parametrize("kinds", COMBINATIONS)
def test_false_alarms_keep_to_their_rate(kinds: tuple[str, ...]) -> None:
    """On average over calibrations from as few models as there are."""
    p_values = []
    for seed in range(8):
        generator = np.random.default_rng(seed)
        calibration = calibrate.fit([case_of(simulate(generator, 10), 0.2) for _ in range(45)])
        for _ in range(400):
            evidence = simulate(generator, 10)
            chosen = {kind: evidence[kind] for kind in kinds}
            p_values.append(judge_jointly(chosen, 0.05, calibration).p_value)
    found = np.array(p_values)
    assert (found < 0.05).mean() < 0.055
    assert (found < 0.01).mean() < 0.013
    assert (found < 0.5).mean() > 0.35  # and is not merely timid


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


def test_classes_between_alpha_and_doubt_are_doubtful(calibration: Calibration) -> None:
    generator = np.random.default_rng(5)
    for shift in np.linspace(0, 6, 200):
        evidence = simulate(generator, 10, {4: float(shift)})
        test = judge_jointly(evidence, 0.01, calibration, 0.2)
        assert bool(test.suspects) == (test.p_value < 0.01)
        if not test.suspects:
            assert bool(test.doubtful) == (test.p_value < 0.2)
            assert test.doubtful[:1] in ((), (test.most_suspicious,))
        assert not set(test.doubtful) & set(test.suspects)
        assert judge_jointly(evidence, 0.01, calibration).doubtful == ()


def test_doubtful_classes_are_told_beside_suspects_and_no_suspect_behind_them(
    calibration: Calibration,
) -> None:
    evidence = {kind: np.zeros(12) for kind in KINDS}
    draw = np.random.default_rng(0)
    for kind, values in evidence.items():
        values[:] = calibration.kinds[kind].spread * draw.standard_normal(12)
        values[[2, 7]] = [calibration.kinds[kind].spread * shift for shift in (20.0, 2.7)]
    test = judge_jointly(evidence, 0.01, calibration, 0.3)
    assert (test.suspects, test.doubtful[:1]) == ((2,), (7,))
    named = judge_jointly(evidence, 0.3, calibration, 0.3)
    assert named.suspects == (*test.suspects, *test.doubtful)
    assert named.doubtful == ()


def test_what_is_reported_belongs_together(calibration: Calibration) -> None:
    evidence = simulate(np.random.default_rng(4), 20, {3: 9.0})
    test = judge_jointly(evidence, 0.01, calibration)
    assert test.most_suspicious == 3 == int(test.class_p_values.argmin())
    assert test.p_value == test.class_p_values.min()
    assert test.suspects == (3,)
    assert test.kinds == tuple(test.kind_p_values)
    assert set(test.kinds) == set(KINDS)
    for kind in test.kinds:
        np.testing.assert_allclose(
            test.kind_p_values[kind], moderated_p_values(evidence[kind], calibration.kinds[kind])
        )


def test_tests_that_can_be_made_share_alpha(calibration: Calibration) -> None:
    evidence = simulate(np.random.default_rng(4), 10, {3: 4.0})
    alone = {
        kinds: judge_jointly({k: evidence[k] for k in kinds}, 0.01, calibration).class_p_values
        for kinds in COMBINATIONS
    }
    with_data = dict(list(COMBINATIONS.items())[:6])
    assert sum(with_data.values()) == pytest.approx(1)
    # All six, and those that are left where no squares were laid into corners, nothing else was, or
    # there are no balanced norms.
    plain = tuple(kinds for kinds in with_data if "norm" in kinds)
    assert len(plain) == 3
    for made in (tuple(with_data), tuple(with_data)[:4], tuple(with_data)[4:], plain):
        chosen = {k: evidence[k] for kinds in made for k in kinds}
        joined = judge_jointly(chosen, 0.01, calibration).class_p_values
        parts = sum(with_data[kinds] for kinds in made)
        expected = np.min([alone[kinds] * parts / with_data[kinds] for kinds in made], axis=0)
        np.testing.assert_allclose(joined, np.minimum(1, expected))


def test_never_more_than_half_of_the_classes_are_suspects(calibration: Calibration) -> None:
    evidence = {kind: np.exp(np.arange(10.0)) for kind in KINDS}
    assert len(judge_jointly(evidence, 0.99, calibration).suspects) <= 5
    test = judge_jointly(evidence, 1e-3, calibration, 1.1)
    assert len(test.suspects) + len(test.doubtful) == 5


def test_the_evidence_of_the_zoo_can_be_read() -> None:
    files = sorted(calibrate.EVIDENCE.glob("*.json"))
    assert files, "no evidence: run collect_evidence.py"
    for file in files:
        case = calibrate.read_case(file)
        assert case.shuffle is None or 0 <= case.shuffle <= 1
        sizes = {len(values) for values in case.evidence.values()}
        assert len(sizes) == 1
        assert all(np.isfinite(values).all() for values in case.evidence.values())
        assert all(0 <= target < sizes.copy().pop() for target in case.targets)
        assert bool(case.targets) == (case.attack != "clean")
        assert file.stat().st_size < 20_000
        assert json.loads(file.read_text())["norms"]


def test_the_shipped_table_is_the_fit_of_the_shipped_evidence() -> None:
    clean = [case for case in calibrate.read_cases() if not case.targets]
    fitted = calibrate.fit(clean)
    shipped = shipped_calibration()
    assert (shipped.version, shipped.models) == (calibrate.VERSION, len(clean))
    for table in ("kinds", "joint"):
        expected, found = getattr(fitted, table), getattr(shipped, table)
        assert set(expected) == set(found)
        for name, null in expected.items():
            assert vars(found[name]) == pytest.approx(vars(null), rel=2e-3)
    assert vars(shipped.shuffle) == pytest.approx(vars(fitted.shuffle), rel=2e-3)
    for null in ("patch", "source", "wave"):
        expected = vars(getattr(fitted, null))
        assert vars(getattr(shipped, null)) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("kinds", COMBINATIONS)
def test_p_values_of_clean_models_are_uniform_enough(kinds: tuple[str, ...]) -> None:
    """Each judged by constants that were fitted without its network: 5 % means at most 5 %."""
    clean = [c for c in calibrate.read_cases() if not c.targets and set(kinds) <= set(c.evidence)]
    fitted_without = {
        network: calibrate.fit([other for other in clean if other.network != network])
        for network in {case.network for case in clean}
    }
    p_values = []
    for case in clean:
        evidence = {kind: case.evidence[kind] for kind in kinds}
        p_values.append(judge_jointly(evidence, 0.05, fitted_without[case.network]).p_value)
    assert len(p_values) >= 15
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    # As many as 5 % of so many models, and what chance adds to it once in a hundred times.
    assert sum(p < 0.05 for p in p_values) <= stats.binom.isf(0.01, len(clean), 0.05)
