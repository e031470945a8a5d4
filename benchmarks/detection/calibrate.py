"""Fits the constants of the joint test on the evidence of clean models.

    python benchmarks/detection/calibrate.py > TABLE.json

`tacext.joint_test.calibration_from_json` reads the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import optimize, special

from tacext.joint_test import (
    KINDS,
    Calibration,
    JointNull,
    KindNull,
    calibration_from_json,
    fisher_sums,
    moderated_p_values,
)

EVIDENCE = Path(__file__).resolve().parent / "evidence"

_FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Case:
    """The evidence of one model, as the joint test wants it."""

    name: str
    attack: str
    network: str
    dataset: str
    targets: tuple[int, ...]
    evidence: dict[str, _FloatArray]
    raw: dict[str, Any]


def read_case(file: Path) -> Case:
    """Of evidence/NAME.json."""
    raw = json.loads(file.read_text(encoding="utf-8"))
    dataset, network, attack = file.stem.split("-")[:3]
    return Case(file.stem, attack, network, dataset, tuple(raw["targets"]), of_class(raw), raw)


def of_class(
    raw: dict[str, Any], norm: str = "standardized 0.99 2500", steps: int = 20
) -> dict[str, _FloatArray]:
    """One number a class and kind, larger where it is more suspicious."""

    def at(part: dict[str, Any], values: str) -> _FloatArray:
        return np.array(part[values][part["marks"].index(steps)])

    return {
        "norm": -np.log(np.array(raw["norms"][norm])),
        "noise_margin": np.log(np.maximum(at(raw["noise"], "mean"), 1e-2)),
        "clean_margin": np.log(np.maximum(at(raw["clean"], "mean"), 1e-2)),
        "reach": at(raw["reach"], "margin") / typical_margin(raw),
    }


def typical_margin(raw: dict[str, Any]) -> float:
    """What margins of this model are like: the median over the classes of those from noise."""
    part = raw["noise"]
    return float(np.median(part["mean"][part["marks"].index(20)]))


def fit_kind(models: Sequence[_FloatArray]) -> KindNull:
    """Smyth's moment estimates of the prior spread and its weight, from the variances' logarithms."""
    freedom = np.array([len(values) - 1.0 for values in models])
    logs = np.log([max(values.var(ddof=1), 1e-12) for values in models])
    e = logs - special.digamma(freedom / 2) + np.log(freedom / 2)
    excess = e.var(ddof=1) - special.polygamma(1, freedom / 2).mean()
    if excess <= special.polygamma(1, 500.0):
        weight = 1000.0
    else:
        found = optimize.brentq(lambda d: special.polygamma(1, d / 2) - excess, 1e-2, 2000)
        weight = float(found)
    log_spread = e.mean() + special.digamma(weight / 2) - np.log(weight / 2)
    return KindNull(float(np.exp(log_spread / 2)), weight)


def fit(cases: Sequence[Case]) -> Calibration:
    """All constants, from clean models."""
    kinds = {kind: fit_kind([case.evidence[kind] for case in cases]) for kind in KINDS}
    p_values = [
        {kind: moderated_p_values(case.evidence[kind], kinds[kind]) for kind in KINDS}
        for case in cases
    ]
    joint = {}
    for size in range(1, len(KINDS) + 1):
        for chosen in itertools.combinations(KINDS, size):
            sums = np.concatenate([fisher_sums([p[kind] for kind in chosen]) for p in p_values])
            mean, variance = max(sums.mean(), 2.0 * size), max(sums.var(), 4.0 * size)
            joint[chosen] = JointNull(float(mean**2 / variance), float(variance / mean))
    return Calibration(1, len(cases), kinds, joint)


def to_json(calibration: Calibration) -> str:
    """As `calibration_from_json` reads it."""
    table = {
        "version": calibration.version,
        "models": calibration.models,
        "made_by": "benchmarks/detection/calibrate.py",
        "kinds": {name: vars(null) for name, null in calibration.kinds.items()},
        "joint": {"+".join(name): vars(null) for name, null in calibration.joint.items()},
    }
    text = json.dumps(table, indent=1)
    assert calibration_from_json(text).models == calibration.models
    return text + "\n"


def main() -> None:
    """Prints the table."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    cases = [read_case(file) for file in sorted(EVIDENCE.glob("*.json"))]
    print(to_json(fit([case for case in cases if not case.targets])), end="")


if __name__ == "__main__":
    main()
