"""Plots of a scan, with matplotlib (the optional dependency `plot`)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from .errors import DependencyError, printable
from .files import StrPath, write_bytes_atomically
from .scanning import ScanReport

_USUAL, _SUSPECT = "#4878a8", "#c03028"


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
            way_out="run pip install 'tacext[plot]'",
        ) from error


def plot_norms(
    report: ScanReport,
    path: StrPath,
    *,
    class_names: Sequence[str] | None = None,
    title: str | None = None,
    operation: str = "plot_norms",
) -> None:
    """Writes a PNG with the norm of every class, suspects in red; unreachable classes are left out.

    Raises:
        DependencyError: matplotlib is not installed.
        FileError: the file cannot be written.
    """
    require_matplotlib(operation)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    norm = report.norm.cpu().numpy()
    classes = np.flatnonzero(np.isfinite(norm))
    colours = [_SUSPECT if k in report.suspects else _USUAL for k in classes]
    figure = Figure(figsize=(max(6.0, min(16.0, 0.35 * len(classes))), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.bar(classes, norm[classes], color=colours, width=0.8)
    if np.isfinite(report.test.usual_norm):
        axes.axhline(
            report.test.usual_norm, color="0.4", linewidth=1, linestyle="--", label="usual"
        )
        axes.legend(frameon=False)
    axes.set_xlabel("class")
    axes.set_ylabel(f"minimal perturbation, {report.metric} norm")
    share = "" if report.quantile == 1 else f", quantile {report.quantile:g}"
    axes.set_title(title or f"{report.verdict} (p = {report.p_value:.2g}{share})")
    if len(classes) <= 50:
        axes.set_xticks(classes)
        if class_names is not None:
            names = [printable(class_names[k]) for k in classes.tolist()]
            for label in axes.set_xticklabels(names, rotation=90):
                label.set_parse_math(False)  # a name may hold a dollar sign
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes_atomically(path, buffer.getvalue(), operation=operation, argument="plot")
