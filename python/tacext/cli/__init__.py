"""The command line: parses, calls the library, turns what is raised into an exit code."""

from __future__ import annotations

import logging
import sys

import click
from rich.logging import RichHandler

from ..ops import build_info
from .console import ResultConsole
from .demo import demo_command
from .evaluate import evaluate_command
from .exit_codes import EXIT_CODE_HELP, ExitCode
from .failures import tell, told_of
from .guard import guard_command
from .info import info_command
from .repair import repair_command
from .scan import scan_command
from .wording import command_of

__all__ = ["ExitCode", "main"]


@click.group(epilog=EXIT_CODE_HELP, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(build_info().version, prog_name="tacext")
@click.option("-v", "--verbose", is_flag=True, help="Log what happens, on standard error.")
def cli(verbose: bool) -> None:
    """Find and remove backdoors in image classifiers, exactly and with certificates."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(message)s",
        handlers=[
            RichHandler(console=ResultConsole(stderr=True), show_path=False, show_time=False)
        ],
        force=True,
    )
    # What a scan and a repair warn of stands in their tables.
    for name in ("tacext.scanning", "tacext.repairing"):
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.ERROR)


for _command in (
    scan_command,
    repair_command,
    guard_command,
    evaluate_command,
    demo_command,
    info_command,
):
    cli.add_command(_command)


def _run(arguments: list[str] | None) -> int:
    try:
        result = cli.main(arguments, prog_name="tacext", standalone_mode=False)
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return ExitCode.USAGE
    except (KeyboardInterrupt, click.Abort):
        tell("interrupted; nothing was written half")
        return ExitCode.INTERRUPTED
    except (Exception, SystemExit) as error:  # noqa: BLE001
        # Python's own exit code for a crash is 1, which here means "backdoored".
        command = command_of(cli, sys.argv[1:] if arguments is None else arguments)
        tell(f"error: {told_of(error, command)}")
        return ExitCode.ERROR
    return result if isinstance(result, int) else ExitCode.CLEAN


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the `tacext` command; exits with an `ExitCode`."""
    sys.exit(int(_run(arguments)))
