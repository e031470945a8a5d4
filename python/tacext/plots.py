"""Plots of a scan, with matplotlib (the optional dependency `plot`)."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from .errors import DependencyError
from .files import StrPath, write_bytes_atomically
from .scanning import ScanReport

_USUAL, _SUSPECT = "#4878a8", "#c03028"


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
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise DependencyError.of(
            operation,
            "plot",
            expected="matplotlib to be installed",
            got="none",
            way_out="run pip install 'tacext[plot]'",
        ) from error

    norm = report.norm.cpu().numpy()
    classes = np.flatnonzero(np.isfinite(norm))
    colours = [_SUSPECT if k in report.suspects else _USUAL for k in classes]
    figure = Figure(figsize=(max(6.0, min(16.0, 0.35 * len(classes))), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.bar(classes, norm[classes], color=colours, width=0.8)
    usual = np.median(norm[classes]) if len(classes) else 0.0
    axes.axhline(usual, color="0.4", linewidth=1, linestyle="--", label="median")
    axes.set_xlabel("class")
    axes.set_ylabel(f"minimal perturbation, {report.metric} norm")
    axes.set_title(title or f"{report.verdict} (p = {report.p_value:.2g})")
    if len(classes) <= 50:
        axes.set_xticks(classes)
        if class_names is not None:
            axes.set_xticklabels([class_names[k] for k in classes.tolist()], rotation=90)
    axes.legend(frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    write_bytes_atomically(path, buffer.getvalue(), operation=operation, argument="plot")
