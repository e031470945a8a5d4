"""Monitors of guards: honest about clean traffic, awake to triggers, mergeable, readable."""

from __future__ import annotations

import json
import math
import sys
import threading
from typing import Any

import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from digits import digit_case
from tacext import (
    DependencyError,
    Guard,
    GuardMonitor,
    GuardMonitors,
    GuardOutput,
    InputError,
    demo,
)
from tacext.guard_monitor import BINS


def said(p_values: list[float], rate: float = 0.05) -> GuardOutput:
    p_value = torch.tensor(p_values, dtype=torch.float32)
    return GuardOutput(torch.zeros(len(p_values), 2), 1 / p_value, p_value, p_value <= rate)


def test_clean_traffic_is_no_news_and_triggers_are() -> None:
    case = digit_case()
    guard = Guard.fit(case.backdoored, case.data.defender, 0.05)
    images = case.data.test[0]
    monitor = GuardMonitor(guard.info.false_positive_rate, guard.info.samples)
    with torch.no_grad():
        for batch in images.split(64):
            monitor.update(guard(batch))
        assert monitor.inputs == len(images)
        assert monitor.flagged == int(guard(images).flagged.sum())
        assert monitor.excess_p_value > 0.01
        assert monitor.drift_p_value > 0.01
        monitor.update(guard(demo.white_corner(images[:80].clone())))
    assert monitor.excess_p_value < 1e-3
    assert monitor.drift_p_value < 0.05


def test_false_alarms_about_clean_traffic_are_as_rare_as_they_say() -> None:
    """Exchangeable scores: a calibration and traffic, drawn together, many times."""
    samples, inputs, rate, alarms, drifts, trials = 200, 1000, 0.05, 0, 0, 400
    generator = torch.Generator().manual_seed(0)
    for _ in range(trials):
        calibration = torch.rand(samples, generator=generator).sort().values
        traffic = torch.rand(inputs, generator=generator)
        above = samples - torch.searchsorted(calibration, traffic)
        monitor = GuardMonitor(rate, samples)
        monitor.update(said(((1 + above) / (1 + samples)).tolist(), rate))
        alarms += monitor.excess_p_value <= 0.05
        drifts += monitor.drift_p_value <= 0.05
    allowed = 0.05 * trials + 3 * math.sqrt(0.05 * 0.95 * trials)
    assert alarms <= allowed
    assert drifts <= allowed
    assert alarms >= 0.02 * trials  # and the test is not asleep


@given(st.lists(st.floats(1e-6, 1), max_size=60), st.integers(0, 60))
def test_merging_is_counting_together(p_values: list[float], cut: int) -> None:
    whole, left, right = (GuardMonitor(0.05, 99) for _ in range(3))
    whole.update(said(p_values))
    left.update(said(p_values[:cut]))
    right.update(said(p_values[cut:]))
    left.merge(GuardMonitor.from_dict(json.loads(json.dumps(right.to_dict()))))
    assert left.to_dict() == whole.to_dict()
    assert sum(whole.histogram) == len(p_values)
    assert 0 <= whole.excess_p_value <= 1
    assert 0 <= whole.drift_p_value <= 1


@given(st.integers(1, 3000), st.floats(0, 1), st.integers(20, 500))
def test_the_tail_is_that_of_the_beta_binomial(inputs: int, share: float, samples: int) -> None:
    monitor = GuardMonitor(0.05, samples)
    monitor.inputs, monitor.flagged = inputs, int(share * inputs)
    allowed = math.floor(0.05 * (samples + 1))
    null = scipy.stats.betabinom(inputs, allowed, samples + 1 - allowed)
    expected = math.fsum(null.pmf(range(monitor.flagged, inputs + 1)))
    assert monitor.excess_p_value == pytest.approx(expected, rel=1e-6, abs=1e-14)


def test_many_inputs_are_judged_in_no_time() -> None:
    monitor = GuardMonitor(0.01, 2500)
    last = 1.0
    for flagged in (9_000_000, 10_500_000, 12_000_000, 15_000_000, 20_000_000):
        monitor.inputs, monitor.flagged = 1_000_000_000, flagged
        assert 0 < monitor.excess_p_value < last
        last = monitor.excess_p_value
    assert last < 1e-4


