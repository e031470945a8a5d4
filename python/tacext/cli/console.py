"""Where the commands print their results."""

from __future__ import annotations

import io
import os
import sys
from typing import Any

from rich.console import Console

# Of files and pipes, which have no width of their own: no table is cut.
_WIDTH = 160


class ResultConsole(Console):
    """Standard output, or with `stderr=True` standard error, that outlives its reader.

    A closed pipe (`tacext scan ... | head`) must not change the exit code: the usual 1 would read as
    "backdoored". Nor must a name that the terminal has no letters for.
    """

    def __init__(self, **options: Any) -> None:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        super().__init__(**options)
        if not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = _WIDTH

    def on_broken_pipe(self) -> None:
        """Sends what is left to nowhere, so that the command can end in its own way."""
        self.quiet = True
        stream = sys.stderr if self.stderr else sys.stdout
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
