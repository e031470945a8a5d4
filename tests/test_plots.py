"""Plots of a scan: what is drawn, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from digits import digit_case, scan_of
from tacext import InputError, scan
from tacext.detection import judge_norms
from tacext.plots import plot_norms

PNG = b"\x89PNG"


def test_the_band_is_where_clean_norms_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bands: list[tuple[float, float]] = []
    drawn = Axes.axhspan

    def axhspan(axes: Axes, low: float, high: float, **how: object) -> object:
        bands.append((low, high))
        return drawn(axes, low, high, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(Axes, "axhspan", axhspan)
    report = scan(digit_case().backdoored, digit_case().data.defender, depth="fast")
    plot_norms(report, tmp_path / "norms.png")
    assert (tmp_path / "norms.png").read_bytes().startswith(PNG)
    ((low, high),) = bands
    norm = report.norm.numpy()
    assert report.suspects == tuple(np.flatnonzero(norm < low))
    assert high > norm.max()
    assert math.sqrt(low * high) == pytest.approx(report.test.usual_norm)


def test_a_thorough_scan_shows_its_evidence_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels: list[object] = []
    drawn = Axes.bar

    def bar(axes: Axes, *values: object, **how: object) -> object:
        labels.append(how.get("label"))
        return drawn(axes, *values, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(Axes, "bar", bar)
    report = scan_of("clean")
    plot_norms(report, tmp_path / "norms.png", class_names=["$x"] * 10)
    assert labels == [None, "norm", "balanced", "reach"]
    assert report.evidence is not None
    assert report.evidence.look is not None
    joint = report.evidence.joint
    shares = {kind: np.linspace(0, 1, 10) for kind in ("share", "patch")}
    joint = replace(joint, kind_p_values={**joint.kind_p_values, **shares})
    with_patch = replace(report, evidence=replace(report.evidence, joint=joint))
    labels.clear()
    plot_norms(with_patch, tmp_path / "norms.png")
    assert labels == [None, "norm", "balanced", "reach", "share", "patch"]


def test_without_a_test_there_is_no_band() -> None:
    assert all(map(math.isnan, judge_norms(np.array([1.0, 2.0, 3.0])).null_band))
    low, high = judge_norms(np.array([1.0, 1.1, 0.9, 1.0, 1.05])).null_band
    assert 0 < low < 1 < high


def test_a_scan_without_data_has_no_norms_to_plot(tmp_path: Path) -> None:
    report = scan(digit_case().clean, None, input_shape=(1, 8, 8))
    with pytest.raises(InputError, match="report: expected that of a scan with data"):
        plot_norms(report, tmp_path / "norms.png")
    assert not (tmp_path / "norms.png").exists()
