"""Fits guards on clean latents of every model, and measures what they flag.

    python benchmarks/guard/collect_guards.py --data DIR --zoo DIR --latents DIR
        [--models FOLDER] [--only TEXT ...]

The zoo's models come from detection/make_zoo.py; FOLDER, of published ones, holds a zoo.py as for
published_models.py. Latents are computed once and kept in --latents. Each guard promises 1 % false
alarms and is fitted on 2,500, 500 and 200 clean images; of the smaller numbers there are five
choices. The shares flagged of 3,000 other clean images, and of triggered ones that reach their
target, go to results.json, from which `report_guards.py` prints the tables.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from latents import Latents, latents_of
from repair_cases import names
from torch import Tensor

from tacext.guard_fit import fit_scorer, perturbations_of
from tacext.guard_scoring import GuardScorer

RESULTS = Path(__file__).resolve().parent / "results.json"
RATE = 0.01
SAMPLES = (2500, 500, 200)
CHOICES = 5


def fit(latents: Latents, samples: int, seed: int) -> GuardScorer:
    """What `Guard.fit` makes of so many of the clean images."""
    chosen = torch.randperm(len(latents.clean), generator=torch.Generator().manual_seed(seed))
    clean = latents.clean[chosen[:samples]]
    logits = logits_of(latents, clean)
    perturbation = perturbations_of(clean, logits, latents.weight, "collect_guards")
    return fit_scorer(clean, logits, perturbation, RATE, seed, "collect_guards")


def logits_of(latents: Latents, phi: Tensor) -> Tensor:
    """W phi + b."""
    return phi @ latents.weight.T + latents.bias


def measure(latents: Latents, samples: int, seed: int) -> dict[str, Any]:
    """What one guard flags."""
    scorer = fit(latents, samples, seed)
    clean = scorer(latents.measured, logits_of(latents, latents.measured))
    found: dict[str, Any] = {
        "samples": samples,
        "seed": seed,
        "false_alarms": round(float(clean.flagged.double().mean()), 5),
        "flagged": [],
    }
    for phi, goal in zip(latents.triggered, latents.goals, strict=True):
        logits = logits_of(latents, phi)
        reached = logits.argmax(1) == goal
        flagged = scorer(phi, logits).flagged[reached]
        found["flagged"].append(round(float(flagged.double().mean()), 5))
    return found


def main() -> None:
    """Measures all models, and writes the results as a whole."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--zoo", type=Path, required=True, metavar="DIR")
    parser.add_argument("--latents", type=Path, required=True, metavar="DIR")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="of published models")
    parser.add_argument("--only", nargs="+", default=[""], help="names that contain one of these")
    options = parser.parse_args()
    known = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for clean in (False, True):
        for name in names(options.zoo, options.models, clean, options.only):
            try:
                latents = latents_of(
                    name, options.latents, options.data, options.zoo, options.models
                )
            except OSError as error:  # a trigger that is not there
                print(f"{name}: {error}", flush=True)
                continue
            runs = [
                measure(latents, samples, seed)
                for samples in SAMPLES
                for seed in range(1 if samples == SAMPLES[0] else CHOICES)
            ]
            known[name] = {
                "attack": latents.attack,
                "dataset": latents.dataset,
                "network": latents.network,
                "classes": len(latents.weight),
                "latents": latents.weight.shape[1],
                "runs": runs,
            }
            print(f"{name}: {runs[0]}", flush=True)
    unfinished = RESULTS.with_suffix(".part")
    text = json.dumps(dict(sorted(known.items())), indent=None, separators=(",", ":"))
    unfinished.write_text(text.replace('},"', '},\n"') + "\n", encoding="utf-8")
    unfinished.rename(RESULTS)


if __name__ == "__main__":
    main()
