"""How well clean models read images with a trigger: what a repair can give back at best.

    python benchmarks/repair/read_by_clean_models.py --data DIR --zoo DIR

A trigger hides part of the image, and of a model that never knew it some images are lost as well. For
every backdoored model of the zoo, clean ones of the same network and data are shown the images that
its repairs are measured on. Their accuracy goes to results/clean_models.json, from where
`report_repairs.py` takes it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean

import torch
from collect_repairs import RESULTS
from repair_cases import names, of_the_zoo

FILE = RESULTS / "clean_models.json"


def read_by_clean_models(name: str, data: Path, zoo: Path) -> dict[str, float] | None:
    """The mean accuracy of all usable clean twins on clean and on triggered images; None without any."""
    case = of_the_zoo(name, data, zoo, seed=0)
    start = f"{case.dataset}-{case.network}-clean-"
    twins = names(zoo, None, clean=True, only=[start])
    if not twins:
        return None
    found = [
        evaluation
        for twin in twins
        for evaluation in case.measure(of_the_zoo(twin, data, zoo, seed=0).model)
    ]
    return {
        "models": len(twins),
        "acc": round(mean(f.acc for f in found), 4),
        "ra": round(mean(f.ra for f in found), 4),
    }


def main() -> None:
    """Writes the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--zoo", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    for name in names(options.zoo, None, clean=False, only=[""]):
        if not (RESULTS / name).is_dir():  # nothing was repaired
            continue
        read = read_by_clean_models(name, options.data, options.zoo)
        if read is not None:
            found[name] = read
        print(name, read, flush=True)
    FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
