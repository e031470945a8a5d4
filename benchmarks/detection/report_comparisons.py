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
from report import cross_validated, fast, share, thorough
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
    cases = read_cases()
    for detector, judge in (("thorough", thorough), ("fast", fast)):
        for outcome in cross_validated(cases, ALPHA, "network", judge):
            if outcome.case.name in models:  # by the evidence of today; times are as they were
                told = {"flagged": outcome.flagged, "first": outcome.first}
                models[outcome.case.name].setdefault(detector, {}).update(told)
    return models


def ratios(models: Sequence[dict[str, Any]], detector: str) -> str:
    """Seconds of a detector as multiples of a thorough scan's: median, smallest, largest."""
    timed = [m for m in models if "seconds" in m[detector]]
    found = [m[detector]["seconds"] / m["thorough"]["seconds"] for m in timed]
    return f"{np.median(found):.2g} [{min(found):.2g}, {max(found):.2g}]" if found else "-"


def overview(models: dict[str, dict[str, Any]], comparator: str) -> Table:
    """Tacext and one comparator on the models that the comparator was run on."""
    headings = ("models", "backdoored, flagged", "target named", "clean, flagged", "time")
    table = Table("detector", *headings, box=MARKDOWN)
    run = [m for m in models.values() if comparator in m]
    for detector in (*OWN, comparator):
        seen = [m for m in run if detector in m]  # files of before lack some
        bad, clean = [m for m in seen if m["targets"]], [m for m in seen if not m["targets"]]
        named = sum(m[detector]["flagged"] and m[detector]["first"] in m["targets"] for m in bad)
        table.add_row(
            detector,
            str(len(seen)),
            share(sum(m[detector]["flagged"] for m in bad), len(bad)),
            share(named, len(bad)),
            share(sum(m[detector]["flagged"] for m in clean), len(clean)),
            ratios(seen, detector),
        )
    return table


def _cell(told: dict[str, Any]) -> str:
    """The class that is flagged, and the seconds where they are known."""
    first = str(told["first"]) if told["flagged"] else "-"
    return f"{first}, {told['seconds']:.0f} s" if "seconds" in told else first


def by_model(models: dict[str, dict[str, Any]]) -> Table:
    """A row a model: the class that each detector flags, and its seconds."""
    table = Table("model", "target", *DETECTORS, box=MARKDOWN)
    for name, found in models.items():
        cells = [_cell(found[d]) if d in found else "" for d in DETECTORS]
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
