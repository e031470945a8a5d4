"""Benchmarks of tacext against plain torch and general QP solvers, side by side in one run.

python benchmarks/run.py [names] [--json FILE] [--quick] [--device cuda] [--budget SECONDS]
"""

from __future__ import annotations

import argparse
import importlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.table import Table

from timing import MIB, Benchmark, Machine, Row, describe_machine

NAMES = ("pairwise_margin_max", "minimal_perturbation", "neuron_scores", "scan_stages")


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    summary, usage = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(description=summary, usage=usage.strip())
    parser.add_argument("names", nargs="*", metavar="names", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--quick", action="store_true", help="small cases, few repeats")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="timed for each form")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in NAMES:
            parser.error(f"names: expected one of {', '.join(NAMES)}, got {name}")
    return arguments


def format_seconds(seconds: float) -> str:
    """Three significant digits with a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds / 1e-6:.3g} µs"


def format_ratio(row: Row) -> str:
    """How many times the first form's time, or the share of the whole."""
    return f"{row.ratio:.1%}" if row.note == "share" else f"{row.ratio:.3g}x"


def format_bytes(extra: int | None) -> str:
    """In MiB."""
    return "" if extra is None else f"{extra / MIB:,.1f} MiB"


def show(console: Console, name: str, rows: Sequence[Row], machine: Machine) -> None:
    """Prints the table of one benchmark."""
    about = (
        f"{machine.processor}, {machine.threads} threads, {machine.simd}, device {machine.device}, "
        f"torch {machine.torch}, tacext {machine.tacext}"
    )
    table = Table(title=f"{name}\n[dim]{about}[/dim]", title_justify="left")
    table.add_column("case")
    table.add_column("form")
    for column in ("median", "best", "ratio", "extra memory", "repeats"):
        table.add_column(column, justify="right")
    table.add_column("note")
    for case, lines in groupby(rows, key=lambda row: row.case):
        for i, row in enumerate(lines):
            table.add_row(
                case if i == 0 else "",
                row.form,
                format_seconds(row.seconds),
                format_seconds(row.best),
                format_ratio(row),
                format_bytes(row.extra_bytes),
                str(row.repeats or ""),
                row.note.removeprefix("share"),
            )
        table.add_section()
    console.print(table)


def main() -> None:
    """Runs what the command line names."""
    arguments = parse_arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: expected a GPU that torch can use, found none; use cpu")
    budget = arguments.budget or (0.3 if arguments.quick else 3.0)
    console = Console(width=None if Console().is_terminal else 150)
    machine = describe_machine(arguments.device)
    rows: list[Row] = []
    for name in arguments.names or NAMES:
        benchmark = cast(Benchmark, importlib.import_module(f"bench_{name}"))
        measured: list[Row] = []
        for case in benchmark.QUICK_CASES if arguments.quick else benchmark.CASES:
            with console.status(f"{name}: {case}"):
                measured += benchmark.run(case, arguments.device, budget)
        show(console, name, measured, machine)
        rows += measured
    if arguments.json:
        report = {"machine": machine.as_dict(), "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
