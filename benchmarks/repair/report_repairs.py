"""Prints what `collect_repairs.py` left in results/: each attack by each method, and who wins.

    python benchmarks/repair/report_repairs.py [--samples N] [--detected] [--against METHOD]
        [--most-asr S] [--most-drop S] [--most-gap S] [--models]

A win is a model on which the DER of METHOD is more than a point above that of another removal, a
loss the opposite. Times are of the processor; the ratio is to METHOD on the same model, the median
over the models. "RA, clean models" is what clean models of the same network and data make of the
images with the trigger, in brackets of how many models where not of all (`read_by_clean_models.py`).
Last come the rows that miss a goal: an ASR, a drop of ACC, or a distance of RA and ACC above the
limits.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"
CLEAN_MODELS = RESULTS / "clean_models.json"  # of read_by_clean_models.py
POINT = 0.01  # of DER; less is a draw
COMPARATORS = ("fine-tuning", "ft-sam", "nad", "anp", "clp", "i-bau", "fst")


@dataclass(frozen=True)
class Row:
    """One method on one model.

    Attributes:
        model, attack, method: which.
        failed: why there is no outcome; None where there is one.
        fields: as kept.
    """

    model: str
    attack: str
    method: str
    failed: str | None
    fields: dict[str, Any]

    @property
    def asr(self) -> float:
        """Afterwards, the highest of the attacks."""
        return float(self.fields["after"]["asr_max"])

    @property
    def ra(self) -> float:
        """Afterwards, the mean over the attacks."""
        return float(self.fields["after"]["ra"])

    @property
    def acc(self) -> float:
        """Afterwards."""
        return float(self.fields["after"]["acc"])

    @property
    def drop(self) -> float:
        """Of ACC; negative where it rose."""
        return float(self.fields["before"]["acc"]) - self.acc

    @property
    def gap(self) -> float:
        """|RA - ACC|."""
        return abs(self.ra - self.acc)

    @property
    def der(self) -> float:
        """Defence effectiveness rating, the mean over the attacks."""
        return float(self.fields["der"])

    @property
    def seconds(self) -> float:
        """Of the processor."""
        return float(self.fields["seconds"])


def read(results: Path, samples: int, detected: bool) -> list[Row]:
    """Of all models; tacext as it was told its targets, the others as they are."""
    rows = []
    for file in sorted(results.glob("*/*.json")):
        fields = json.loads(file.read_text(encoding="utf-8"))
        method = fields["method"]
        if method not in COMPARATORS and fields["detected"] != detected:
            continue
        if fields["samples"] == samples and fields["seed"] == 0 and fields["share"] == 1:
            attack = fields["attack"]
            rows.append(Row(file.parent.name, attack, method, fields.get("failed"), fields))
    return rows


def _order(method: str) -> tuple[bool, int, str]:
    others = method in COMPARATORS
    return others, COMPARATORS.index(method) if others else 0, method


def _methods(rows: Sequence[Row]) -> list[str]:
    return sorted({row.method for row in rows}, key=_order)


def _pairs(rows: Sequence[Row], method: str, against: str) -> list[tuple[Row, Row]]:
    """Of both methods on the same models."""
    ours = {row.model: row for row in rows if row.method == against and row.failed is None}
    return [
        (ours[row.model], row)
        for row in rows
        if row.method == method and row.failed is None and row.model in ours
    ]


def by_attack(rows: Sequence[Row], against: str) -> Table:
    """A line for each attack and method, and for all attacks together."""
    table = Table(
        "attack", "method", "models", "ASR", "worst", "ACC lost", "worst", "RA", "RA - ACC",
        "RA, clean models", "DER", "seconds", "time", box=MARKDOWN,
    )  # fmt: skip
    twins = json.loads(CLEAN_MODELS.read_text("utf-8")) if CLEAN_MODELS.exists() else {}
    groups = {attack: [r for r in rows if r.attack == attack] for attack in _attacks(rows)}
    for attack, group in (groups | {"all": list(rows)}).items():
        for method in _methods(group):
            of_it = [r for r in group if r.method == method and r.failed is None]
            if not of_it:
                table.add_row(attack, method, "0")
                continue
            by_twins = [twins[r.model]["ra"] for r in of_it if r.model in twins]
            ratios = [r.seconds / max(o.seconds, 1e-9) for o, r in _pairs(group, method, against)]
            table.add_row(
                attack,
                method,
                str(len(of_it)),
                f"{mean(r.fields['after']['asr'] for r in of_it):.3f}",
                f"{max(r.asr for r in of_it):.3f}",
                f"{mean(r.drop for r in of_it):+.3f}",
                f"{max(r.drop for r in of_it):+.3f}",
                f"{mean(r.ra for r in of_it):.3f}",
                f"{mean(r.gap for r in of_it):.3f}",
                _of_some(by_twins, len(of_it)),
                f"{mean(r.der for r in of_it):.3f}",
                f"{mean(r.seconds for r in of_it):.0f}",
                f"{median(ratios):.2g}" if ratios else "-",
            )
    return table


def _of_some(values: Sequence[float], of: int) -> str:
    if not values:
        return "-"
    return f"{mean(values):.3f}" + ("" if len(values) == of else f" ({len(values)})")


def _attacks(rows: Sequence[Row]) -> list[str]:
    return sorted({row.attack for row in rows})


def wins(rows: Sequence[Row], against: str) -> Table:
    """Wins, draws and losses of one method against each other, by attack."""
    others = [m for m in _methods(rows) if m != against]
    table = Table("attack", *(f"{against} - {m}" for m in others), box=MARKDOWN)
    for attack in [*_attacks(rows), "all"]:
        group = [r for r in rows if attack in (r.attack, "all")]
        cells = []
        for method in others:
            gains = [ours.der - row.der for ours, row in _pairs(group, method, against)]
            won, lost = sum(g > POINT for g in gains), sum(g < -POINT for g in gains)
            cells.append(f"{won} / {len(gains) - won - lost} / {lost}" if gains else "-")
        table.add_row(attack, *cells)
    return table


def misses(rows: Sequence[Row], most_asr: float, most_drop: float, most_gap: float) -> Table:
    """Every repair that misses a goal, and by which figure; or that came to nothing."""
    table = Table("model", "method", "ASR", "ACC lost", "RA - ACC", "DER", "why", box=MARKDOWN)
    for row in sorted(rows, key=lambda r: (_order(r.method), r.attack, r.model)):
        if row.failed is not None:
            table.add_row(row.model, row.method, "", "", "", "", row.failed)
            continue
        limits = (row.asr, most_asr), (row.drop, most_drop), (row.gap, most_gap)
        if any(value > most for value, most in limits):
            cells = [f"{v:.3f}" + (" *" if v > most else "") for v, most in limits]
            why = "" if row.fields.get("accepted", True) else f"rolled back: {row.fields['reason']}"
            table.add_row(row.model, row.method, *cells, f"{row.der:.3f}", why)
    return table


def wrongly_repaired(rows: Sequence[Row]) -> Table:
    """Clean models: what a repair that was not called for costs."""
    table = Table("method", "models", "ACC before", "after", "lost", "worst", box=MARKDOWN)
    for method in _methods(rows):
        of_it = [r for r in rows if r.method == method and r.failed is None]
        if of_it:
            table.add_row(
                method,
                str(len(of_it)),
                f"{mean(r.acc + r.drop for r in of_it):.3f}",
                f"{mean(r.acc for r in of_it):.3f}",
                f"{mean(r.drop for r in of_it):+.3f}",
                f"{max(r.drop for r in of_it):+.3f}",
            )
    return table


def by_model(rows: Sequence[Row]) -> Table:
    """ASR, ACC lost and seconds of every model and method."""
    methods = _methods(rows)
    table = Table("model", "ACC", "ASR", *methods, box=MARKDOWN)
    for model in sorted({row.model for row in rows}):
        found = {row.method: row for row in rows if row.model == model}
        before = next(iter(found.values())).fields["before"]
        cells = []
        for method in methods:
            row = found.get(method)
            if row is None or row.failed is not None:
                cells.append("" if row is None else "failed")
            else:
                cells.append(f"{row.asr:.2f}, {row.drop:+.2f}, {row.seconds:.0f} s")
        table.add_row(model, f"{before['acc']:.3f}", f"{before['asr']:.3f}", *cells)
    return table


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--samples", type=int, default=2500, help="of the defender")
    parser.add_argument("--detected", action="store_true", help="tacext with what a scan suspects")
    parser.add_argument("--against", default="tacext-auto", help="whose wins and time to count")
    parser.add_argument("--most-asr", type=float, default=0.1)
    parser.add_argument("--most-drop", type=float, default=0.03)
    parser.add_argument("--most-gap", type=float, default=0.05)
    parser.add_argument("--models", action="store_true", help="every model by itself as well")
    options = parser.parse_args()
    found = read(RESULTS, options.samples, options.detected)
    rows = [row for row in found if row.attack != "clean"]
    console = Console(width=250)
    console.print(by_attack(rows, options.against))
    console.print(wins(rows, options.against))
    if options.models:
        console.print(by_model(rows))
    console.print(misses(rows, options.most_asr, options.most_drop, options.most_gap))
    clean = [row for row in found if row.attack == "clean"]
    if clean:
        console.print(wrongly_repaired(clean))


if __name__ == "__main__":
    main()
