"""The exceptions of tacext. Messages read `operation: argument: expected ..., got ...; way out`."""

from __future__ import annotations

from collections.abc import Sequence

from typing_extensions import Self


def printable(text: str) -> str:
    """`text` with every control character replaced by "?".

    Names in files of unknown origin end up in messages and tables; none may steer a terminal.
    """
    return "".join(c if c.isprintable() else "?" for c in text)


def counted(number: int, one: str, many: str | None = None) -> str:
    """A number with its noun: "1 sample", "2 samples"."""
    return f"{number} {one if number == 1 else many or one + 's'}"


def compared(p_value: float, alpha: float) -> str:
    """A p-value and what it is held against, with digits enough to tell which is larger."""
    sign = (p_value > alpha) - (p_value < alpha)
    for digits in range(2, 17):
        p, level = (float(f"{x:.{max(n, digits)}g}") for x, n in ((p_value, 2), (alpha, 6)))
        if (p > level) - (p < level) == sign:
            return f"p = {p:.{digits}g} against {level:.{max(6, digits)}g}"
    return f"p = {p_value:.17g} against {alpha:.17g}"


def listed(values: Sequence[object], most: int = 8) -> str:
    """The first few of them: "0, 1, 2", or "0, 1, ..." where there are more."""
    return ", ".join([*map(str, values[:most]), *(["..."] if len(values) > most else [])])


class TacextError(Exception):
    """Base of every error that tacext raises on purpose."""

    @classmethod
    def of(cls, operation: str, argument: str, *, expected: str, got: str, way_out: str) -> Self:
        """Builds the message from its parts."""
        return cls(printable(f"{operation}: {argument}: expected {expected}, got {got}; {way_out}"))


class InputError(TacextError, ValueError):
    """An argument that cannot be used; the message names it, what was expected and the way out."""


class FileError(TacextError, OSError):
    """A file that cannot be read, trusted or written; the message names it and the way out."""


class DependencyError(TacextError, ImportError):
    """An optional dependency that is not installed; the message says how to install it."""


def check_choice(
    operation: str, argument: str, value: object, choices: tuple[str, ...], default: str
) -> None:
    """Raises InputError unless `value` is one of `choices`."""
    if value not in choices:
        raise InputError.of(
            operation,
            argument,
            expected=" or ".join(map(repr, choices)),
            got=repr(value),
            way_out=f"leave it out for {default!r}",
        )


class HeadNotFoundError(InputError):
    """The model's last linear layer could not be found by itself; name it with `head=`."""


class NotFiniteError(InputError):
    """Logits of NaN or infinity."""


class NoGradientError(InputError):
    """The model has no gradient with respect to its inputs."""
