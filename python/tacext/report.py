"""Results as plain dictionaries for JSON; the schemas lie in `tacext/schemas`, one file a version.

A change that could break a reader raises the number in `schema`; new fields alone do not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

from torch import Tensor

from . import ops
from .errors import InputError, counted
from .evaluation import Evaluation
from .files import StrPath, write_text_atomically
from .guard import Guard
from .guard_judgement import Judgement
from .ops import Status
from .repair_result import RepairResult
from .scan_report import ScanReport
from .waves import PHASES

__all__ = [
    "evaluation_to_dict",
    "guard_to_dict",
    "json_schema",
    "repair_to_dict",
    "scan_to_dict",
    "scans_to_dict",
    "write_json",
]

Json = dict[str, Any]


def json_schema(name: str) -> Json:
    """The JSON Schema of "scan-1", "scans-1", "repair-1", "evaluation-1" or "guard-1"; also "tacext.scan/1" and so on."""
    name = name.removeprefix("tacext.").replace("/", "-")
    text = resources.files(__package__).joinpath("schemas", f"{name}.json").read_text("utf-8")
    schema: Json = json.loads(text)
    return schema


def _finite(value: float) -> float | None:
    """JSON knows neither NaN nor infinity: both become null."""
    return value if math.isfinite(value) else None


def _header(schema: str, source: Json | None) -> Json:
    return {
        "schema": f"tacext.{schema}/1",
        "tacext": ops.build_info().version,
        "source": source or {},
    }


def scan_to_dict(
    report: ScanReport, class_names: Sequence[str] | None = None, source: Json | None = None
) -> Json:
    """A scan as `scan-1`: verdict, suspects, p-value and one row a class.

    Args:
        report: the scan.
        class_names: [C], shown beside the indices.
        source: where model and data came from, copied as it is.

    Raises:
        InputError: more or fewer names than classes.
    """
    if class_names is not None and len(class_names) != report.num_classes:
        raise InputError.of(
            "scan_to_dict",
            "class_names",
            expected=f"a name for each of {counted(report.num_classes, 'class', 'classes')}",
            got=counted(len(class_names), "name"),
            way_out="pass all of them in the order of the classes, or leave them out",
        )
    found = report.perturbations
    kinds = {} if report.evidence is None else report.evidence.joint.kind_p_values
    balanced = report.test.balanced
    rows = []
    for k in range(report.num_classes):
        rows.append(
            {
                "class": k,
                "name": class_names[k] if class_names is not None else None,
                "norm": _finite(float(found.norm[k])),
                "balanced_norm": None if balanced is None else _finite(float(balanced[k])),
                "anomaly_index": _finite(float(report.test.anomaly_index[k])),
                "p_value": _finite(float(report.test.class_p_values[k])),
                "evidence": {kind: _finite(float(p[k])) for kind, p in kinds.items()},
                "status": Status(int(found.status[k])).name.lower(),
                "active": int(found.active[k]),
                "iterations": int(found.iterations[k]),
                "primal_residual": _finite(float(found.primal_residual[k])),
                "dual_residual": _finite(float(found.dual_residual[k])),
                "gap": _finite(float(found.gap[k])),
            }
        )
    return _header("scan", source) | {
        "verdict": report.verdict,
        "suspects": list(report.suspects),
        "doubtful": list(report.doubtful),
        "p_value": report.p_value,
        "reason": report.reason,
        "warnings": list(report.warnings),
        "limited": list(report.limited),
        "trust_patch": report.trust_patch,
        "alpha": report.alpha,
        "depth": report.depth,
        "patch": _patch(report),
        "shuffle": _shuffle(report),
        "source_patch": _source_patch(report),
        "waves": _waves(report),
        "corner_patches": _corner_patches(report),
        "detectable_ratio": report.test.detectable_ratio,
        "metric": report.metric,
        "quantile": report.quantile,
        "head": report.head,
        "num_classes": report.num_classes,
        "latent_dim": report.latent_dim,
        "samples": report.samples,
        "samples_advised": report.samples_advised,
        "accuracy": _finite(report.accuracy),
        "confidence": _finite(report.confidence),
        "certificate": _finite(report.certificate),
        "seconds": asdict(report.timings),
        "classes": rows,
    }


def scans_to_dict(scans: Sequence[Json], failed: Sequence[Json], models: int) -> Json:
    """Scans of several models as `scans-1`.

    Args:
        scans: of each that could be scanned, as of `scan_to_dict`.
        failed: of each other, its "weights" and the "error".
        models: how many there were to scan; more than these two together where it is not done yet.
    """
    return {
        "schema": "tacext.scans/1",
        "tacext": ops.build_info().version,
        "models": models,
        "scans": list(scans),
        "failed": list(failed),
    }


def _patch(report: ScanReport) -> Json | None:
    look = None if report.evidence is None else report.evidence.look
    if report.evidence is None or look is None or look.patch is None:
        return None
    found = look.patch
    return {
        "side": found.side,
        "classes": _squares(found.classes, found.rate, found.gain, found.corner),
    }


def _squares(classes: Sequence[int], rate: Tensor, gain: Tensor, corner: Tensor) -> list[Json]:
    """One row a class: what its square does, and where it lies."""
    rows = zip(classes, rate.tolist(), gain.tolist(), corner.tolist(), strict=True)
    return [
        {"class": k, "rate": _finite(moved), "gain": _finite(lifted), "row": row, "column": column}
        for k, moved, lifted, (row, column) in rows
    ]


def _shuffle(report: ScanReport) -> Json | None:
    look = None if report.evidence is None else report.evidence.look
    if report.evidence is None or look is None or look.shuffle is None:
        return None
    found = look.shuffle
    return {
        "share": found.share,
        "p_value": report.evidence.shuffle_p_value,
        "destinations": [None if k < 0 else k for k in found.destinations],
    }


def _source_patch(report: ScanReport) -> Json | None:
    look = None if report.evidence is None else report.evidence.look
    if report.evidence is None or look is None or look.source is None:
        return None
    found = look.source
    return {
        "source": found.source,
        "target": found.target,
        "looked_at": list(found.looked_at),
        "share": found.share,
        "images": found.images,
        "kept": found.kept,
        "others": found.others,
        "p_value": report.evidence.source_p_value,
        "side": found.side,
        "row": found.corner[0],
        "column": found.corner[1],
    }


def _waves(report: ScanReport) -> Json | None:
    look = None if report.evidence is None else report.evidence.look
    if report.evidence is None or look is None or look.waves is None:
        return None
    found = look.waves
    rows = zip(found.rate.tolist(), found.beside.tolist(), found.wave.tolist(), strict=True)
    return {
        "p_value": report.evidence.wave_p_value,
        "images": found.images,
        "classes": [
            {
                "class": k,
                "rate": rate,
                "beside": beside,
                "axis": ("columns", "rows")[axis],
                "periods": periods,
                "phase": phase / PHASES,
            }
            for k, (rate, beside, (axis, periods, phase)) in enumerate(rows)
        ],
    }


def _corner_patches(report: ScanReport) -> Json | None:
    look = None if report.evidence is None else report.evidence.look
    if report.evidence is None or look is None or look.corners is None:
        return None
    found = look.corners
    return {
        "images": found.images,
        "squares": [
            {
                "side": side,
                "classes": _squares(found.classes, found.rate[i], found.gain[i], found.corner[i]),
            }
            for i, side in enumerate(found.sides)
        ],
    }


def repair_to_dict(result: RepairResult, source: Json | None = None) -> Json:
    """A repair as `repair-1`."""
    return _header("repair", source) | {
        "method": result.method,
        "limits_added": result.limits_added,
        "accepted": result.accepted,
        "max_accuracy_drop": result.max_accuracy_drop,
        "reason": result.reason,
        "targets": list(result.targets),
        "precautions": list(result.precautions),
        "attempts": [
            {
                "method": attempt.method,
                "targets": list(attempt.targets),
                "accepted": attempt.accepted,
                "reason": attempt.reason,
                "accuracy_after": _finite(attempt.accuracy_after),
                "robust_accuracy": _finite(attempt.robust_accuracy),
                "seconds": attempt.seconds,
            }
            for attempt in result.attempts
        ],
        "p_value_before": result.report_before.p_value,
        "verdict_before": result.report_before.verdict,
        "p_value_after": None if result.report_after is None else result.report_after.p_value,
        "verdict_after": None if result.report_after is None else result.report_after.verdict,
        "norms_before": _norms(result.report_before, result.targets),
        "norms_after": _norms(result.report_after, result.targets),
        "accuracy_before": result.accuracy_before,
        "accuracy_after": result.accuracy_after,
        "robust_accuracy_before": _finite(result.robust_accuracy_before),
        "robust_accuracy_after": _finite(result.robust_accuracy_after),
        "training_samples": result.training_samples,
        "holdout_samples": result.holdout_samples,
        "warnings": list(result.warnings),
        "settings": asdict(result.settings),
        "history": [
            {name: _finite(value) for name, value in asdict(epoch).items()}
            for epoch in result.history
        ],
        "pruned": _pruned(result),
        "seconds": result.seconds,
    }


def _norms(report: ScanReport | None, targets: tuple[int, ...]) -> list[float | None] | None:
    """Of the targets, in the metric of the scan; null where unreachable."""
    return None if report is None else [_finite(float(report.norm[t])) for t in targets]


def _pruned(result: RepairResult) -> list[Json] | None:
    if result.pruning is None:
        return None
    return [{"layer": c.layer, "channel": c.channel} for c in result.pruning.channels]


def evaluation_to_dict(evaluation: Evaluation, source: Json | None = None) -> Json:
    """An evaluation as `evaluation-1`."""
    return _header("evaluation", source) | asdict(evaluation)


def guard_to_dict(
    guard: Guard, judgement: Judgement | None = None, source: Json | None = None
) -> Json:
    """A guard as `guard-1`, with what it says of images where it has judged some."""
    info = guard.info
    told = _header("guard", source) | {
        "false_positive_rate": info.false_positive_rate,
        "calibration_samples": info.samples,
        "threshold": float(guard.scorer.threshold),
        "head": info.head,
        "num_classes": info.num_classes,
        "unseen_classes": list(info.unseen_classes),
        "judged": None,
    }
    if judgement is None:
        return told
    output, monitor = judgement.output, judgement.monitor
    told["judged"] = {
        "images": monitor.inputs,
        "flagged": monitor.flagged,
        "not_finite": monitor.not_finite,
        "suspicious": judgement.suspicious,
        "excess_p_value": monitor.excess_p_value,
        "drift_p_value": monitor.drift_p_value,
        "flagged_images": output.flagged.nonzero().flatten().tolist(),
        "predicted": output.logits.argmax(1).tolist(),
        "scores": [_finite(float(score)) for score in output.score],
        "p_values": [float(f"{float(p):.6g}") for p in output.p_value],
    }
    return told


def write_json(path: StrPath, content: Json, *, operation: str, argument: str = "json") -> None:
    """Writes a dictionary as JSON, whole or not at all.

    Raises:
        FileError: the file cannot be written.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_text_atomically(path, text, operation=operation, argument=argument)
