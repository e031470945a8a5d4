"""Draws the evidence from every model of the zoo: a few kilobytes each, kept in evidence/.

    python benchmarks/detection/collect_evidence.py --data DIR --zoo DIR [--only TEXT] [--workers N]

Statistics are developed and tested on these files in seconds; the weights are not kept. A model
whose evidence is there is skipped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import images
import torch
from make_zoo import Record, load_model, read_record
from torch import Tensor, nn

from tacext import ImageSet
from tacext.corner_patches import CornerPatches
from tacext.data import as_batches
from tacext.data_free import observe_prototypes
from tacext.differentiable import InputBox
from tacext.heads import find_head
from tacext.observation import Metric, observe, solve, solve_balanced
from tacext.sample_keeper import LookKeeper
from tacext.second_look import MOST_CLASSES, look_again, shuffle_budgets
from tacext.source_patch import SourcePatch
from tacext.waves import Waves

EVIDENCE = Path(__file__).resolve().parent / "evidence"
SAMPLES = 2500
NORMS: tuple[tuple[Metric, float, int], ...] = (
    ("standardized", 1.0, SAMPLES),
    ("standardized", 0.99, SAMPLES),
    ("l2", 1.0, SAMPLES),
    ("l2", 0.99, SAMPLES),
    ("standardized", 1.0, 500),
    ("standardized", 1.0, 100),
)


def _rounded(values: Tensor) -> Any:
    """Four significant digits, as nested lists."""
    flat = [float(f"{x:.4g}") for x in values.double().flatten().tolist()]
    return torch.tensor(flat, dtype=torch.float64).reshape(values.shape).tolist()


def _norms(model: nn.Module, data: ImageSet) -> dict[str, list[float]]:
    found = {}
    for metric, quantile, samples in NORMS:
        part = data.sample(min(samples, len(data)), seed=1)
        seen = observe(
            model,
            part,
            head=None,
            batch_size=256,
            progress=False,
            operation="scan",
            quantile=quantile,
        )
        perturbations, _ = solve(seen, metric, operation="scan")
        found[f"{metric} {quantile:g} {samples}"] = _rounded(perturbations.norm)
        if metric == "standardized":
            balanced = solve_balanced(seen)
            assert balanced is not None  # latents of the zoo vary
            found[f"balanced {quantile:g} {samples}"] = _rounded(balanced.norm)
    return found


def _look(model: nn.Module, data: ImageSet, seed: int) -> dict[str, Any]:
    """What a thorough scan sees beside the norms."""
    keeper = LookKeeper(seed)
    for inputs, labels in as_batches(data, operation="scan", batch_size=256):
        keeper.add(inputs, labels)
    inputs, labels = keeper.all.samples()
    assert keeper.by_class is not None
    head = find_head(model, inputs[:4])
    assert head.num_classes <= MOST_CLASSES  # of more, a scan looks at some, by their norms
    found = look_again(
        model,
        head,
        (inputs, labels),
        tuple(range(head.num_classes)),
        keeper.by_class.samples(),
        seed=seed,
        progress=False,
    )
    shuffled, reached = found.shuffle, found.reach
    assert reached is not None
    assert found.patch is not None  # all images of the zoo have room for patches
    seen, noise = observe_prototypes(
        model, head, InputBox.unit(inputs.shape[1:]), batch_size=128, seed=seed, progress=False
    )
    return {
        "prototype_norm": _rounded(solve(seen, "standardized", operation="scan")[0].norm),
        "margin": {
            "margin": _rounded(noise.margin.mean(1)),
            "seconds": round(noise.seconds, 2),
        },
        "patch": {
            "side": found.patch.side,
            "rate": _rounded(found.patch.rate),
            "gain": _rounded(found.patch.gain),
            "images": found.patch.images,
            "seconds": round(found.patch.seconds, 2),
        },
        "reach": {
            "budgets": reached.budgets,
            "gain": _rounded(reached.gain),
            "rate": _rounded(reached.rate),
            "scale": float(f"{reached.scale:.4g}"),
            "seconds": round(reached.seconds, 2),
        },
        "source": _source(found.source),
        "waves": _waves(found.waves),
        "corners": _corners(found.corners),
        "shuffle": shuffled
        and {
            "share": float(f"{shuffled.share:.4g}"),
            "budget": shuffled.budget,
            "budgets": shuffle_budgets(reached.budgets),
            "destinations": shuffled.destinations,
            "seconds": round(shuffled.seconds, 2),
        },
    }


def _source(found: SourcePatch | None) -> dict[str, Any] | None:
    if found is None:
        return None
    told = {name: value for name, value in vars(found).items() if name != "pattern"}
    return told | {"seconds": round(found.seconds, 2)}


def _waves(found: Waves | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "rate": _rounded(found.rate),
        "beside": _rounded(found.beside),
        "wave": found.wave.tolist(),
        "images": found.images,
        "seconds": round(found.seconds, 2),
    }


def _corners(found: CornerPatches | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "sides": found.sides,
        "gain": _rounded(found.gain),
        "rate": _rounded(found.rate),
        "images": found.images,
        "scale": float(f"{found.scale:.4g}"),
        "corner": found.corner.tolist(),
        "seconds": round(found.seconds, 2),
    }


def collect(model: nn.Module, data: ImageSet, seed: int = 0) -> dict[str, Any]:
    """All evidence of one model, on clean images that it was not trained on."""
    part = data.sample(min(SAMPLES, len(data)), seed=1)
    return {"norms": _norms(model, data), **_look(model, part, seed)}


def _collect_one(record: Record, data_folder: Path, zoo: Path) -> tuple[str, float]:
    begin = time.perf_counter()
    torch.set_num_threads(1)
    data = images.load(record.spec.dataset, data_folder)
    model = load_model(record.spec, data, zoo)
    evidence = {
        "targets": record.targets,
        "acc": record.acc,
        "asr": record.asr,
        "training_seconds": record.seconds,
        **collect(model, data.test),
    }
    unfinished = EVIDENCE / f"{record.spec.name}.part"
    unfinished.write_text(json.dumps(evidence, separators=(",", ":")) + "\n", encoding="utf-8")
    unfinished.rename(EVIDENCE / f"{record.spec.name}.json")
    return record.spec.name, time.perf_counter() - begin


def main() -> None:
    """Collects what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--zoo", type=Path, required=True, metavar="DIR")
    parser.add_argument("--only", default="", help="names that contain this text")
    parser.add_argument("--workers", type=int, default=2, help="models at a time, a thread each")
    options = parser.parse_args()
    EVIDENCE.mkdir(exist_ok=True)
    records = [read_record(file) for file in sorted(options.zoo.glob("*.json"))]
    wanted = [
        record
        for record in records
        if record.usable
        and options.only in record.spec.name
        and not (EVIDENCE / f"{record.spec.name}.json").exists()
    ]
    print(f"{len(records)} models, {len(wanted)} to look at", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        runs = [pool.submit(_collect_one, r, options.data, options.zoo) for r in wanted]
        for done, run in enumerate(as_completed(runs), 1):
            name, seconds = run.result()
            print(f"[{done}/{len(wanted)}] {name}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
