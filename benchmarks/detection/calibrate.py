"""Fits the constants of the joint test on the evidence of clean models.

    python benchmarks/detection/calibrate.py

Writes python/tacext/calibration.json, which comes with the package.
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
from scipy import optimize, special, stats

from tacext.joint_test import (
    KINDS,
    Calibration,
    JointNull,
    KindNull,
    ShuffleNull,
    calibration_from_json,
    joint_scores,
    moderated_p_values,
)
from tacext.second_look import norm_evidence, reach_evidence

EVIDENCE = Path(__file__).resolve().parent / "evidence"
TABLE = Path(__file__).resolve().parents[2] / "python" / "tacext" / "calibration.json"
VERSION = 1

# The norms that the constants are fitted on: those of a scan by default.
NORM = "standardized 1 2500"

# Moments of a few dozen logits are known no better than so.
_SMALLEST_SPREAD = 1e-3

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
    shuffle: float | None
    raw: dict[str, Any]


def read_case(file: Path, norm: str = NORM) -> Case:
    """Of evidence/NAME.json."""
    raw = json.loads(file.read_text(encoding="utf-8"))
    dataset, network, attack = file.stem.split("-")[:3]
    evidence = {
        "norm": norm_evidence(np.array(raw["norms"][norm])),
        "reach": reach_evidence(np.array(raw["reach"]["gain"])),
    }
    shuffled = raw["shuffle"]["share"] if raw["shuffle"] else None
    return Case(file.stem, attack, network, dataset, tuple(raw["targets"]), evidence, shuffled, raw)


def read_cases() -> list[Case]:
    """All of them."""
    return [read_case(file) for file in sorted(EVIDENCE.glob("*.json"))]


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


def fit_joint(largest: _FloatArray, classes: _FloatArray) -> JointNull:
    """The gamma law whose largest of C draws is most likely to give these largest scores."""

    def surprise(parameters: _FloatArray) -> float:
        shape, scale = np.exp(parameters)
        single = stats.gamma(shape, scale=scale)
        likelihood = single.logpdf(largest) + (classes - 1) * single.logcdf(largest)
        return -float(likelihood.sum())

    start = np.log([1.0, 2.0])
    found = optimize.minimize(surprise, start, method="Nelder-Mead", options={"xatol": 1e-6})
    shape, scale = np.exp(found.x)
    return JointNull(float(shape), float(scale), len(largest))


def fit_shuffle(shares: Sequence[float]) -> ShuffleNull:
    """Mean and spread of the logits."""
    logits = special.logit(np.clip(shares, 1e-3, 1 - 1e-3))
    spread = max(float(logits.std(ddof=1)), _SMALLEST_SPREAD)
    return ShuffleNull(float(logits.mean()), spread, len(logits))


def fit(cases: Sequence[Case]) -> Calibration:
    """All constants, from clean models."""
    kinds = {kind: fit_kind([case.evidence[kind] for case in cases]) for kind in KINDS}
    p_values = [
        {kind: moderated_p_values(case.evidence[kind], kinds[kind]) for kind in KINDS}
        for case in cases
    ]
    classes = np.array([float(len(case.evidence["norm"])) for case in cases])
    joint = {}
    for size in range(1, len(KINDS) + 1):
        for chosen in itertools.combinations(KINDS, size):
            largest = [joint_scores([p[kind] for kind in chosen]).max() for p in p_values]
            joint[chosen] = fit_joint(np.array(largest), classes)
    shares = [case.shuffle for case in cases if case.shuffle is not None]
    return Calibration(VERSION, len(cases), kinds, joint, fit_shuffle(shares))


def to_json(calibration: Calibration) -> str:
    """As `calibration_from_json` reads it."""

    def rounded(null: KindNull | JointNull | ShuffleNull) -> dict[str, float]:
        return {name: float(f"{value:.4g}") for name, value in vars(null).items()}

    table = {
        "version": calibration.version,
        "models": calibration.models,
        "made_by": "benchmarks/detection/calibrate.py",
        "kinds": {name: rounded(null) for name, null in calibration.kinds.items()},
        "joint": {"+".join(name): rounded(null) for name, null in calibration.joint.items()},
        "shuffle": rounded(calibration.shuffle),
    }
    text = json.dumps(table, indent=1)
    assert calibration_from_json(text).models == calibration.models
    return text + "\n"


def main() -> None:
    """Writes the table."""
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args()
    clean = [case for case in read_cases() if not case.targets]
    TABLE.write_text(to_json(fit(clean)), encoding="utf-8")
    print(f"fitted on {len(clean)} clean models: {TABLE}")


if __name__ == "__main__":
    main()
