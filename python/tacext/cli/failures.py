"""What goes wrong, in one line on standard error: for people, in the words of the command line."""

from __future__ import annotations

import os
import sys
import traceback

import click

from ..errors import TacextError, printable
from ..heads import is_out_of_memory
from .wording import in_options, options_of


def tell(message: str) -> None:
    """Writes to standard error, whose reader may have gone.

    A closed pipe must not change the exit code: the usual 1 would read as "backdoored".
    """
    try:
        click.echo(message, err=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def told_of(error: BaseException, command: click.Command) -> str:
    """A failure of a command, as its user would put it; of a bug where it happened comes before."""
    match error:
        case TacextError():
            return in_options(str(error), options_of(command))
        case SystemExit():
            return f"the code named on the command line exits ({error.code})"
        case _ if is_out_of_memory(error):
            return "out of memory; use fewer --samples or a smaller --batch-size"
        case OSError():
            return f"tacext: {printable(str(error))}"
    tell("".join(traceback.format_exception(error)).rstrip())
    return "this is a bug in tacext; please report the lines above"
