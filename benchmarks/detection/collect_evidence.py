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
from tacext.heads import find_head
from tacext.max_margin import DifferentiableModel, InputBox, MaxMargin, max_margin
from tacext.reach import Job, Reach, reach
from tacext.scanning import Metric, observe, solve

EVIDENCE = Path(__file__).resolve().parent / "evidence"
SAMPLES = 2500
MARKS = (5, 10, 20, 40)
NORMS: tuple[tuple[Metric, float, int], ...] = (
    ("standardized", 1.0, SAMPLES),
    ("standardized", 0.99, SAMPLES),
    ("l2", 1.0, SAMPLES),
    ("l2", 0.99, SAMPLES),
    ("standardized", 0.99, 500),
    ("standardized", 0.99, 100),
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
    return found


def _ascent(found: MaxMargin) -> dict[str, Any]:
    return {
        "marks": found.marks,
        "mean": _rounded(found.history.mean(2)),
        "max": _rounded(found.history.amax(2)),
        "seconds": round(found.seconds, 2),
    }


def _reach(found: Reach) -> dict[str, Any]:
    to_target, elsewhere = [], []
    for job, moved in zip(found.jobs, found.moved, strict=True):
        others = [c for c in range(len(moved)) if c not in (job.source, job.target)]
        to_target.append(moved[others, job.target].mean())
        away = moved[others].clone()
        away[range(len(others)), others] = 0
        away[:, job.target] = 0
        elsewhere.append(away.amax(1).mean())
    return {
        "jobs": [[job.source, job.target] for job in found.jobs],
        "marks": found.marks,
        "margin": _rounded(found.history),
        "rate": _rounded(found.rate),
        "others_to_target": _rounded(torch.stack(to_target)),
        "others_elsewhere": _rounded(torch.stack(elsewhere)),
        "seconds": round(found.seconds, 2),
    }


def collect(model: nn.Module, data: ImageSet, seed: int = 0) -> dict[str, Any]:
    """All evidence of one model, on clean images that it was not trained on."""
    part = data.sample(min(SAMPLES, len(data)), seed=1)
    inputs, labels = part.images[:1000].float() / 255, part.labels[:1000]
    head = find_head(model, inputs[:4])
    model_with_gradients = DifferentiableModel(model, head, "scan")
    box = InputBox.unit(inputs.shape[1:])
    fit, held_out = (inputs[:600], labels[:600]), (inputs[600:800], labels[600:800])
    classes = [k for k in range(head.num_classes) if bool((fit[1] == k).any())]
    quiet: dict[str, Any] = {"progress": False, "seed": seed}
    evidence: dict[str, Any] = {
        "norms": _norms(model, data),
        "noise": _ascent(max_margin(model_with_gradients, box, steps=40, marks=MARKS, **quiet)),
        "clean": _ascent(
            max_margin(model_with_gradients, box, steps=40, marks=MARKS, first=inputs[:8], **quiet)
        ),
        "reach": _reach(
            reach(
                model_with_gradients,
                box,
                fit,
                held_out,
                [Job(k) for k in range(head.num_classes)],
                images=16,
                marks=(10,),
                **quiet,
            )
        ),
    }
    if head.num_classes <= 10:
        pairs = [Job(b, a) for a in classes for b in classes if a != b]
        evidence["pairs"] = _reach(
            reach(model_with_gradients, box, fit, held_out, pairs, steps=12, images=10, **quiet)
        )
    weight = head.weight.detach()
    evidence["head"] = {
        "row_norm": _rounded(weight.norm(dim=1)),
        "row_mean": _rounded(weight.mean(1)),
        "bias": _rounded(head.module.bias.detach()) if head.module.bias is not None else None,
    }
    return evidence


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
