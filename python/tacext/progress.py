"""Progress bars for long work: on a terminal's standard error, silent elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

Advance = Callable[[int], None]


@contextlib.contextmanager
def progress_bar(description: str, total: int | None, shown: bool | None) -> Iterator[Advance]:
    """A bar that the yielded function advances; `shown=None` means only on a terminal."""
    if shown is False:
        yield lambda _steps: None
        return
    # Here, as they take a tenth of the time to import tacext.
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if shown is None:
        shown = console.is_terminal
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
        task = progress.add_task(description, total=total)
        yield lambda steps: progress.advance(task, steps)
