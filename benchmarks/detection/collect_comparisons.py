"""Runs tacext, MM-BD and Neural Cleanse on the same models, one after the other in one process.

    python benchmarks/detection/collect_comparisons.py --data DIR --zoo DIR [--models FOLDER]
        [--only TEXT ...] [--workers N] [--beside NAME ...] [--most-classes C] [--steps S]

The zoo's models come from make_zoo.py; FOLDER, of published ones, holds a zoo.py as for
published_models.py. What each detector said, and how long it took, is kept in comparisons/; a model
that is there is skipped. Neural Cleanse takes minutes a class, so that models of more than C classes
go without it. `report_comparisons.py` prints the table.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import calibrate
import images
import torch
from comparators import Comparison, mm_bd, neural_cleanse
from make_zoo import load_model, read_record
from torch import Tensor, nn

from tacext import scan
from tacext.differentiable import DifferentiableModel
from tacext.doubts import Doubt, doubted, sensible_accuracy
from tacext.heads import find_head
from tacext.joint_test import Calibration, shipped_calibration
from tacext.verdict import weigh

COMPARISONS = Path(__file__).resolve().parent / "comparisons"
ALPHA = 0.01
SAMPLES = 2500
COMPARATORS = ("MM-BD", "Neural Cleanse")


@dataclass(frozen=True, eq=False)
class Subject:
    """A model to compare on, with clean images in [0, 1] that it was not trained on."""

    name: str
    model: nn.Module
    inputs: Tensor
    labels: Tensor
    targets: tuple[int, ...]
    calibration: Calibration


def _of_the_zoo(name: str, data_folder: Path, zoo: Path) -> Subject:
    record = read_record(zoo / f"{name}.json")
    data = images.load(record.spec.dataset, data_folder)
    part = data.test.sample(min(SAMPLES, len(data.test)), seed=1)
    others = [c for c in calibrate.read_cases() if not c.targets]
    return Subject(
        name,
        load_model(record.spec, data, zoo),
        part.images.float() / 255,
        part.labels,
        record.targets,
        calibrate.fit([c for c in others if c.network != record.spec.network]),
    )


def _published(name: str, folder: Path) -> Subject:
    sys.path.insert(0, str(folder))
    case = importlib.import_module("zoo").load(name, n=10, clean=SAMPLES)
    targets = () if case.target is None else (case.target,)
    inputs = case.x_clean.float()
    return Subject(name, case.model, inputs, case.y_clean, targets, shipped_calibration())


def _told(found: Comparison) -> dict[str, Any]:
    fields = asdict(found)
    fields["statistic"] = [float(f"{x:.4g}") for x in found.statistic]
    fields["score"] = float(f"{found.score:.4g}")
    fields["seconds"] = round(found.seconds, 2)
    return fields


def _by_tacext(subject: Subject, depth: Any) -> dict[str, Any]:
    """A scan at default settings, judged by constants fitted without the model's kind."""
    begin = time.perf_counter()
    report = scan(subject.model, (subject.inputs, subject.labels), depth=depth, progress=False)
    seconds = time.perf_counter() - begin
    verdict, suspects, p_value = report.verdict, report.suspects, report.p_value
    first = suspects[0] if suspects else int(report.norm.argmin())
    if report.evidence is not None and report.evidence.look is not None:
        finding, evidence = weigh(report.test, report.evidence.look, ALPHA, subject.calibration)
        severe = report.accuracy < sensible_accuracy(report.num_classes)
        doubts = tuple(Doubt(warning, severe) for warning in report.warnings)
        finding = doubted(finding, doubts)
        verdict, suspects, p_value = finding.verdict, finding.suspects, finding.p_value
        first = suspects[0] if suspects else evidence.joint.most_suspicious
    return {
        "verdict": verdict,
        "flagged": verdict == "backdoored",
        "first": first,
        "p_value": float(f"{p_value:.3g}"),
        "seconds": round(seconds, 2),
        "seconds_in_the_model": round(report.timings.forward, 2),
    }


def compare(
    subject: Subject, beside: Sequence[str], most_classes: int, steps: int
) -> dict[str, Any]:
    """Tacext and the detectors beside it on one model."""
    inputs = subject.inputs
    head = find_head(subject.model, inputs[:4])
    model = DifferentiableModel(subject.model, head, "compare")
    for parameter in subject.model.parameters():
        parameter.requires_grad_(False)
    found = {
        "targets": subject.targets,
        "classes": head.num_classes,
        "thorough": _by_tacext(subject, "thorough"),
        "fast": _by_tacext(subject, "fast"),
        "norms": _by_tacext(subject, "norms"),
    }
    if "MM-BD" in beside:
        found["MM-BD"] = _told(mm_bd(model, tuple(inputs.shape[1:]), head.num_classes))
    if "Neural Cleanse" in beside and head.num_classes <= most_classes:
        found["Neural Cleanse"] = _told(neural_cleanse(model, inputs, head.num_classes, steps))
    return found


def _compare_one(
    name: str,
    data: Path,
    zoo: Path,
    published: Path | None,
    beside: Sequence[str],
    most_classes: int,
    steps: int,
) -> tuple[str, float]:
    begin = time.perf_counter()
    torch.set_num_threads(1)
    subject = _published(name, published) if published else _of_the_zoo(name, data, zoo)
    found = compare(subject, beside, most_classes, steps)
    unfinished = COMPARISONS / f"{name}.part"
    unfinished.write_text(json.dumps(found, separators=(",", ":")) + "\n", encoding="utf-8")
    unfinished.rename(COMPARISONS / f"{name}.json")
    return name, time.perf_counter() - begin


def main() -> None:
    """Compares what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--zoo", type=Path, required=True, metavar="DIR")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="of published models")
    parser.add_argument("--only", nargs="*", default=[""], help="names that contain one of these")
    parser.add_argument("--workers", type=int, default=2, help="models at a time, a thread each")
    parser.add_argument(
        "--beside", nargs="*", default=COMPARATORS, choices=COMPARATORS, help="detectors to run"
    )
    parser.add_argument("--most-classes", type=int, default=10, help="for Neural Cleanse")
    parser.add_argument("--steps", type=int, default=1000, help="of Neural Cleanse, at most")
    options = parser.parse_args()
    COMPARISONS.mkdir(exist_ok=True)
    records = [read_record(file) for file in sorted(options.zoo.glob("*.json"))]
    names: dict[str, Path | None] = {r.spec.name: None for r in records if r.usable}
    if options.models is not None:
        sys.path.insert(0, str(options.models))
        published = importlib.import_module("zoo").MODELS
        names = dict.fromkeys(published, options.models) | names
    wanted = [
        name
        for name in names
        if any(text in name for text in options.only)
        and not (COMPARISONS / f"{name}.json").exists()
    ]
    print(f"{len(names)} models, {len(wanted)} to compare on", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
        more = options.beside, options.most_classes, options.steps
        runs = [
            pool.submit(_compare_one, name, options.data, options.zoo, names[name], *more)
            for name in wanted
        ]
        for done, run in enumerate(as_completed(runs), 1):
            name, seconds = run.result()
            print(f"[{done}/{len(wanted)}] {name}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
