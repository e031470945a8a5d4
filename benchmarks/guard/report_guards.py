"""Prints the tables of docs/guard.md from results.json: what guards at 1 % false alarms flag.

python benchmarks/guard/report_guards.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results.json"
SEVERAL = ("all_to_all", "source_specific")  # attacks that have no single target for all inputs

Model = dict[str, Any]


def share(model: Model, samples: int) -> float:
    """Of triggered inputs flagged, over attacks and choices of the clean images."""
    return float(mean(mean(run["flagged"]) for run in model["runs"] if run["samples"] == samples))


def alarms(model: Model, samples: int) -> list[float]:
    """Shares of clean inputs flagged, one a choice."""
    return [run["false_alarms"] for run in model["runs"] if run["samples"] == samples]


def row(label: str, models: list[Model]) -> str:
    """A line of the table by kind of attack."""
    cells = [label, str(len(models))]
    for samples in (2500, 500, 200):
        shares = [share(m, samples) for m in models]
        cells.append(f"{mean(shares):.3f}" if samples != 2500 else f"**{mean(shares):.3f}**")
        if samples == 2500:
            cells.append(f"{min(shares):.2f}")
    cells.append(f"{mean(mean(alarms(m, 2500)) for m in models):.4f}")
    return "| " + " | ".join(cells) + " |"


def group(models: dict[str, Model], key: Callable[[Model], str]) -> dict[str, list[Model]]:
    """Models by a property, in order of its name."""
    groups: dict[str, list[Model]] = {}
    for model in models.values():
        groups.setdefault(key(model), []).append(model)
    return dict(sorted(groups.items()))


def main() -> None:
    """Prints them."""
    every: dict[str, Model] = json.loads(RESULTS.read_text(encoding="utf-8"))
    clean = {n: m for n, m in every.items() if m["attack"] == "clean"}
    attacked = {n: m for n, m in every.items() if n not in clean}
    single = {n: m for n, m in attacked.items() if m["attack"] not in SEVERAL}
    print("| models | | 2,500 images | worst | 500 | 200 | false alarms |")
    print("|---|---|---|---|---|---|---|")
    print(row("one target, or several at once", list(single.values())))
    for attack, models in group(attacked, lambda m: m["attack"]).items():
        print(row(attack, models))
    for dataset, models in group(attacked, lambda m: m["dataset"]).items():
        print(row(dataset, models))
    print("\nFlagged in less than 90 %, from 2,500 images:")
    for name, model in attacked.items():
        if share(model, 2500) < 0.9:
            print(f"- `{name}`: {share(model, 2500):.2f}")
    print("\n| false alarms, promised .01 | mean | worst of all | worst clean model |")
    print("|---|---|---|---|")
    for samples in (2500, 500, 200):
        all_of = [a for m in every.values() for a in alarms(m, samples)]
        of_clean = [mean(alarms(m, samples)) for m in clean.values()]
        print(
            f"| {samples:,} images | {mean(all_of):.4f} | {max(all_of):.4f} | {max(of_clean):.4f} |"
        )


if __name__ == "__main__":
    main()
