"""Plots of a scan, with matplotlib (the optional dependency `plot`)."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .errors import DependencyError, InputError, printable
from .files import StrPath, write_bytes_atomically
from .joint_test import SMALLEST_P
from .scan_report import ScanReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_USUAL, _DOUBTFUL, _SUSPECT = "#4878a8", "#d8a030", "#c03028"


def require_matplotlib(operation: str) -> None:
    """Raises DependencyError unless matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise DependencyError.of(
            operation,
            "plot",
            expected="matplotlib to be installed",
            got="none",
            way_out="run pip install matplotlib",
        ) from error


def plot_norms(
    report: ScanReport,
    path: StrPath,
    *,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    operation: str = "plot_norms",
) -> None:
    """Writes a PNG of the norm of every class with the band that clean ones lie in.

    Suspects are red, classes in doubt yellow, unreachable classes left out. Below the norms of a thorough scan lies how
    suspicious each kind of evidence finds each class.

    Raises:
        InputError: the scan had no data: its norms are those of synthetic inputs.
        DependencyError: matplotlib is not installed.
        FileError: the file cannot be written.
    """
    if not report.samples:
        raise InputError.of(
            operation,
            "report",
            expected="that of a scan with data",
            got="one without",
            way_out="scan with clean samples",
        )
    require_matplotlib(operation)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    evidence = {} if report.evidence is None else report.evidence.joint.kind_p_values
    rows = 2 if evidence else 1
    width = max(6.0, min(16.0, 0.35 * report.num_classes))
    figure = Figure(figsize=(width, 3.6 if rows == 1 else 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(
        rows, 1, sharex=True, squeeze=False, height_ratios=[2.0, 1.2][:rows]
    ).flatten()
    _draw_norms(panels[0], report)
    if evidence:
        _draw_evidence(panels[1], evidence)
    share = "" if report.quantile == 1 else f", quantile {report.quantile:g}"
    panels[0].set_title(title or f"{report.verdict} (p = {report.p_value:.2g}{share})")
    panels[-1].set_xlabel("class")
    if report.num_classes <= 50:
        classes = np.arange(report.num_classes)
        panels[-1].set_xticks(classes)
        if class_names is not None:
            names = [printable(class_names[k]) for k in classes.tolist()]
            for label in panels[-1].set_xticklabels(names, rotation=90):
                label.set_parse_math(False)  # a name may hold a dollar sign
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes_atomically(path, buffer.getvalue(), operation=operation, argument="plot")


def _draw_norms(axes: Axes, report: ScanReport) -> None:
    norm = report.norm.cpu().numpy()
    classes = np.flatnonzero(np.isfinite(norm))
    colours = [
        _SUSPECT if k in report.suspects else _DOUBTFUL if k in report.doubtful else _USUAL
        for k in classes
    ]
    axes.bar(classes, norm[classes], color=colours, width=0.8)
    low, high = report.test.null_band
    if np.isfinite(low):
        axes.axhspan(low, high, color="0.5", alpha=0.25, linewidth=0, label="clean classes")
    if np.isfinite(report.test.usual_norm):
        axes.axhline(
            report.test.usual_norm, color="0.4", linewidth=1, linestyle="--", label="usual"
        )
        axes.legend(frameon=False, ncols=2, fontsize="small")
    axes.set_ylabel(f"minimal perturbation,\n{report.metric} norm")
    if len(classes):
        # The band of few classes is wide; the bars are what is to be read.
        axes.set_ylim(0, 1.35 * float(norm[classes].max()))


def _draw_evidence(axes: Axes, evidence: Mapping[str, npt.NDArray[np.float64]]) -> None:
    width = 0.8 / len(evidence)
    for i, (kind, p_values) in enumerate(evidence.items()):
        classes = np.flatnonzero(np.isfinite(p_values))
        height = -np.log10(np.maximum(p_values[classes], SMALLEST_P))
        axes.bar(classes - 0.4 + (i + 0.5) * width, height, width=width, label=kind)
    axes.set_ylabel("evidence,\n$-\\log_{10}$ p")
    axes.legend(frameon=False, ncols=len(evidence), fontsize="small")
