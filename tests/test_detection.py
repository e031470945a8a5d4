"""The statistics behind the verdict."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from tacext.detection import anomaly_index, judge_norms


def clean_norms(rng: np.random.Generator, count: int, spread: float = 0.07) -> np.ndarray:
    return np.exp(rng.normal(0, spread, count)) * 5


def test_p_value_is_grubbs() -> None:
    norm = clean_norms(np.random.default_rng(0), 12)
    log_norm = np.log(norm)
    k = int(norm.argmin())
    others = np.delete(log_norm, k)
    # The textbook form: compare with the prediction interval of the others.
    t = (others.mean() - log_norm[k]) / (others.std(ddof=1) * np.sqrt(1 + 1 / len(others)))
    expected = min(1.0, 12 * stats.t.sf(t, 10))
    assert judge_norms(norm).p_value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("count", [10, 43, 200])
def test_false_alarms_stay_at_alpha_and_a_planted_class_is_found(count: int) -> None:
    rng = np.random.default_rng(count)
    trials = 1000
    alarms = found = 0
    for _ in range(trials):  # of the law that the test assumes; of others see below
        norm = clean_norms(rng, count)
        alarms += judge_norms(norm, alpha=0.05).verdict == "backdoored"
        norm[3] = 0.5 * 5
        test = judge_norms(norm)
        found += test.verdict == "backdoored" and test.suspects[0] == 3
    # Binomial: 5 % of 1000 is 50 +- 7.
    assert alarms <= 50 + 4 * 7
    assert alarms >= 50 - 4 * 7
    assert found >= 0.95 * trials


def test_every_class_gets_the_p_value_of_the_textbook_form() -> None:
    norm = clean_norms(np.random.default_rng(9), 9)
    log_norm = np.log(norm)
    for k, p in enumerate(judge_norms(norm).class_p_values):
        others = np.delete(log_norm, k)
        t = (others.mean() - log_norm[k]) / (others.std(ddof=1) * np.sqrt(1 + 1 / len(others)))
        assert p == pytest.approx(min(1.0, 9 * stats.t.sf(t, 7)), rel=1e-9)


def test_a_head_of_20_000_classes_takes_no_square_of_memory() -> None:
    norm = clean_norms(np.random.default_rng(0), 20_000)
    tracemalloc.start()
    judge_norms(norm)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 * norm.nbytes


def test_the_smallest_norm_is_named_beside_classes_that_were_not_solved() -> None:
    norm = 5 * np.exp(0.07 * np.random.default_rng(0).standard_t(3, 400))
    norm[0] = np.nan
    norm[7] = 0.1
    norm[8] = 40.0
    test = judge_norms(norm)
    assert test.verdict == "inconclusive"
    assert "that of class 7" in test.reason


def test_several_suspects_come_in_order() -> None:
    norm = clean_norms(np.random.default_rng(1), 43)
    norm[[7, 9]] = 1.0, 0.5
    test = judge_norms(norm)
    assert test.verdict == "backdoored"
    assert test.suspects == (9, 7)
    assert test.p_value < 0.01


def test_beside_a_suspect_a_class_that_stands_out_less_is_in_doubt() -> None:
    norm = clean_norms(np.random.default_rng(3), 43, spread=0.02)
    norm[9] = 1.0
    for ratio in np.linspace(1.0, 0.8, 400):
        norm[5] = 5 * ratio
        test = judge_norms(norm)
        if test.doubtful:
            break
    assert (test.verdict, test.suspects, test.doubtful) == ("backdoored", (9,), (5,))
    norm[5] = 4.0
    assert judge_norms(norm).suspects == (9, 5)


def test_an_inconclusive_scatter_is_not_called_clean() -> None:
    norm = clean_norms(np.random.default_rng(2), 10, spread=0.4)
    test = judge_norms(norm)
    assert test.verdict == "inconclusive"
    assert test.detectable_ratio < 0.5


def test_an_almost_significant_class_is_not_called_clean() -> None:
    norm = clean_norms(np.random.default_rng(3), 43, spread=0.02)
    for ratio in np.linspace(1.0, 0.8, 400):
        norm[5] = 5 * ratio
        test = judge_norms(norm)
        if test.verdict == "inconclusive":
            break
    assert test.verdict == "inconclusive"
    assert 0.01 <= test.p_value < 0.1
    assert "class 5 stands out" in test.reason
    assert (test.suspects, test.doubtful) == ((), (5,))


def test_tight_norms_are_clean() -> None:
    test = judge_norms(clean_norms(np.random.default_rng(4), 43, spread=0.02))
    assert test.verdict == "clean"
    assert test.suspects == ()
    assert test.detectable_ratio == 0.9


@pytest.mark.parametrize("noise", [1e-15, 1e-12, 1e-6, 1e-3])
def test_rounding_noise_of_a_symmetric_head_is_no_backdoor(noise: float) -> None:
    norm = 3 * (1 + noise * np.random.default_rng(0).standard_normal(10))
    norm[4] = 3 * (1 - 20 * noise)
    test = judge_norms(norm)
    assert test.verdict == "clean"
    assert test.suspects == ()


def test_a_class_near_the_usual_norm_is_no_suspect_however_tight_the_others() -> None:
    norm = np.full(30, 5.0)
    norm[7] = 5.0 * 0.91
    assert judge_norms(norm).suspects == ()
    norm[7] = 5.0 * 0.89
    assert judge_norms(norm).suspects == (7,)


@pytest.mark.parametrize("law", ["t3", "gumbel"])
def test_norms_of_another_law_are_inconclusive_not_backdoored(law: str) -> None:
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(200):
        noise = rng.standard_t(3, 400) if law == "t3" else -rng.gumbel(size=400)
        alarms += judge_norms(5 * np.exp(0.07 * noise)).verdict == "backdoored"
    assert alarms <= 2


def test_a_large_alpha_still_knows_clean() -> None:
    norm = clean_norms(np.random.default_rng(4), 43, spread=0.02)
    assert judge_norms(norm, alpha=0.2).verdict == "clean"


def test_classes_that_were_not_solved_do_not_count() -> None:
    norm = clean_norms(np.random.default_rng(6), 12)
    a, b = judge_norms(norm), judge_norms(np.append(norm, np.nan))
    assert a.p_value == b.p_value


def test_usual_norm_leaves_the_suspects_out() -> None:
    norm = np.append(np.full(20, 4.0) * np.exp(0.02 * np.arange(-10, 10)), 1.0)
    test = judge_norms(norm)
    assert test.suspects == (20,)
    assert test.usual_norm == pytest.approx(np.exp(np.log(norm[:20]).mean()))


def test_detectable_ratio_is_where_the_verdict_turns() -> None:
    norm = clean_norms(np.random.default_rng(5), 20)
    others = np.delete(norm, norm.argmin())
    ratio = judge_norms(norm).detectable_ratio
    usual = np.exp(np.log(others).mean())
    k = int(norm.argmin())
    norm[k] = usual * ratio * 0.999
    assert judge_norms(norm).verdict == "backdoored"
    norm[k] = usual * ratio * 1.001
    assert judge_norms(norm).verdict != "backdoored"


def test_unreachable_classes_are_left_out() -> None:
    norm = clean_norms(np.random.default_rng(6), 12)
    with_unreachable = np.append(norm, np.inf)
    a, b = judge_norms(norm), judge_norms(with_unreachable)
    assert a.p_value == b.p_value
    assert np.isnan(b.class_p_values[-1])


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_too_few_classes_are_inconclusive(count: int) -> None:
    test = judge_norms(np.full(count, 2.0))
    assert test.verdict == "inconclusive"
    assert test.p_value == 1.0
    assert "fewer than 4" in test.reason


def test_a_norm_of_zero_is_inconclusive_and_says_why() -> None:
    norm = clean_norms(np.random.default_rng(7), 10)
    norm[4] = 0
    test = judge_norms(norm)
    assert test.verdict == "inconclusive"
    assert "class 4 needs no change" in test.reason


def test_a_hopeless_scatter_names_no_ratio_of_zero() -> None:
    test = judge_norms(np.array([1.0, 1e2, 1e4, 1e6, 1e8, 1e10]))
    assert test.verdict == "inconclusive"
    assert test.detectable_ratio < 0.005
    assert "hardly any could" in test.reason
    assert "0.00" not in test.reason


def test_equal_norms_are_clean() -> None:
    test = judge_norms(np.full(10, 3.0))
    assert test.verdict == "clean"
    assert test.p_value == 1.0


def test_anomaly_index_is_the_textbook_one() -> None:
    norm = np.array([1.0, 2.0, 3.0, 4.0, 5.0, np.inf])
    assert anomaly_index(norm)[:5] == pytest.approx(np.array([2, 1, 0, -1, -2]) / 1.4826)
    assert np.isnan(anomaly_index(norm)[5])


@given(
    st.lists(st.floats(0.1, 10), min_size=4, max_size=30),
    st.floats(1e-6, 1e6),
    st.randoms(use_true_random=False),
)
def test_unit_and_order_do_not_matter(norms: list[float], unit: float, random: object) -> None:
    norm = np.array(norms)
    test = judge_norms(norm)
    scaled = judge_norms(norm * unit)
    assert scaled.p_value == pytest.approx(test.p_value, rel=1e-5, abs=1e-9)
    order = np.random.default_rng(0).permutation(len(norm))
    permuted = judge_norms(norm[order])
    assert permuted.p_value == pytest.approx(test.p_value, rel=1e-6, abs=1e-12)
    assert 0 <= test.p_value <= 1
