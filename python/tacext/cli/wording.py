"""What the library says of its arguments, in the words of the command line."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import click

# head= and method='finetune' and targets=[...], but not size=(H, W) or what is no keyword.
_KEYWORD = re.compile(r"\b([a-z_]+)=(?:'([\w.-]+)'|\"([\w.-]+)\"|(\[\.\.\.\])|(?=[\s;,.)]|$))")


def command_of(group: click.Group, arguments: Sequence[str]) -> click.Command:
    """The command that these arguments call: the innermost one that they name."""
    command: click.Command = group
    for argument in arguments:
        if isinstance(command, click.Group):
            command = command.commands.get(argument, command)
    return command


def options_of(command: click.Command) -> dict[str, str]:
    """The option of every name that a command takes."""
    return {
        parameter.name: max(parameter.opts, key=len)
        for parameter in command.params
        if isinstance(parameter, click.Option) and parameter.name is not None
    }


def in_options(text: str, options: Mapping[str, str]) -> str:
    """The message with every keyword of a known option in its way out as that option.

    "repair with method='finetune'" becomes "repair with --method finetune". What comes before the
    last semicolon is what was got, such as the name of a file.
    """

    def option(found: re.Match[str]) -> str:
        name, *values = found.groups()
        if name not in options:
            return found[0]
        value = values[0] or values[1]
        return f"{options[name]} {value}" if value else options[name]

    said, semicolon, way_out = text.rpartition("; ")
    return said + semicolon + _KEYWORD.sub(option, way_out)
