"""The exit codes of the command line, the same for every command."""

from enum import IntEnum


class ExitCode(IntEnum):
    """What a caller's script can branch on."""

    CLEAN = 0
    BACKDOORED = 1
    ERROR = 2
    INCONCLUSIVE = 3
    USAGE = 4
    ROLLED_BACK = 5
    INTERRUPTED = 130


EXIT_CODE_HELP = (
    "Exit codes: 0 clean (or done), 1 backdoored (or more flagged than clean images explain), 2 error, 3 inconclusive, "
    "4 wrong usage, 5 repair rolled back, 130 interrupted."
)

OF_VERDICT = {
    "clean": ExitCode.CLEAN,
    "backdoored": ExitCode.BACKDOORED,
    "inconclusive": ExitCode.INCONCLUSIVE,
}
