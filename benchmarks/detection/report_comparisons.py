"""Prints what tacext, Neural Cleanse and MM-BD said of the same models, and how long each took.

    python benchmarks/detection/report_comparisons.py

Reads comparisons/, as `collect_comparisons.py` leaves it, and what the bench's evidence says of the
same models today, judged by constants that were fitted without the model's network. Times are ratios
to a thorough scan of the same model in the same process; the median over the models, with the range.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from calibrate import read_cases
from collect_comparisons import COMPARATORS, COMPARISONS
from report import cross_validated, share
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

OWN = ("thorough", "fast", "norms")
DETECTORS = (*OWN, *COMPARATORS)
ALPHA = 0.01


def read() -> dict[str, dict[str, Any]]:
    """What every detector said of every model, by the models' names."""
    files = [f for f in sorted(COMPARISONS.glob("*.json")) if "-adaptive_" not in f.stem]
    models = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}
    for outcome in cross_validated(read_cases(), ALPHA, "network"):
        if outcome.case.name in models:
            told = {"flagged": outcome.flagged, "first": outcome.first}
            models[outcome.case.name]["thorough"].update(told)
    return models


def ratios(models: Sequence[dict[str, Any]], detector: str) -> str:
    """Seconds of a detector as multiples of a thorough scan's: median, smallest, largest."""
    found = [m[detector]["seconds"] / m["thorough"]["seconds"] for m in models]
    return f"{np.median(found):.2g} [{min(found):.2g}, {max(found):.2g}]" if found else "-"


def overview(models: dict[str, dict[str, Any]], comparator: str) -> Table:
    """Tacext and one comparator on the models that the comparator was run on."""
    headings = ("models", "backdoored, flagged", "target named", "clean, flagged", "time")
    table = Table("detector", *headings, box=MARKDOWN)
    run = [m for m in models.values() if comparator in m]
    for detector in (*OWN, comparator):
        if not all(detector in m for m in run):  # older files lack some
            continue
        bad, clean = [m for m in run if m["targets"]], [m for m in run if not m["targets"]]
        named = sum(m[detector]["flagged"] and m[detector]["first"] in m["targets"] for m in bad)
        table.add_row(
            detector,
            str(len(run)),
            share(sum(m[detector]["flagged"] for m in bad), len(bad)),
            share(named, len(bad)),
            share(sum(m[detector]["flagged"] for m in clean), len(clean)),
            ratios(run, detector),
        )
    return table


def by_model(models: dict[str, dict[str, Any]]) -> Table:
    """A row a model: the class that each detector flags, and its seconds."""
    table = Table("model", "target", *DETECTORS, box=MARKDOWN)
    for name, found in models.items():
        cells = [
            f"{found[d]['first'] if found[d]['flagged'] else '-'}, {found[d]['seconds']:.0f} s"
            if d in found
            else ""
            for d in DETECTORS
        ]
        table.add_row(name, " ".join(map(str, found["targets"])) or "none", *cells)
    return table


def main() -> None:
    """Prints the tables."""
    models = read()
    console = Console(width=150)
    for comparator in COMPARATORS:
        console.print(overview(models, comparator))
    console.print(by_model(models))


if __name__ == "__main__":
    main()
