"""What guards said, as metrics of Prometheus: of one monitor, or of one for every model of a server."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .errors import DependencyError, InputError

if TYPE_CHECKING:
    from .guard_monitor import GuardMonitor

_PREFIX = "tacext_guard"
_COUNTS = {
    "inputs": "Inputs that the guard has judged.",
    "flagged": "Inputs that it has flagged.",
    "not_finite": "Inputs whose latents or logits were not finite; flagged, too.",
}


class GuardMonitors(dict[str, "GuardMonitor"]):
    """The monitors of several models by name, in one registry: `REGISTRY.register(monitors)`.

    Every metric has the name as its label `model`. Monitors may come and go at any time.
    """

    # By identity, as registries keep their collectors in a dict.
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __setitem__(self, name: str, monitor: GuardMonitor) -> None:
        if not isinstance(name, str) or not name or not hasattr(monitor, "histogram"):
            raise InputError.of(
                "GuardMonitors",
                "name, monitor",
                expected="the name of a model, and its GuardMonitor",
                got=f"{name!r}, {type(monitor).__name__}",
                way_out="pass monitors[name] = tacext.GuardMonitor(...)",
            )
        super().__setitem__(name, monitor)

    def collect(self) -> Iterator[Any]:
        """The metrics, as a collector of prometheus_client.

        Raises:
            DependencyError: prometheus_client is not installed.
        """
        told: dict[tuple[str, ...], dict[str, Any]] = {
            (name,): monitor.to_dict() for name, monitor in sorted(self.items())
        }
        yield from families(told, ("model",), "GuardMonitors.collect")

    def to_prometheus(self) -> str:
        """The metrics in the text format of Prometheus.

        Raises:
            DependencyError: prometheus_client is not installed.
        """
        return text_of(self.collect())


def families(
    told: Mapping[tuple[str, ...], Mapping[str, Any]], labels: tuple[str, ...], operation: str
) -> list[Any]:
    """Metric families of what monitors told (`GuardMonitor.to_dict`), by the values of the labels.

    Raises:
        DependencyError: prometheus_client is not installed.
    """
    try:
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )
    except ImportError as error:
        raise DependencyError.of(
            operation,
            "prometheus_client",
            expected="the package to be installed",
            got="none",
            way_out="pip install prometheus-client",
        ) from error
    found = []
    for name, text in _COUNTS.items():
        counter = CounterMetricFamily(f"{_PREFIX}_{name}", text, labels=labels)
        for values, counts in told.items():
            counter.add_metric(values, counts[name])
        found.append(counter)
    rate = GaugeMetricFamily(
        f"{_PREFIX}_promised_rate", "Share of clean inputs that the guard may flag.", labels=labels
    )
    p_value = HistogramMetricFamily(
        f"{_PREFIX}_p_value", "p-values of the inputs; even for clean ones.", labels=labels
    )
    for values, counts in told.items():
        rate.add_metric(values, counts["false_positive_rate"])
        p_value.add_metric(values, _buckets(counts["histogram"]), sum_value=None)
    return [*found, rate, p_value]


def _buckets(histogram: list[int]) -> list[tuple[str, float]]:
    """How many lie at or below each edge."""
    found, below = [], 0
    for i, count in enumerate(histogram):
        below += count
        edge = "+Inf" if i + 1 == len(histogram) else f"{(i + 1) / len(histogram):g}"
        found.append((edge, float(below)))
    return found


def text_of(collected: Iterator[Any]) -> str:
    """Metric families in the text format of Prometheus."""
    metrics = list(collected)  # first, for its error
    from prometheus_client import CollectorRegistry, generate_latest

    class Collected:
        def collect(self) -> list[Any]:
            return metrics

    registry = CollectorRegistry()
    registry.register(Collected())
    text: bytes = generate_latest(registry)
    return text.decode()
