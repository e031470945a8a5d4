"""Repairs models with tacext and with the removals of others, and keeps what came out.

    python benchmarks/repair/collect_repairs.py --data DIR --zoo DIR [--models FOLDER]
        [--methods NAME ...] [--only TEXT ...] [--samples N ...] [--targets given|detected]
        [--clean] [--seed S] [--effort SHARE] [--jobs N]

The zoo's models come from detection/make_zoo.py; FOLDER, of published ones, holds a zoo.py as for
published_models.py. Each removal of each model becomes results/MODEL/METHOD.json; one that is there
is skipped. Methods are those of `other_removals.py`, `tacext-paper` (the loss as published) and
`tacext-NAME` for every method of `tacext.repair`. These are told the targets, or with
`--targets detected` are handed a thorough scan of the same images and no target; the gate is on for
`tacext-auto` alone. With `--clean` clean models are wrongly repaired, and only accuracy is measured.
`report_repairs.py` prints the tables.

Seconds are of the processor, on one thread; they do not depend on what else the machine does.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, cast, get_args

import torch
from clean_images import CleanImages, DivergedError
from other_removals import REMOVALS, remove
from repair_cases import MOST_SAMPLES, RepairCase, names, of_the_zoo, published
from torch import nn

from tacext import Evaluation, FinetuneSettings, ScanReport, TacextError, repair, scan
from tacext.repair_methods import Method

RESULTS = Path(__file__).resolve().parent / "results"
ACCURACY_DROP = 0.02  # what the gate of tacext-auto allows
TACEXT = ("tacext-paper", *(f"tacext-{name}" for name in get_args(Method)))


@dataclass(frozen=True)
class Plan:
    """Which repair of a model to make.

    Attributes:
        method: see the module.
        samples: clean images for the defender.
        detected: whether tacext is told what a scan suspects, not the targets.
        seed: of the split of the images and of the removal.
        effort: share of each removal's usual effort; tacext has none.
    """

    method: str
    samples: int
    detected: bool
    seed: int
    effort: float

    @property
    def file(self) -> str:
        """The usual case has the shortest name."""
        parts = [self.method]
        parts += [] if self.samples == MOST_SAMPLES else [str(self.samples)]
        parts += ["detected"] if self.detected else []
        parts += [f"seed{self.seed}"] if self.seed else []
        parts += [] if self.effort == 1 else [f"effort{self.effort:g}"]
        return "-".join(parts) + ".json"


@dataclass(frozen=True)
class Outcome:
    """A repaired model, and what is to be told of how it came about."""

    model: nn.Module
    told: dict[str, Any]


def _by_tacext(
    case: RepairCase, clean: CleanImages, plan: Plan, report: ScanReport | None
) -> Outcome:
    targets = case.targets if report is None else (*report.suspects, *report.doubtful)
    told: dict[str, Any] = {"targets": list(targets), "effort": 1}
    if report is not None:
        told |= {"verdict": report.verdict, "p_value": float(f"{report.p_value:.3g}")}
        told |= {"suspects": list(report.suspects)}
    if not targets:  # which a repair refuses
        return Outcome(case.model, told | {"accepted": False, "reason": "no suspect", "seconds": 0})
    name = plan.method.removeprefix("tacext-")
    data = clean.images, clean.labels
    # As users do who name no target: a class in doubt beside suspects gets no more than limits.
    chosen = targets if report is None else None
    begin = time.process_time()
    if name == "paper":
        settings = FinetuneSettings.of_the_paper()
        result = repair(
            case.model,
            data,
            report,
            chosen,
            "finetune",
            settings=settings,
            max_accuracy_drop=None,
            progress=False,
        )
    else:
        result = repair(
            case.model,
            data,
            report,
            chosen,
            cast(Method, name),
            max_accuracy_drop=ACCURACY_DROP if name == "auto" else None,
            progress=False,
        )
    seconds = time.process_time() - begin
    return Outcome(
        result.model,
        told
        | {
            "targets": list(result.targets),
            "way": result.method,
            "accepted": result.accepted,
            "reason": result.reason,
            "seconds": round(seconds, 2),
        },
    )


def _by_others(case: RepairCase, clean: CleanImages, plan: Plan) -> Outcome:
    repaired, seconds = remove(plan.method, case.model, clean, plan.effort)
    effort = round(plan.effort * REMOVALS[plan.method].effort, 4)
    return Outcome(repaired, {"effort": effort, "seconds": round(seconds, 2)})


def _told(found: Sequence[Evaluation], attacked: bool) -> dict[str, Any]:
    """ACC, and of the attacks the mean and the highest ASR, and the mean and the lowest RA."""
    told = {"acc": round(found[0].acc, 4)}
    if attacked:
        asr, ra = [f.asr for f in found], [f.ra for f in found]
        told |= {"asr": round(mean(asr), 4), "asr_max": round(max(asr), 4)}
        told |= {"ra": round(mean(ra), 4), "ra_min": round(min(ra), 4)}
    return told


def effectiveness(before: Sequence[Evaluation], after: Sequence[Evaluation]) -> float:
    """The mean DER over the attacks (`tacext.Evaluation`)."""
    return mean(
        (max(0.0, b.asr - a.asr) - max(0.0, b.acc - a.acc) + 1) / 2
        for b, a in zip(before, after, strict=True)
    )


def _write(file: Path, found: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    unfinished.rename(file)


def repair_one(
    case: RepairCase, plan: Plan, before: Sequence[Evaluation], report: ScanReport | None
) -> dict[str, Any]:
    """What is kept of one repair."""
    clean = case.clean(plan.samples, plan.seed)
    told: dict[str, Any] = {
        "method": plan.method,
        "detected": plan.detected,
        "share": plan.effort,
        "attack": case.attack,
        "dataset": case.dataset,
        "network": case.network,
        "samples": len(clean),
        "measured": len(case.measured[1]),
        "seed": plan.seed,
        "before": _told(before, bool(case.attacks)),
    }
    try:
        if plan.method in REMOVALS:
            outcome = _by_others(case, clean, plan)
        else:
            outcome = _by_tacext(case, clean, plan, report)
        after = case.measure(outcome.model)
    except (DivergedError, TacextError) as error:
        return told | {"failed": str(error)}
    told |= {"after": _told(after, bool(case.attacks))} | outcome.told
    if case.attacks:
        told["der"] = round(effectiveness(before, after), 4)
    return told


def repair_model(
    name: str, plans: Sequence[Plan], data: Path, zoo: Path, models: Path | None
) -> list[str]:
    """Carries out the plans for one model, and says a line about each."""
    torch.set_num_threads(1)
    lines, seed = [], plans[0].seed
    if (zoo / f"{name}.json").exists():
        case = of_the_zoo(name, data, zoo, seed)
    else:
        assert models is not None
        case = published(name, models, seed)
    before = case.measure(case.model)
    reports: dict[int, ScanReport] = {}
    for plan in plans:
        report = None
        if plan.detected:
            if plan.samples not in reports:
                clean = case.clean(plan.samples, seed)
                reports[plan.samples] = scan(
                    case.model, (clean.images, clean.labels), depth="thorough", progress=False
                )
            report = reports[plan.samples]
        found = repair_one(case, plan, before, report)
        _write(RESULTS / name / plan.file, found)
        told = {k: found[k] for k in ("before", "after", "der", "seconds", "failed") if k in found}
        lines.append(f"{name}: {plan.file.removesuffix('.json')}: {told}")
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Repairs what is missing."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--zoo", type=Path, required=True, metavar="DIR")
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="of published models")
    parser.add_argument(
        "--methods", nargs="+", default=list(REMOVALS), choices=[*REMOVALS, *TACEXT]
    )
    parser.add_argument("--only", nargs="+", default=[""], help="names that contain one of these")
    parser.add_argument("--samples", nargs="+", type=int, default=[MOST_SAMPLES])
    parser.add_argument("--targets", choices=("given", "detected"), default="given")
    parser.add_argument("--clean", action="store_true", help="repair clean models")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--effort", type=float, default=1.0, help="share of the usual effort")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time, a thread each")
    options = parser.parse_args()
    if max(options.samples) > MOST_SAMPLES:
        parser.error(f"--samples: expected at most {MOST_SAMPLES}, got {max(options.samples)}")
    wanted: dict[str, list[Plan]] = {}
    for name in names(options.zoo, options.models, options.clean, options.only):
        for samples in options.samples:
            for method in options.methods:
                others = method in REMOVALS
                plan = Plan(
                    method,
                    samples,
                    options.targets == "detected" and not others,
                    options.seed,
                    options.effort if others else 1.0,
                )
                if not (RESULTS / name / plan.file).exists():
                    wanted.setdefault(name, []).append(plan)
    print(f"{sum(map(len, wanted.values()))} repairs of {len(wanted)} models to make", flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context) as pool:
        more = options.data, options.zoo, options.models
        runs = [pool.submit(repair_model, name, plans, *more) for name, plans in wanted.items()]
        for done, run in enumerate(as_completed(runs), 1):
            run.result()
            print(f"[{done}/{len(runs)}]", flush=True)


if __name__ == "__main__":
    main()