def test_threads_lose_no_counts() -> None:
    monitor = GuardMonitor(0.05, 99)

    def work() -> None:
        for _ in range(200):
            monitor.update(said([0.01, 0.5, 1.0]))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (monitor.inputs, monitor.flagged, sum(monitor.histogram)) == (3600, 1200, 3600)


def test_prometheus_reads_it() -> None:
    monitor = GuardMonitor(0.05, 99)
    monitor.update(said([0.01, 0.04, 0.05, 0.5, 1.0]))
    monitor.update(
        GuardOutput(
            torch.zeros(1, 2), torch.tensor([math.inf]), torch.tensor([0.01]), torch.tensor([True])
        )
    )
    families = {f.name: f for f in text_string_to_metric_families(monitor.to_prometheus())}
    values = {
        s.name + str(s.labels.get("le", "")): s.value for f in families.values() for s in f.samples
    }
    assert values["tacext_guard_inputs_total"] == 6
    assert values["tacext_guard_flagged_total"] == 4
    assert values["tacext_guard_not_finite_total"] == 1
    assert values["tacext_guard_promised_rate"] == 0.05
    assert values["tacext_guard_p_value_bucket0.05"] == 4
    assert values["tacext_guard_p_value_bucket0.5"] == 5
    assert values["tacext_guard_p_value_bucket+Inf"] == 6
    assert families["tacext_guard_p_value"].type == "histogram"
    registry = CollectorRegistry()
    registry.register(monitor)  # type: ignore[arg-type]
    assert registry.get_sample_value("tacext_guard_inputs_total") == 6


def test_several_models_share_a_registry() -> None:
    monitors = GuardMonitors()
    for name, p_values in (("signs", [0.01, 0.5]), ("digits", [0.5, 0.6, 0.7])):
        monitors[name] = GuardMonitor(0.05, 99)
        monitors[name].update(said(p_values))
    registry = CollectorRegistry()
    registry.register(monitors)  # type: ignore[arg-type]
    told = registry.get_sample_value
    assert told("tacext_guard_inputs_total", {"model": "digits"}) == 3
    assert told("tacext_guard_flagged_total", {"model": "signs"}) == 1
    assert told("tacext_guard_p_value_bucket", {"model": "signs", "le": "0.05"}) == 1
    assert told("tacext_guard_promised_rate", {"model": "signs"}) == 0.05
    del monitors["digits"]
    assert told("tacext_guard_inputs_total", {"model": "digits"}) is None
    families = list(text_string_to_metric_families(monitors.to_prometheus()))
    assert {s.labels["model"] for f in families for s in f.samples} == {"signs"}
    for name, monitor in ((3, GuardMonitor(0.05, 99)), ("x", None)):
        with pytest.raises(InputError, match="expected the name of a model"):
            monitors[name] = monitor  # type: ignore[index,assignment]


def test_without_prometheus_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("prometheus_client", "prometheus_client.core"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DependencyError, match="pip install prometheus-client"):
        GuardMonitor(0.05, 99).to_prometheus()


def test_nothing_counted_is_nothing_to_worry_about() -> None:
    monitor = GuardMonitor(0.05, 99)
    assert math.isnan(monitor.flagged_share)
    assert monitor.excess_p_value == monitor.drift_p_value == 1


def test_bad_input_is_named() -> None:
    wrong: Any
    for wrong in ((0.0, 9), (1.0, 9), ("a", 9), (0.1, 0), (0.1, 2.5)):
        with pytest.raises(InputError, match="GuardMonitor: false_positive_rate, samples"):
            GuardMonitor(*wrong)
    with pytest.raises(InputError, match=r"false_positive_rate: expected at least 0\.01, with 99"):
        GuardMonitor(0.001, 99)
    with pytest.raises(InputError, match=r"GuardMonitor.merge: other"):
        GuardMonitor(0.05, 99).merge(GuardMonitor(0.05, 98))
    good = GuardMonitor(0.05, 99).to_dict()
    for broken in (
        {}, good | {"inputs": 5}, good | {"histogram": [0] * (BINS - 1)}, good | {"histogram": 3},
        good | {"flagged": -1}, good | {"inputs": math.inf}, good | {"samples": "x"},
    ):  # fmt: skip
        with pytest.raises(InputError, match=r"GuardMonitor.from_dict: told"):
            GuardMonitor.from_dict(broken)
