"""What the tests of the command line share: running it, and files to run it on."""

from __future__ import annotations

import pytest

from tacext.cli import main

ARCH = "tacext.demo:digit_net"
TRIGGER = "tacext.demo:white_corner"


def run(*arguments: object) -> int:
    """Runs the command in this process and returns its exit code."""
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code
