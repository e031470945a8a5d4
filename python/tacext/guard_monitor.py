"""Is a guard still telling the truth? Counts of what it said, for one worker or many."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import scipy  # its parts load when they are first used
import torch
from torch import Tensor

from .errors import InputError
from .guard_metrics import families, text_of
from .guard_scoring import GuardOutput

BINS = 20
_FIELDS = ("false_positive_rate", "samples", "inputs", "flagged", "not_finite", "histogram")


class GuardMonitor:
    """Counts inputs, flags and p-values; shares its counts with others, and with Prometheus.

    On inputs like those of the calibration the p-values are even between 0 and 1. Many more small
    ones than that mean triggers, or inputs that the guard was not calibrated for; its flags then do
    not keep the promised rate. Methods may be called by several threads.

    Args:
        false_positive_rate: what the guard promises (`guard.info.false_positive_rate`).
        samples: behind its p-values (`guard.info.samples`).
    """

    def __init__(self, false_positive_rate: float, samples: int) -> None:
        ok = isinstance(false_positive_rate, float) and 0 < false_positive_rate < 1
        if not ok or not isinstance(samples, int) or samples < 1:
            raise InputError.of(
                "GuardMonitor",
                "false_positive_rate, samples",
                expected="a rate between 0 and 1 and the number of calibration samples",
                got=f"{false_positive_rate!r}, {samples!r}",
                way_out="pass guard.info.false_positive_rate and guard.info.samples",
            )
        if _allowed(false_positive_rate, samples) < 1:
            raise InputError.of(
                "GuardMonitor",
                "false_positive_rate",
                expected=f"at least {1 / (samples + 1):.4g}, with {samples} calibration samples",
                got=f"{false_positive_rate:g}",
                way_out="pass those of one guard",
            )
        self.false_positive_rate = false_positive_rate
        self.samples = samples
        self.inputs = self.flagged = self.not_finite = 0
        self.histogram = [0] * BINS
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return (
            f"GuardMonitor({self.flagged} of {self.inputs} inputs flagged, promised "
            f"{self.false_positive_rate:g} from {self.samples} samples)"
        )

    def update(self, output: GuardOutput) -> None:
        """Counts a batch."""
        flagged = int(output.flagged.sum())
        not_finite = int(torch.isinf(output.score).sum())
        counts = _binned(output.p_value.detach().cpu())
        with self._lock:
            self.inputs += len(output.score)
            self.flagged += flagged
            self.not_finite += not_finite
            self.histogram = [a + b for a, b in zip(self.histogram, counts, strict=True)]

    def merge(self, other: GuardMonitor) -> None:
        """Adds what another worker counted, of the same guard.

        Raises:
            InputError: another promise or calibration.
        """
        if (other.false_positive_rate, other.samples) != (self.false_positive_rate, self.samples):
            raise InputError.of(
                "GuardMonitor.merge",
                "other",
                expected=f"counts at rate {self.false_positive_rate} from {self.samples} samples",
                got=f"{other.false_positive_rate} from {other.samples}",
                way_out="merge the monitors of one guard only",
            )
        told = other.to_dict()
        with self._lock:
            self.inputs += told["inputs"]
            self.flagged += told["flagged"]
            self.not_finite += told["not_finite"]
            self.histogram = [a + b for a, b in zip(self.histogram, told["histogram"], strict=True)]

    @property
    def flagged_share(self) -> float:
        """Of all inputs; NaN before the first."""
        return self.flagged / self.inputs if self.inputs else math.nan

    @property
    def excess_p_value(self) -> float:
        """How likely clean inputs get so many flags, or more; 1 before the first input.

        Beta-binomial: the rate of one guard differs from the promise by the chance of its own
        calibration. It holds for one look at the counts; who looks again and again will see more
        alarms.
        """
        told = self.to_dict()
        allowed = _allowed(self.false_positive_rate, self.samples)
        null = allowed, self.samples + 1 - allowed
        return _upper_tail(told["flagged"], told["inputs"], *null)

    @property
    def drift_p_value(self) -> float:
        """How likely clean inputs have p-values so uneven, or more; 1 before the first input.

        The largest distance of their distribution function from a straight line, at the edges of the
        histogram, as in the two-sample test of Kolmogorov and Smirnov; only small p-values count, as
        a guard of few samples is careful.
        """
        told = self.to_dict()
        inputs = told["inputs"]
        if not inputs:
            return 1.0
        below, largest = 0, 0.0
        for i, count in enumerate(told["histogram"]):
            below += count
            largest = max(largest, below / inputs - (i + 1) / BINS)
        effective = inputs * self.samples / (inputs + self.samples)
        return float(min(1.0, math.exp(-2 * effective * largest**2)))

    def to_dict(self) -> dict[str, Any]:
        """The counts as plain numbers, for JSON and for other processes."""
        with self._lock:
            told = {name: getattr(self, name) for name in _FIELDS}
            return told | {"histogram": list(self.histogram)}

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> GuardMonitor:
        """What `to_dict` gave.

        Raises:
            InputError: something else.
        """
        try:
            monitor = cls(float(told["false_positive_rate"]), int(told["samples"]))
            for name in ("inputs", "flagged", "not_finite"):
                setattr(monitor, name, int(told[name]))
            monitor.histogram = [int(count) for count in told["histogram"]]
            counts = [*monitor.histogram, monitor.flagged, monitor.not_finite]
            good = len(monitor.histogram) == BINS and min(counts) >= 0
            good = good and sum(monitor.histogram) == monitor.inputs >= max(counts)
        except (KeyError, TypeError, ValueError, OverflowError):
            good = False
        if not good:
            raise InputError.of(
                "GuardMonitor.from_dict",
                "told",
                expected="what GuardMonitor.to_dict gave",
                got="something else",
                way_out="pass it on unchanged",
            )
        return monitor

    # ---- Prometheus ------------------------------------------------------------------------------

    def collect(self) -> Iterator[Any]:
        """The metrics, as a collector of prometheus_client: `REGISTRY.register(monitor)`.

        One registry takes one monitor; of several make `GuardMonitors`.

        Raises:
            DependencyError: prometheus_client is not installed.
        """
        yield from families({(): self.to_dict()}, (), "GuardMonitor.collect")

    def to_prometheus(self) -> str:
        """The metrics in the text format of Prometheus.

        Raises:
            DependencyError: prometheus_client is not installed.
        """
        return text_of(self.collect())


def _allowed(rate: float, samples: int) -> int:
    """How many of the calibration samples and a new one may be flagged together."""
    return math.floor(rate * (samples + 1) * (1 + 1e-12))


def _upper_tail(flagged: int, inputs: int, a: int, b: int) -> float:
    """P(X >= flagged) for X beta-binomial of so many inputs: accurate far out, and fast for many."""
    if not flagged:
        return 1.0
    if inputs > 1_000_000 and inputs > 1000 * (a + b):  # the binomial part no longer matters
        return float(scipy.stats.beta(a, b).sf(flagged / inputs))
    # Terms fall from the mean outwards: the shorter side, until they no longer count.
    up = flagged > inputs * a / (a + b)
    at, step, total = (flagged, 1, 0.0) if up else (flagged - 1, -1, 0.0)
    while 0 <= at <= inputs:
        terms = np.arange(at, max(-1, min(inputs + 1, at + step * 4096)), step)
        added = float(np.exp(scipy.stats.betabinom(inputs, a, b).logpmf(terms)).sum())
        total, at = total + added, at + step * 4096
        if added <= 1e-17 * total:
            break
    return min(1.0, total if up else 1 - total)


def _binned(p_value: Tensor) -> list[int]:
    """Counts in (0, 1/20], (1/20, 2/20], ..."""
    # A float32 of 0.05 is a little more than that.
    bins = (p_value.double() * BINS - 1e-5).ceil().long().clamp(1, BINS) - 1
    return torch.bincount(bins, minlength=BINS).tolist()
