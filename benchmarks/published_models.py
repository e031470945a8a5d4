"""Scans and repairs published classifiers and prints the tables of docs/detection.md and docs/method.md.

    python benchmarks/published_models.py --models FOLDER [--depth norms|fast] [--quantile Q] [--repair NAME ...]

FOLDER holds a zoo.py with MODELS and load(name, n, clean); the models are not part of this project.
"""

from __future__ import annotations

import argparse
import importlib
import math
import sys
from dataclasses import replace
from typing import Any

from tacext import FinetuneSettings, ScanReport, evaluate, repair, scan

CLEAN_IMAGES = 2500


def scan_row(name: str, case: Any, report: ScanReport) -> str:
    """One line of the detection table."""
    shown = case.target if case.target is not None else int(report.norm.argmin())
    others = [float(n) for k, n in enumerate(report.norm) if k != shown]
    usual = math.exp(sum(map(math.log, others)) / len(others))
    share = float(report.norm[shown]) / usual
    rank = int((report.norm < report.norm[shown]).sum())
    where = "none (smallest norm" if case.target is None else f"{case.target} (rank {rank}"
    verdict = report.verdict + "".join(f" {k}" for k in report.suspects)
    return (
        f"| {name} | {report.num_classes} | {where}, {share:.2f} of usual, "
        f"p {report.test.class_p_values[shown]:.2g}) | {verdict} | {report.certificate:.0e} | "
        f"{report.timings.forward:.1f} s | "
        f"{1e3 * (report.timings.margins + report.timings.solve + report.timings.test):.0f} ms |"
    )


def fast_row(name: str, case: Any, report: ScanReport) -> str:
    """One line of the table of fast scans."""
    assert report.evidence is not None
    joint, look = report.evidence.joint, report.evidence.look
    assert look is not None
    assert look.corners is not None
    k = joint.most_suspicious
    kinds = " | ".join(f"{p[k]:.1g}" for p in joint.kind_p_values.values())
    verdict = report.verdict + "".join(f" {suspect}" for suspect in report.suspects)
    target = "none" if case.target is None else str(case.target)
    moved = float(look.corners.rate.nan_to_num(0.0).max())
    return (
        f"| {name} | {target} | {k} | {kinds} | {moved:.2f} | {report.p_value:.2g} | {verdict} | "
        f"{report.timings.forward:.1f} s | {look.seconds:.1f} s |"
    )


def thorough_row(name: str, case: Any, report: ScanReport) -> str:
    """One line of the table of thorough scans."""
    assert report.evidence is not None
    joint, look = report.evidence.joint, report.evidence.look
    assert look is not None  # there is data
    k = joint.most_suspicious
    kinds = " | ".join(f"{p[k]:.1g}" for p in joint.kind_p_values.values())
    verdict = report.verdict + "".join(f" {suspect}" for suspect in report.suspects)
    target = "none" if case.target is None else str(case.target)
    patched = "-" if look.patch is None else f"{float(look.patch.rate.max()):.2f}"
    shuffled = "-" if look.shuffle is None else f"{look.shuffle.share:.2f}"
    return (
        f"| {name} | {target} | {k} | {kinds} | {patched} | {shuffled} | {report.p_value:.2g} | {verdict} | "
        f"{report.timings.forward:.1f} s | {look.seconds:.1f} s |"
    )


def repair_rows(zoo: Any, name: str, settings: FinetuneSettings) -> list[str]:
    """Lines of the repair table: as published, plain fine-tuning, repaired."""
    case = zoo.load(name, n=None, clean=CLEAN_IMAGES)
    arguments = (case.x, case.y), zoo.MODELS[name].trigger, case.target
    before = evaluate(case.model, *arguments)
    rows = [
        f"| {name} | as published | {before.acc:.3f} | {before.asr:.3f} | {before.ra:.3f} | | |"
    ]
    for label, beta in (("plain fine-tuning", 0.0), ("repaired", settings.beta)):
        result = repair(
            case.model,
            (case.x_clean, case.y_clean),
            targets=[case.target],
            settings=replace(settings, beta=beta),
        )
        after = evaluate(result.model, *arguments, baseline=before)
        rows.append(
            f"| {name} | {label} | {after.acc:.3f} | {after.asr:.3f} | {after.ra:.3f} | "
            f"{after.der:.3f} | {result.seconds:.0f} s |"
        )
    return rows


def main() -> None:
    """Prints Markdown."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", required=True, help="folder of zoo.py")
    parser.add_argument("--repair", nargs="*", default=None, help="names to repair, not scan")
    parser.add_argument("--depth", choices=("norms", "fast", "thorough"), default="thorough")
    parser.add_argument("--quantile", type=float, default=1.0, help="of the scans")
    options = parser.parse_args()
    sys.path.insert(0, options.models)
    zoo = importlib.import_module("zoo")
    if options.repair is not None:
        print("| model | | ACC | ASR | RA | DER | time |\n|---|---|---|---|---|---|---|")
        for name in options.repair:
            print(*repair_rows(zoo, name, FinetuneSettings()), sep="\n", flush=True)
        return
    if options.depth == "norms":
        print("| model | classes | target | verdict | certificate | forward | analysis |")
        print("|---|---|---|---|---|---|---|")
    elif options.depth == "fast":
        print(
            "| model | target | first | norm | balanced | corner | moved | p | verdict | forward | look |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|")
    else:
        print(
            "| model | target | first | norm | balanced | reach | share | patch | corner | moved | shuffle | p | verdict | forward | look |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    row = {"norms": scan_row, "fast": fast_row, "thorough": thorough_row}[options.depth]
    for name in zoo.MODELS:
        case = zoo.load(name, n=10, clean=CLEAN_IMAGES)
        report = scan(
            case.model,
            (case.x_clean, case.y_clean),
            depth=options.depth,
            quantile=options.quantile,
        )
        print(row(name, case, report), flush=True)


if __name__ == "__main__":
    main()
