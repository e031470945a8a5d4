"""Results as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from .errors import counted, printable
from .evaluation import Evaluation
from .guard import Guard
from .guard_judgement import Judgement
from .ops import Status
from .patch_reach import PatchReach
from .repair_result import Attempt, RepairResult
from .scan_report import ScanReport
from .second_look import FEWEST_IMAGES_OF_SHARES

_COLOURS = {"backdoored": "bold red", "clean": "bold green", "inconclusive": "bold yellow"}
_MOST_ROWS = 20


def _number(value: float, form: str = ".3g") -> str:
    return "-" if math.isnan(value) else format(value, form)


def scan_table(report: ScanReport, class_names: Sequence[str] | None = None) -> RenderableType:
    """The verdict, and the most suspicious classes."""
    verdict = Text.assemble("verdict: ", (report.verdict, _COLOURS[report.verdict]))
    verdict.append(_classes_of(report))
    verdict.append(f"   p = {report.p_value:.2g}")
    # The paper's quantile, 1, needs no mention.
    share = "" if report.quantile == 1 else f"quantile {report.quantile:g}, "
    margins = None if report.evidence is None else report.evidence.margin
    seen = f"{counted(report.samples, 'sample')}, {share}accuracy {report.accuracy:.3f}"
    facts = (
        f"{'no data' if margins is not None else seen}; layer {printable(report.head) or '(the model)'}: {report.num_classes} classes, "
        f"{report.latent_dim} latents"
    )
    seconds = report.timings
    where = "the ascent from noise" if margins is not None else "the second look"
    looked = f"{seconds.look:.1f} s in {where}, " if report.evidence is not None else ""
    cost = (
        f"largest KKT residual {_number(report.certificate, '.0e')}; {seconds.forward:.2f} s in the model, "
        f"{looked}{seconds.margins + seconds.solve + seconds.test:.3f} s in the analysis"
    )
    table = Table(title=None, box=None, pad_edge=False, header_style="bold")
    kinds = {} if report.evidence is None else report.evidence.joint.kind_p_values
    # One kind's p-value is no verdict: it is not corrected for the choice of the class.
    tests = [f"p {kind}" for kind in kinds] if kinds else ["index", "p", "active"]
    look = None if report.evidence is None else report.evidence.look
    patched = {} if look is None or look.patch is None else _patch_rates(look.patch)
    if patched:
        tests.append("patch")
    norms = ("norm", "of usual") if margins is None else ("margin", "norm")
    for heading in ("class", *norms, *tests, "status"):
        table.add_column(heading, justify="left" if heading == "status" else "right")
    norm = report.norm.cpu()
    usual = report.test.usual_norm
    order = _order(report)
    for k in order[:_MOST_ROWS]:
        tested = [_number(float(p[k]), ".1g") for p in kinds.values()]
        if patched:
            tested.append(patched.get(k, "-"))
        if not kinds:
            tested = [
                _number(float(report.test.anomaly_index[k]), ".1f"),
                _number(float(report.test.class_p_values[k]), ".2g"),
                str(int(report.perturbations.active[k])),
            ]
        name = Text(f"{k}" if class_names is None else printable(f"{k} {class_names[k]}"))
        measured = [_number(float(norm[k]), ".4g"), _number(float(norm[k]) / usual, ".2f")]
        if margins is not None:
            measured = [_number(float(margins.margin[k].mean()), ".4g"), measured[0]]
        table.add_row(
            name,
            *measured,
            *tested,
            Status(int(report.perturbations.status[k])).name.lower().replace("_", " "),
            style="red" if k in report.suspects else "yellow" if k in report.doubtful else None,
        )
    parts: list[RenderableType] = [table]
    if len(order) > _MOST_ROWS:
        parts.append(Text(f"... and {len(order) - _MOST_ROWS} less suspicious classes", "dim"))
    parts += [Text(""), verdict, Text(report.reason), Text(facts, "dim"), Text(cost, "dim")]
    return Group(*parts, *_notes_of(report))


def scan_line(name: str, report: ScanReport) -> RenderableType:
    """One model of several: the verdict, what was scanned, the classes, and what to know of them."""
    line = Text.assemble((f"{report.verdict:<12}", _COLOURS[report.verdict]))
    seen = f"accuracy {report.accuracy:.3f}" if report.samples else "no data"
    line.append(f"  p = {report.p_value:<8.2g}  {seen}  {printable(name)}")
    line.append(_classes_of(report))
    notes = _notes_of(report)
    if report.verdict == "inconclusive":
        notes.insert(0, Text(report.reason))
    return Group(line, *(Text.assemble("    ", note) for note in notes))


def _classes_of(report: ScanReport) -> str:
    """Those that are suspected, and in doubt."""
    kinds = (("suspects", report.suspects), ("in doubt", report.doubtful))
    return "".join(f"   {kind}: {', '.join(map(str, k))}" for kind, k in kinds if k)


def _notes_of(report: ScanReport) -> list[Text]:
    """What to know beside the verdict."""
    notes = [Text(f"warning: {warning}", "yellow") for warning in report.warnings]
    if report.limited:
        classes = f"class {report.limited[0]}"
        if len(report.limited) > 1:
            classes = f"classes {', '.join(map(str, report.limited))}"
        note = (
            f"a latent patch stands in front of {classes}: the verdict is of the model with it, the "
            "norms are of the latents behind it"
        )
        notes.append(Text(note, "yellow"))
    if report.samples_advised is not None:
        notes.append(Text(f"{report.samples_advised} clean samples may tell more", "yellow"))
    return notes


def _patch_rates(found: PatchReach) -> dict[int, str]:
    """Of each class that was looked at, the share of images that a patch sends into it.

    None of so few images that shares do not count.
    """
    if found.images < FEWEST_IMAGES_OF_SHARES:
        return {}
    return {k: f"{float(r):.0%}" for k, r in zip(found.classes, found.rate, strict=True)}


def _order(report: ScanReport) -> list[int]:
    """Classes from the most to the least suspicious."""
    norm = report.norm.cpu()
    order: list[int] = norm.argsort().tolist()
    if report.evidence is not None:
        p_values = report.evidence.joint.class_p_values
        order.sort(key=lambda k: float(p_values[k]))
    named = (*report.suspects, *report.doubtful)  # perhaps by a test of the whole model
    return [*named, *(k for k in order if k not in named)]


def repair_table(result: RepairResult) -> RenderableType:
    """What was tried, what became of it, and the accuracy before and after."""
    tried = "repaired" if result.accepted else "tried to repair"
    targets = ", ".join(map(str, result.targets))
    accuracies = f"{result.accuracy_before:.3f} -> {result.accuracy_after:.3f}"
    work = f"{result.training_samples} samples in {result.seconds:.1f} s"
    lines = [
        f"{tried}: {targets} by {result.way} on {work}",
        f"accuracy on {result.holdout_samples} held-out samples: {accuracies}",
    ]
    if not math.isnan(result.robust_accuracy_after):
        robust = f"{result.robust_accuracy_before:.3f} -> {result.robust_accuracy_after:.3f}"
        lines.append(f"accuracy under what led into {targets}: {robust}")
    lines += [_scans_of(result)] if result.report_after is not None else []
    if len(result.attempts) > 1:
        lines += [_attempt(attempt, result) for attempt in result.attempts]
    elif result.accepted:  # else it is a warning
        lines.append(f"accepted: {result.reason}")
    return Group(
        *(Text(line) for line in lines),
        *(Text(f"warning: {warning}", "yellow") for warning in result.warnings),
    )


def _attempt(attempt: Attempt, result: RepairResult) -> str:
    """What came of an attempt; of which classes where not all were of the same."""
    name: str = attempt.method
    if any(other.targets != result.targets for other in result.attempts):
        name += f" of {', '.join(map(str, attempt.targets))}"
    return f"{name}: {'accepted' if attempt.accepted else 'rejected'}, {attempt.reason}"


def _scans_of(result: RepairResult) -> str:
    """Verdicts, p-values and norms of the targets before and after."""
    after = result.report_after
    assert after is not None
    before = result.report_before
    # What was scanned before may have been looked at less deeply than what came of it.
    verdicts = " -> ".join(
        f"{r.verdict} ({'' if before.depth == after.depth else f'{r.depth}, '}p = {r.p_value:.2g})"
        for r in (before, after)
    )
    norms = ", ".join(
        f"{t}: {float(before.norm[t]):.3g} -> {float(after.norm[t]):.3g}" for t in result.targets
    )
    behind = ", which lies behind the limit and does not move" if after.limited else ""
    return f"scan: {verdicts}; norm of class {norms}{behind}"


def evaluation_table(rows: Sequence[tuple[str, Evaluation]]) -> RenderableType:
    """ACC, ASR, RA and DER, a row a model."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model")
    for heading in ("ACC", "ASR", "RA", "DER"):
        table.add_column(heading, justify="right")
    for name, e in rows:
        der = "-" if e.der is None else f"{e.der:.3f}"
        table.add_row(name, f"{e.acc:.3f}", f"{e.asr:.3f}", f"{e.ra:.3f}", der)
    attacked = rows[-1][1]
    if attacked.source_class is None:
        return table
    victims = counted(attacked.triggered, "image")
    return Group(
        table, Text(f"ASR and RA of the {victims} of class {attacked.source_class}", "dim")
    )


