"""`tacext demo`: the whole way on real images that ship with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import click

from ..demo import TARGET, run_demo
from ..tables import evaluation_table, scan_table
from .console import ResultConsole
from .exit_codes import EXIT_CODE_HELP


@click.command("demo", epilog=EXIT_CODE_HELP)
@click.option(
    "--output",
    type=click.Path(),
    default="tacext-demo",
    show_default=True,
    help="Folder for the models and the plot.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, 2**31 - 1),
    default=0,
    show_default=True,
    help="Seed of data, poison and training.",
)
def demo_command(output: str, seed: int) -> None:
    """Train a digit classifier with a backdoor, find the backdoor, remove it, and measure.

    Runs on scikit-learn's handwritten digits in about half a minute; no data and no
    model is downloaded.
    """
    result = run_demo(Path(output), seed=seed)
    console = ResultConsole()
    console.print(f"[bold]A digit classifier with a BadNets backdoor (target {TARGET})[/bold]")
    console.print(scan_table(result.report))
    clean = result.clean_report
    console.print(
        f"\nthe same network trained without poison: {clean.verdict}, p = {clean.p_value:.2g}\n"
    )
    if not result.report.suspects:
        console.print("the scan named no class, so the known target is repaired\n")
    targets = ", ".join(map(str, result.repair.targets))
    console.print(
        f"[bold]Repair of class {targets} ({result.repair.way}), measured on test images[/bold]"
    )
    console.print(
        evaluation_table(
            [
                ("as delivered", result.before),
                ("plain fine-tuning", result.fine_tuned),
                ("repaired", result.after),
            ]
        )
    )
    console.print()
    for file in result.files:
        console.print(f"written: {file}", highlight=False, soft_wrap=True)
