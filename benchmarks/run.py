"""Benchmarks of tacext against plain torch and general QP solvers, side by side in one run.

python benchmarks/run.py [names] [--json FILE] [--save] [--quick] [--large] [--only TEXT]
                         [--heads DIR] [--device cuda] [--budget SECONDS]
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.table import Table

from machine import Machine, describe_machine
from problems import HEADS_VARIABLE
from timing import MIB, Benchmark, Row

NAMES = (
    "pairwise_margin_max",
    "pairwise_margin_quantile",
    "minimal_perturbation",
    "neuron_scores",
    "guard_score",
    "scan_stages",
)
RESULTS = Path(__file__).parent / "results"


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    summary, usage = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(description=summary, usage=usage.strip())
    parser.add_argument("names", nargs="*", metavar="names", help=f"of {', '.join(NAMES)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there too")
    parser.add_argument("--save", action="store_true", help="as --json, in results/, machine.json")
    parser.add_argument("--quick", action="store_true", help="small cases, few repeats")
    parser.add_argument(
        "--large", action="store_true", help="the large cases instead, minutes each"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT", help="cases with TEXT, large ones, too"
    )
    parser.add_argument("--heads", type=Path, metavar="DIR", help="real heads, see make_heads.py")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="timed for each form")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in NAMES:
            parser.error(f"names: expected one of {', '.join(NAMES)}, got {name}")
    if arguments.heads and not any(arguments.heads.glob("*.safetensors")):
        parser.error(f"--heads: expected a folder with safetensors files, got {arguments.heads}")
    return arguments


def cases_of(benchmark: Benchmark, arguments: argparse.Namespace) -> list[str]:
    """The cases that the command line asks for."""
    large: Sequence[str] = getattr(benchmark, "LARGE_CASES", ())
    if arguments.quick:
        chosen = benchmark.QUICK_CASES
    elif arguments.large:
        chosen = large
    else:
        chosen = (*benchmark.CASES, *large) if arguments.only else benchmark.CASES
    return [case for case in dict.fromkeys(chosen) if arguments.only in case]


def format_seconds(seconds: float | None) -> str:
    """Three significant digits with a unit."""
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    return f"{seconds / 1e-6:.3g} µs"


def format_ratio(row: Row) -> str:
    """How many times the first form's time, or the share of the whole."""
    if row.ratio is None:
        return ""
    return f"{row.ratio:.2%}" if row.note.startswith("share") else f"{row.ratio:.3g}x"


def format_bytes(extra: int | None) -> str:
    """In MiB."""
    return "" if extra is None else f"{extra / MIB:,.1f} MiB"


def show(console: Console, name: str, rows: Sequence[Row], machine: Machine) -> None:
    """Prints the table of one benchmark."""
    about = (
        f"{machine.processor} {machine.architecture}, {machine.threads} threads, "
        f"{machine.tacext_simd}, device {machine.device}, torch {machine.torch}, "
        f"tacext {machine.tacext}"
    )
    table = Table(title=f"{name}\n[dim]{about}[/dim]", title_justify="left")
    table.add_column("case")
    table.add_column("form")
    for column in ("median", "best", "ratio", "error", "extra memory", "repeats"):
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
                "" if row.error is None else f"{row.error:.0e}",
                format_bytes(row.extra_bytes),
                str(row.repeats or ""),
                row.note.removeprefix("share").lstrip("; "),
            )
        table.add_section()
    console.print(table)


def main() -> None:
    """Runs what the command line names."""
    arguments = parse_arguments()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device: expected a GPU that torch can use, found none; use cpu")
    if arguments.heads:
        os.environ[HEADS_VARIABLE] = str(arguments.heads.resolve())
    budget = arguments.budget or (0.3 if arguments.quick else 2.0)
    console = Console(width=None if Console().is_terminal else 180)
    machine = describe_machine(arguments.device)
    rows: list[Row] = []
    for name in arguments.names or NAMES:
        benchmark = cast(Benchmark, importlib.import_module(f"bench_{name}"))
        measured: list[Row] = []
        for case in cases_of(benchmark, arguments):
            begin = time.perf_counter()
            with console.status(f"{name}: {case}"):
                measured += benchmark.run(case, arguments.device, budget)
            print(f"{name}: {case} ({time.perf_counter() - begin:.0f} s)", file=sys.stderr)
        if measured:
            show(console, name, measured, machine)
        rows += measured
    files = [arguments.json, RESULTS / f"{machine.slug}.json" if arguments.save else None]
    report = {"machine": asdict(machine), "rows": [asdict(row) for row in rows]}
    for file in filter(None, files):
        file.write_text(json.dumps(report, indent=2) + "\n")
        console.print(f"written: {file}")


if __name__ == "__main__":
    main()