def guard_table(guard: Guard) -> RenderableType:
    """What a guard was fitted on, and what it promises."""
    info = guard.info
    lines = [
        f"guard of {info.samples} samples: {info.num_classes} classes, layer {info.head or '(model)'}",
        f"flags {info.false_positive_rate:.3g} of clean inputs, on average over guards like it",
    ]
    return Group(*map(Text, lines))


def judgement_table(judgement: Judgement) -> RenderableType:
    """How many images a guard flags, the most suspicious ones, and how unusual that is."""
    monitor, output = judgement.monitor, judgement.output
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("image", "taken for", "score", "p"):
        table.add_column(heading, justify="right")
    order = output.score.sort(descending=True, stable=True).indices.tolist()
    flagged = [i for i in order if bool(output.flagged[i])]
    for i in flagged[:_MOST_ROWS]:
        score, p = float(output.score[i]), float(output.p_value[i])
        table.add_row(str(i), str(int(output.logits[i].argmax())), f"{score:.3g}", f"{p:.2g}")
    more = len(flagged) - _MOST_ROWS
    word = (
        "more than clean images explain" if judgement.suspicious else "no more than of clean images"
    )
    p = monitor.excess_p_value
    return Group(
        *([table] if flagged else []),
        *([Text(f"... and {more} more; --json lists them all")] if more > 0 else []),
        Text(
            f"{monitor.flagged} of {counted(monitor.inputs, 'image')} flagged: {monitor.flagged_share:.2%}"
        ),
        Text(f"promised of clean images: {monitor.false_positive_rate:.2%}"),
        Text(f"{word}, p {'< 1e-15' if p < 1e-15 else f'= {p:.2g}'}"),
        Text(f"unevenness of all p-values (drift): p = {monitor.drift_p_value:.2g}"),
        *([Text(f"{monitor.not_finite} of them not finite")] if monitor.not_finite else []),
    )
