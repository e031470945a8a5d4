"""Removing a backdoor: a repaired copy of the model, and what the repair cost."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal, SupportsIndex, get_args

import torch
from torch import Tensor, nn

from . import ops
from .data import DataLike, as_index, materialise
from .doubts import sensible_accuracy
from .errors import HeadNotFoundError, InputError, NotFiniteError, check_choice
from .finetuning import EpochLosses, FinetuneSettings, diverged, finetune
from .heads import (
    Head,
    check_labels_in_range,
    check_model,
    evaluating,
    find_head,
    model_dtype,
)
from .heads import run_model as run
from .input_adversary import InputAdversary
from .ops import Status
from .repair_gate import Gate, check_repair
from .scan_report import Depth, ScanReport
from .scanning import scan

logger = logging.getLogger(__name__)

Method = Literal["finetune"]

NOTABLE_LOSS = 0.05  # of accuracy; a repair that costs more says so


@dataclass(frozen=True)
class RepairResult:
    """The outcome of a repair.

    Attributes:
        model: the repaired copy, in evaluation mode, on the caller's device; where the repair was not
            accepted, a copy of the model as it was.
        accepted: whether the repair kept the accuracy asked for, what led into the targets before no
            longer does, and a thorough scan of the outcome does not find them (`repair_gate`).
        max_accuracy_drop: as asked for; None was accepted unseen.
        reason: why it was accepted or not, in one sentence.
        report_after: the scan of the repaired model; None where there was none.
        targets: the classes that were to be repaired.
        method: how.
        accuracy_before, accuracy_after: on the held-out clean samples, of the original and of what
            was repaired, whether that was accepted or not.
        training_samples, holdout_samples: how the clean data was split.
        history: the losses of every epoch.
        warnings: what the caller should know before using the model.
        settings: what was asked for.
        seconds: wall time of the repair, without scans.
    """

    model: nn.Module = field(repr=False)
    accepted: bool
    max_accuracy_drop: float | None
    reason: str
    report_after: ScanReport | None = field(repr=False)
    targets: tuple[int, ...]
    method: Method
    accuracy_before: float
    accuracy_after: float
    training_samples: int
    holdout_samples: int
    history: tuple[EpochLosses, ...] = field(repr=False)
    warnings: tuple[str, ...]
    settings: FinetuneSettings
    seconds: float


@torch.inference_mode(False)
def repair(
    model: nn.Module,
    data: DataLike,
    report: ScanReport | None = None,
    targets: Iterable[SupportsIndex] | SupportsIndex | None = None,
    method: Method = "finetune",
    *,
    settings: FinetuneSettings | None = None,
    max_accuracy_drop: float | None = 0.02,
    head: str | None = None,
    progress: bool | None = None,
) -> RepairResult:
    """Removes the backdoor of the suspect classes and returns a repaired copy of the model.

    Fine-tunes on clean data with the loss

        CE(z(x), y) + distillation KL(z_0(x) || z(x))
                    + beta CE(W (phi(x) + s_t) + b, y) + gamma A(z(a_t(x)))

    The first and the third term are the removal step of arXiv 2511.08944: latents shifted by the
    reconstructed trigger-activated change s_t are taught their true class. The second holds the
    model where it was. The last is an `InputAdversary`: small changes of the whole input and small
    patches, made to lead into t and moving on with the model, must not lead there. With several
    targets they take turns, and the third term is a mean over them. `FinetuneSettings.of_the_paper()`
    is the published loss alone.

    The accuracies are measured on samples that are not trained on; s_t comes from the report's
    margins first, from all samples that it saw, at its quantile, and is solved again after every
    epoch. A report at a quantile below 1 has a shorter s_t, which some of the samples need not follow.

    Args:
        model: the classifier, as for `scan`; it is copied and left untouched. Of the copy every
            parameter is trained, also those that are frozen.
        data: clean labelled samples, as for `scan`; held in memory.
        report: a scan of this model; None scans it with the same data first, as `scan` does by
            default.
        targets: the class or classes to repair, overriding the report's suspects.
        method: "finetune".
        settings: of the fine-tuning; None for the defaults.
        max_accuracy_drop: what the repair may cost on held-out samples. One that costs more, after
            which what led into a target still does, or of which a thorough scan has doubts about a
            target, is rolled back. None accepts whatever comes out, unseen.
        head: the name of the last linear layer, where the model is too unusual to tell.
        progress: whether to show a progress bar; None shows it on a terminal.

    Returns:
        RepairResult with the repaired model, or a copy of the original where the repair was not
        accepted, and the accuracy before and after on held-out data.

    Raises:
        InputError: nothing to repair, a target out of range or unreachable, a report of a model
            of other sizes, too few samples, a loss that diverges, and everything that `scan` raises.
    """
    check_choice("repair", "method", method, get_args(Method), "finetune")
    check_model(model, "repair")
    settings = FinetuneSettings() if settings is None else settings
    if not isinstance(settings, FinetuneSettings):
        raise InputError.of(
            "repair",
            "settings",
            expected="FinetuneSettings or None",
            got=type(settings).__name__,
            way_out="pass tacext.FinetuneSettings(...)",
        )
    _check_drop(max_accuracy_drop)
    inputs, labels = (
        part.clone() if part.is_inference() else part
        for part in materialise(data, operation="repair")
    )
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        model = copy.deepcopy(model)  # which gradients may pass by
    training, holdout = _split(len(labels), settings)
    if report is not None and not isinstance(report, ScanReport):
        raise InputError.of(
            "repair",
            "report",
            expected="a ScanReport or None",
            got=type(report).__name__,
            way_out="pass classes as targets=[...]",
        )
    if report is None:
        # The targets decide how much there is to find out.
        depth: Depth = "thorough" if targets is None else "fast"
        report = scan(
            model,
            (inputs, labels),
            head=head,
            depth=depth,
            batch_size=settings.batch_size,
            seed=settings.seed,
            progress=progress,
        )
    found = _find_head(model, inputs[:8], head, report)
    check_labels_in_range(labels, found.num_classes, "repair")
    chosen = _choose_targets(report, targets, found)
    shifts = _reconstructed_tac(report, found, chosen)

    started = time.perf_counter()
    tuned_on, held_out = (inputs[training], labels[training]), (inputs[holdout], labels[holdout])
    adversary, notes = None, list[str]()
    if settings.gamma:
        adversary, notes = _seek_adversary(model, found, tuned_on, chosen, settings, progress)
    # Half precision holds no optimiser's steps; it is trained in single and rounded at the end.
    dtype = model_dtype(model)
    half = dtype in (torch.float16, torch.bfloat16)
    repaired = copy.deepcopy(model)
    repaired = repaired.float() if half else repaired
    repaired_head = Head(found.name, repaired.get_submodule(found.name))  # type: ignore[arg-type]
    history = finetune(
        repaired,
        repaired_head,
        *tuned_on,
        shifts,
        chosen,
        adversary,
        settings,
        quantile=report.quantile,
        progress=progress,
    )
    repaired = repaired.to(dtype) if half else repaired
    repaired.eval()
    _check_still_finite(model, repaired)
    right_before = _count_right(model, *held_out, settings.batch_size)
    try:
        right_after = _count_right(repaired, *held_out, settings.batch_size)
    except NotFiniteError:
        raise diverged("logits of NaN or infinity") from None
    seconds = time.perf_counter() - started
    if max_accuracy_drop is None:
        gate = Gate(True, "accepted unseen, as asked for", None)
    else:
        gate = check_repair(
            model,
            repaired,
            (inputs, labels),
            held_out,
            report,
            adversary,
            (right_before, right_after),
            max_accuracy_drop,
            head=found.name,
            batch_size=settings.batch_size,
            seed=settings.seed,
            progress=progress,
        )
    before, after = right_before / len(holdout), right_after / len(holdout)
    result = RepairResult(
        model=repaired if gate.accepted else copy.deepcopy(model).eval(),
        accepted=gate.accepted,
        max_accuracy_drop=None if max_accuracy_drop is None else float(max_accuracy_drop),
        reason=gate.reason,
        report_after=gate.report,
        targets=chosen,
        method=method,
        accuracy_before=before,
        accuracy_after=after,
        training_samples=len(training),
        holdout_samples=len(holdout),
        history=history,
        warnings=(*notes, *_warnings(before, after, found.num_classes, gate)),
        settings=settings,
        seconds=seconds,
    )
    for warning in result.warnings:
        logger.warning("repair: %s", warning)
    logger.info(
        "repair: targets %s, held-out accuracy %.4f -> %.4f",
        chosen,
        result.accuracy_before,
        result.accuracy_after,
    )
    return result


def _check_drop(max_accuracy_drop: float | None) -> None:
    if max_accuracy_drop is None:
        return
    number = ops.is_number(max_accuracy_drop) and not isinstance(max_accuracy_drop, bool)
    if not number or not 0 <= max_accuracy_drop <= 1:
        raise InputError.of(
            "repair",
            "max_accuracy_drop",
            expected="a share from 0 to 1, or None",
            got=repr(max_accuracy_drop),
            way_out="leave it out for 0.02; None accepts whatever comes out",
        )


def _seek_adversary(
    model: nn.Module,
    head: Head,
    samples: tuple[Tensor, Tensor],
    targets: tuple[int, ...],
    settings: FinetuneSettings,
    progress: bool | None,
) -> tuple[InputAdversary | None, list[str]]:
    """What the model is trained against beside shifted latents, or why there is nothing."""
    try:
        adversary = InputAdversary.sought(
            model,
            head,
            *samples,
            targets,
            batch_size=settings.batch_size,
            seed=settings.seed,
            progress=progress,
        )
    except InputError as error:
        return None, [f"only shifted latents were trained against, which removes less ({error})"]
    return adversary, []


def _warnings(before: float, after: float, num_classes: int, gate: Gate) -> tuple[str, ...]:
    warnings = []
    if before < sensible_accuracy(num_classes):
        warnings.append(
            f"the model was right on only {before:.1%} of the held-out samples before the repair; "
            "check the normalisation (mean and std) and the order of the classes"
        )
    if not gate.accepted:
        warnings.append(f"rolled back: {gate.reason}")
    elif after < before - NOTABLE_LOSS:
        warnings.append(
            f"the repair costs {before - after:.1%} of accuracy on held-out samples; more clean "
            "samples, more epochs or a lower learning_rate may cost less"
        )
    return tuple(warnings)


def _find_head(model: nn.Module, example: Tensor, head: str | None, report: ScanReport) -> Head:
    try:
        return find_head(model, example, head, operation="repair")
    except HeadNotFoundError:
        if head is not None:
            raise
        return find_head(model, example, report.head, operation="repair")  # named for the scan


def _choose_targets(
    report: ScanReport, targets: Iterable[SupportsIndex] | SupportsIndex | None, head: Head
) -> tuple[int, ...]:
    if report.num_classes != head.num_classes or report.latent_dim != head.latent_dim:
        raise InputError.of(
            "repair",
            "report",
            expected=f"a scan of this model ({head.num_classes} classes, {head.latent_dim} latents)",
            got=f"one of {report.num_classes} classes and {report.latent_dim} latents",
            way_out="scan this model, or leave the report out",
        )
    if targets is None:
        wanted: tuple[object, ...] = report.suspects
    elif as_index(targets) is None and isinstance(targets, Iterable):
        wanted = tuple(targets)
    else:
        wanted = (targets,)
    if not wanted:
        raise InputError.of(
            "repair",
            "targets",
            expected="at least one class to repair",
            got=f"none (the scan's verdict: {report.verdict})",
            way_out="name the class with targets=[...] (--target) where you know better than the scan",
        )
    chosen: list[int] = []
    for target in wanted:
        index = as_index(target)
        if index is None or not 0 <= index < head.num_classes:
            raise InputError.of(
                "repair",
                "targets",
                expected=f"classes from 0 to {head.num_classes - 1}",
                got=repr(target),
                way_out="pass class indices of this model",
            )
        chosen.append(index)
    return tuple(dict.fromkeys(chosen))


def _reconstructed_tac(report: ScanReport, head: Head, targets: tuple[int, ...]) -> Tensor:
    """s_t of every target in the plain l2 metric, [targets, D], whatever metric the scan used.

    The standardized metric ranks classes better but may leave the direction of the true change:
    its cosine to it was measured at .04 where l2 gave .70 (docs/method.md).
    """
    weight = head.weight.detach()
    solved = ops.minimal_perturbation(weight, report.margins.to(weight.device), classes=targets)
    for target, status in zip(targets, solved.status.tolist(), strict=True):
        if status != Status.OPTIMAL:
            raise InputError.of(
                "repair",
                "targets",
                expected="classes that a perturbation can reach",
                got=f"{target}, whose status is {Status(status).name}",
                way_out="leave that class out: no latent perturbation leads to it",
            )
    return solved.perturbation


def _split(samples: int, settings: FinetuneSettings) -> tuple[Tensor, Tensor]:
    holdout = max(1, round(samples * settings.holdout))
    if samples >= 3 and samples - holdout < 2:
        raise InputError.of(
            "repair",
            "holdout",
            expected="a share that leaves at least 2 samples to train on",
            got=f"{settings.holdout:g}, which splits {samples} samples into "
            f"{samples - holdout} to train on and {holdout} to measure with",
            way_out="lower it; the default is 0.2",
        )
    if samples < 3:
        raise InputError.of(
            "repair",
            "data",
            expected="at least 3 samples, some to train on and some to measure with",
            got=str(samples),
            way_out="pass more clean samples; a few hundred are sensible",
        )
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(settings.seed))
    return order[holdout:], order[:holdout]


def _check_still_finite(before: nn.Module, after: nn.Module) -> None:
    """The last steps, whose loss nothing has looked at, and the statistics of batch norm."""
    old, new = before.state_dict(), after.state_dict()
    for name, value in new.items():
        if not isinstance(value, Tensor) or bool(torch.isfinite(value).all()):
            continue
        if bool(torch.isfinite(old[name]).all()):  # a mask may be infinite from the start
            raise diverged(f"NaN or infinity in {name}")


def _count_right(model: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int) -> int:
    correct = 0
    with evaluating(model), torch.no_grad():
        for x, y in zip(inputs.split(batch_size), labels.split(batch_size), strict=True):
            correct += int((run(model, x, "repair").argmax(1).cpu() == y).sum())
    return correct
