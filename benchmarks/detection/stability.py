"""Whether verdicts hold with fewer samples, other samples, wrong labels and images of another kind.

    python benchmarks/detection/stability.py --models FOLDER [--only TEXT] [--depth DEPTH]

FOLDER holds a zoo.py with MODELS and load(name, n, clean), as for published_models.py. Prints
Markdown: a row a model, a column a condition.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor

from tacext import scan
from tacext.scan_report import Depth

_Pair = tuple[Tensor, Tensor]


def _some(count: int, seed: int) -> Callable[[_Pair], _Pair]:
    """So many samples, drawn at random."""

    def choose(data: _Pair) -> _Pair:
        generator = torch.Generator().manual_seed(seed)
        index = torch.randperm(len(data[1]), generator=generator)[:count]
        return data[0][index], data[1][index]

    return choose


def _wrong_labels(share: float) -> Callable[[_Pair], _Pair]:
    """So many labels replaced by a random one."""

    def spoil(data: _Pair) -> _Pair:
        generator = torch.Generator().manual_seed(0)
        inputs, labels = data[0], data[1].clone()
        victims = torch.rand(len(labels), generator=generator) < share
        other = torch.randint(0, int(labels.max()) + 1, labels.shape, generator=generator)
        return inputs, torch.where(victims, other, labels)

    return spoil


def _foreign(data: _Pair) -> _Pair:
    """Images of no class: the pixels of each are the mean of it and of its mirror, upside down."""
    inputs, labels = data
    return (inputs + inputs.flip(-1)).flip(-2) / 2, labels


CONDITIONS: dict[str, Callable[[_Pair], _Pair]] = {
    "2,500": lambda data: data,
    "1,000, seed 1": _some(1000, 1),
    "1,000, seed 2": _some(1000, 2),
    "500, seed 1": _some(500, 1),
    "500, seed 2": _some(500, 2),
    "100": _some(100, 1),
    "10 % wrong labels": _wrong_labels(0.1),
    "foreign images": _foreign,
}


def cell(model: Any, data: _Pair, seed: int, depth: Depth) -> str:
    """The verdict with its p-value."""
    report = scan(model, data, depth=depth, seed=seed)
    suspects = "".join(f" {k}" for k in report.suspects)
    return f"{report.verdict}{suspects}, {report.p_value:.1g}"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--models", required=True, help="folder of zoo.py")
    parser.add_argument("--only", default="", help="names that contain this text")
    parser.add_argument("--depth", choices=get_args(Depth), default="thorough")
    options = parser.parse_args()
    sys.path.insert(0, options.models)
    zoo = importlib.import_module("zoo")
    print("| model | target |", " | ".join(CONDITIONS), "|")
    print("|---" * (len(CONDITIONS) + 2) + "|")
    for name in (name for name in zoo.MODELS if options.only in name):
        case = zoo.load(name, n=10, clean=2500)
        cells = [
            cell(case.model, change((case.x_clean, case.y_clean)), seed, options.depth)
            for seed, change in enumerate(CONDITIONS.values())
        ]
        target = "none" if case.target is None else str(case.target)
        print(f"| {name} | {target} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
