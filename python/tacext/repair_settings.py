"""What the settings of all repair methods share, and how they are checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from . import ops
from .errors import InputError


def is_whole(value: object) -> bool:
    """Whether it is an int, and no bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether it is a finite number, and no bool."""
    return ops.is_number(value) and not isinstance(value, bool)


@dataclass(frozen=True, kw_only=True)
class RepairSettings:
    """What every method of repair has.

    Attributes:
        batch_size: samples in a step, and in a pass.
        holdout: share of the clean data kept out of the repair, to measure accuracy on.
        seed: of the split, and of all that is random.
    """

    batch_size: int = 128
    holdout: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        check_settings(self, ())


def check_settings(settings: RepairSettings, own: Sequence[tuple[str, bool, str]]) -> None:
    """Raises InputError for the first attribute that is not what it must be.

    Args:
        settings: of any method; its numbers are made Python floats, as numpy's have no place in JSON.
        own: name, whether it is good, and what is expected, of the method's own attributes.
    """
    shared = (
        ("batch_size", is_whole(settings.batch_size) and settings.batch_size >= 2, "at least 2"),
        ("holdout", is_number(settings.holdout) and 0 < settings.holdout < 1, "between 0 and 1"),
        (
            "seed",
            is_whole(settings.seed) and 0 <= settings.seed < 2**31,
            "a whole number below 2**31",
        ),
    )
    for name, good, expected in (*own, *shared):
        if not good:
            raise InputError.of(
                type(settings).__name__,
                name,
                expected=expected,
                got=repr(getattr(settings, name)),
                way_out="leave it out for the default",
            )
    for name, value in _numbers(settings):
        object.__setattr__(settings, name, float(value))


def _numbers(settings: RepairSettings) -> list[tuple[str, Any]]:
    """Attributes that are declared as floats."""
    return [
        (field.name, getattr(settings, field.name))
        for field in fields(settings)
        if field.type == "float"
    ]
