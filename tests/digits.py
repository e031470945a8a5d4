"""Real models on real data for the tests: the demo's digit classifiers, trained once a session."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import nn

from tacext import demo


@dataclass(frozen=True)
class DigitCase:
    """A backdoored and a clean classifier of handwritten digits, and the data behind them."""

    backdoored: nn.Module
    clean: nn.Module
    data: demo.DemoData


@functools.cache
def digit_case() -> DigitCase:
    data = demo.load_digits()
    return DigitCase(
        backdoored=demo.train(*demo.poison(*data.training)),
        clean=demo.train(*data.training),
        data=data,
    )
