"""`tacext info`: what this installation is."""

from __future__ import annotations

from dataclasses import asdict

import click
from rich.table import Table

from ..ops import build_info
from .console import ResultConsole


@click.command("info")
def info_command() -> None:
    """Show the version, the build and what of this machine is used."""
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in asdict(build_info()).items():
        table.add_row(name.replace("_", " "), str(value))
    ResultConsole().print(table)
