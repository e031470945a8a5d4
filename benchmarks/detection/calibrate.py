"""Fits the constants of the joint test on the evidence of clean models.

    python benchmarks/detection/calibrate.py

Writes python/tacext/calibration.json, which comes with the package.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy import optimize, special, stats

from tacext.corner_patches import CornerPatches
from tacext.joint_test import (
    COMBINATIONS,
    KINDS,
    Calibration,
    JointNull,
    KindNull,
    NormalNull,
    calibration_from_json,
    joint_scores,
    logit_of_share,
    moderated_p_values,
)
from tacext.second_look import (
    corner_evidence,
    margin_evidence,
    norm_evidence,
    reach_evidence,
    share_evidence,
)
from tacext.source_patch import SourcePatch
from tacext.waves import Waves

EVIDENCE = Path(__file__).resolve().parent / "evidence"
TABLE = Path(__file__).resolve().parents[2] / "python" / "tacext" / "calibration.json"
VERSION = 10

# The norms that the constants are fitted on: those of a scan by default.
NORM = "standardized 1 2500"
BALANCED = "balanced 1 2500"

# Fewer clean models tell nothing of the tail of a law.
FEWEST_MODELS = 8

# Moments of a few dozen logits are known no better than so.
_SMALLEST_SPREAD = 1e-3

_FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Case:
    """The evidence of one model, as the joint test wants it; older files lack some kinds."""

    name: str
    attack: str
    network: str
    dataset: str
    targets: tuple[int, ...]
    evidence: dict[str, _FloatArray]
    shuffle: float | None
    patch: float | None
    source: float | None
    wave: float | None
    raw: dict[str, Any]


def read_case(file: Path, norm: str = NORM) -> Case:
    """Of evidence/NAME.json."""
    raw = json.loads(file.read_text(encoding="utf-8"))
    dataset, network, attack = file.stem.split("-")[:3]
    evidence = {
        "norm": norm_evidence(np.array(raw["norms"][norm])),
        "balanced": norm_evidence(np.array(raw["norms"][BALANCED])),
        "reach": reach_evidence(np.array(raw["reach"]["gain"])),
    }
    if "patch" in raw:
        images = raw["patch"]["images"]
        evidence["share"] = share_evidence(np.array(raw["reach"]["rate"][-1]), images)
        evidence["patch"] = share_evidence(np.array(raw["patch"]["rate"]), images)
    if raw.get("corners") is not None:
        evidence["corner"] = corner_evidence(np.array(raw["corners"]["gain"]))
    if "prototype_norm" in raw:
        evidence["margin"] = margin_evidence(np.array(raw["margin"]["margin"]))
        evidence["prototype"] = norm_evidence(np.array(raw["prototype_norm"]))
    shuffled = raw["shuffle"]["share"] if raw["shuffle"] else None
    patched = max(raw["patch"]["rate"]) if "patch" in raw else None
    led = source_of(raw)
    source = None if led is None else led.log_odds_ratio
    waved = waves_of(raw)
    return Case(
        name=file.stem,
        attack=attack,
        network=network,
        dataset=dataset,
        targets=tuple(raw["targets"]),
        evidence=evidence,
        shuffle=shuffled,
        patch=patched,
        source=source,
        wave=None if waved is None else float(waved.selectivity.max()),
        raw=raw,
    )


def source_of(raw: dict[str, Any]) -> SourcePatch | None:
    """The patch of a single class as the evidence tells it; older files have none."""
    found = raw.get("source")
    if found is None:
        return None
    unknown = {"pattern": torch.zeros(0), "looked_at": ()}  # older files do not tell
    return SourcePatch(**(unknown | found | {"corner": tuple(found["corner"])}))


def waves_of(raw: dict[str, Any]) -> Waves | None:
    """The waves as the evidence tells them; older files have none."""
    found = raw.get("waves")
    if found is None:
        return None
    rate, beside = (torch.tensor(found[name], dtype=torch.float64) for name in ("rate", "beside"))
    return Waves(rate, beside, torch.tensor(found["wave"]), found["images"], found["seconds"])


def corners_of(raw: dict[str, Any]) -> CornerPatches | None:
    """The squares in corners as the evidence tells them; older files have none."""
    found = raw.get("corners")
    if found is None:
        return None
    gain, rate = (torch.tensor(found[name], dtype=torch.float64) for name in ("gain", "rate"))
    return CornerPatches(
        classes=tuple(range(gain.shape[1])),
        sides=tuple(found["sides"]),
        gain=gain,
        rate=rate,
        images=found["images"],
        scale=found["scale"],
        corner=torch.tensor(found["corner"]),
        pattern=(),
        seconds=found["seconds"],
    )


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


def fit_normal(numbers: Sequence[float]) -> NormalNull:
    """Their mean and spread."""
    values = np.array(numbers)
    spread = max(float(values.std(ddof=1)), _SMALLEST_SPREAD)
    return NormalNull(float(values.mean()), spread, len(values))


def fit(cases: Sequence[Case]) -> Calibration:
    """All constants, from clean models."""
    kinds = {}
    for kind in KINDS:
        known = [case.evidence[kind] for case in cases if kind in case.evidence]
        if len(known) < FEWEST_MODELS:
            raise ValueError(
                f"{kind}: {len(known)} clean models have it, {FEWEST_MODELS} are needed"
            )
        kinds[kind] = fit_kind(known)
    joint: dict[tuple[str, ...], JointNull] = {}
    for chosen in COMBINATIONS:
        complete = [case.evidence for case in cases if set(chosen) <= set(case.evidence)]
        largest = [
            joint_scores([moderated_p_values(e[kind], kinds[kind]) for kind in chosen]).max()
            for e in complete
        ]
        classes = np.array([float(len(e["norm"])) for e in complete])
        joint[chosen] = fit_joint(np.array(largest), classes)
    shuffled = [logit_of_share(case.shuffle) for case in cases if case.shuffle is not None]
    patched = [logit_of_share(case.patch) for case in cases if case.patch is not None]
    led = [case.source for case in cases if case.source is not None]
    waved = [case.wave for case in cases if case.wave is not None]
    others = (fit_normal(numbers) for numbers in (shuffled, patched, led, waved))
    return Calibration(VERSION, len(cases), kinds, joint, *others)


def to_json(calibration: Calibration) -> str:
    """As `calibration_from_json` reads it."""

    def rounded(null: KindNull | JointNull | NormalNull) -> dict[str, float]:
        return {name: float(f"{value:.4g}") for name, value in vars(null).items()}

    table = {
        "version": calibration.version,
        "models": calibration.models,
        "made_by": "benchmarks/detection/calibrate.py",
        "kinds": {name: rounded(null) for name, null in calibration.kinds.items()},
        "joint": {"+".join(name): rounded(null) for name, null in calibration.joint.items()},
        "shuffle": rounded(calibration.shuffle),
        "patch": rounded(calibration.patch),
        "source": rounded(calibration.source),
        "wave": rounded(calibration.wave),
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
