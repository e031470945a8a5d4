"""Removing a backdoor: fine-tuning against the reconstructed trigger-activated change."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, SupportsIndex, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import ops
from .data import DataLike, as_index, materialise
from .doubts import sensible_accuracy
from .errors import HeadNotFoundError, InputError, NotFiniteError, check_choice
from .heads import (
    Head,
    check_labels_in_range,
    check_model,
    evaluating,
    find_head,
    model_device,
    model_dtype,
    recording_latents,
)
from .heads import run_model as run
from .ops import Status
from .progress import progress_bar
from .scan_report import Depth, ScanReport
from .scanning import scan

logger = logging.getLogger(__name__)

Method = Literal["finetune"]

NOTABLE_LOSS = 0.05  # of accuracy; a repair that costs more says so


@dataclass(frozen=True)
class FinetuneSettings:
    """Settings of `repair(..., method="finetune")`.

    Attributes:
        epochs: passes over the training part of the clean data.
        learning_rate: peak of a cosine schedule with a short linear warm-up; SGD with momentum .9.
        beta: weight of the loss on shifted latents; 0 is plain fine-tuning.
        batch_size: samples in a step.
        weight_decay: of SGD.
        holdout: share of the clean data kept out of training, to measure accuracy on.
        seed: of the split, the order of the samples and dropout.
    """

    epochs: int = 10
    learning_rate: float = 0.05
    beta: float = 1.0
    batch_size: int = 128
    weight_decay: float = 5e-4
    holdout: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        checks = (
            ("epochs", _whole(self.epochs) and self.epochs >= 1, "a whole number, at least 1"),
            (
                "learning_rate",
                ops.is_number(self.learning_rate) and self.learning_rate > 0,
                "a positive number",
            ),
            ("beta", ops.is_number(self.beta) and self.beta >= 0, "0 or more"),
            ("batch_size", _whole(self.batch_size) and self.batch_size >= 2, "at least 2"),
            ("seed", _whole(self.seed) and 0 <= self.seed < 2**31, "a whole number below 2**31"),
            (
                "weight_decay",
                ops.is_number(self.weight_decay) and self.weight_decay >= 0,
                "0 or more",
            ),
            (
                "holdout",
                ops.is_number(self.holdout) and 0 < self.holdout < 1,
                "a share between 0 and 1",
            ),
        )
        for name, good, expected in checks:
            if not good:
                raise InputError.of(
                    "FinetuneSettings",
                    name,
                    expected=expected,
                    got=repr(getattr(self, name)),
                    way_out="leave it out for the default",
                )


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class EpochLosses:
    """Mean losses of one epoch: on clean latents, and on latents shifted by s_t."""

    clean: float
    shifted: float


@dataclass(frozen=True)
class RepairResult:
    """The outcome of a repair.

    Attributes:
        model: the repaired copy, in evaluation mode, on the caller's device.
        targets: the classes whose backdoor was removed.
        method: how.
        accuracy_before, accuracy_after: on the held-out clean samples.
        training_samples, holdout_samples: how the clean data was split.
        history: the losses of every epoch.
        warnings: what the caller should know before using the model.
        settings: what was asked for.
        seconds: wall time of the training.
    """

    model: nn.Module = field(repr=False)
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


def repair(
    model: nn.Module,
    data: DataLike,
    report: ScanReport | None = None,
    targets: Iterable[SupportsIndex] | SupportsIndex | None = None,
    method: Method = "finetune",
    *,
    settings: FinetuneSettings | None = None,
    head: str | None = None,
    progress: bool | None = None,
) -> RepairResult:
    """Removes the backdoor of the suspect classes and returns a repaired copy of the model.

    Fine-tunes on clean data with CE(z(x), y) + beta CE(W(phi(x) + s_t) + b, y) (arXiv 2511.08944,
    its removal step): latents shifted by the reconstructed trigger-activated change s_t are taught
    their true class, until the shift no longer leads to t. With several targets every batch takes
    the mean over them. The accuracies are measured on samples that are not trained on; s_t itself
    comes from the report's margins: from all samples that it saw, at its quantile. A report at a
    quantile below 1 has a shorter s_t, which some of the samples need not follow.

    Args:
        model: the classifier, as for `scan`; it is copied and left untouched. Of the copy every
            parameter is trained, also those that are frozen.
        data: clean labelled samples, as for `scan`; held in memory.
        report: a scan of this model; None scans it with the same data first, as `scan` does by
            default.
        targets: the class or classes to repair, overriding the report's suspects.
        method: "finetune".
        settings: of the fine-tuning; None for the defaults.
        head: the name of the last linear layer, where the model is too unusual to tell.
        progress: whether to show a progress bar; None shows it on a terminal.

    Returns:
        RepairResult with the repaired model and its accuracy before and after on held-out data.

    Raises:
        InputError: nothing to repair, a target out of range or unreachable, a report of another
            model, too few samples, a loss that diverges, and everything that `scan` raises.
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
    inputs, labels = materialise(data, operation="repair")
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
        report = scan(model, (inputs, labels), head=head, depth=depth, progress=progress)
    found = _find_head(model, inputs[:8], head, report)
    check_labels_in_range(labels, found.num_classes, "repair")
    chosen = _choose_targets(report, targets, found)
    shifts = _reconstructed_tac(report, found, chosen)

    repaired = copy.deepcopy(model)
    repaired_head = Head(found.name, repaired.get_submodule(found.name))  # type: ignore[arg-type]
    started = time.perf_counter()
    history = _finetune(
        repaired, repaired_head, inputs[training], labels[training], shifts, settings, progress
    )
    seconds = time.perf_counter() - started
    repaired.eval()
    _check_still_finite(model, repaired)
    held_out = inputs[holdout], labels[holdout]
    before = _accuracy(model, *held_out)
    try:
        after = _accuracy(repaired, *held_out)
    except NotFiniteError:
        raise _diverged("logits of NaN or infinity") from None
    result = RepairResult(
        model=repaired,
        targets=chosen,
        method=method,
        accuracy_before=before,
        accuracy_after=after,
        training_samples=len(training),
        holdout_samples=len(holdout),
        history=history,
        warnings=_warnings(before, after, found.num_classes),
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


def _warnings(before: float, after: float, num_classes: int) -> tuple[str, ...]:
    warnings = []
    if before < sensible_accuracy(num_classes):
        warnings.append(
            f"the model was right on only {before:.1%} of the held-out samples before the repair; "
            "check the normalisation (mean and std) and the order of the classes"
        )
    if after < before - NOTABLE_LOSS:
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


def _batches(samples: int, settings: FinetuneSettings, epoch: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + epoch)
    batches = list(torch.randperm(samples, generator=generator).split(settings.batch_size))
    if len(batches) > 1 and len(batches[-1]) < 2:  # batch norm cannot train on one sample
        batches.pop()
    yield from batches


def _learning_rate(step: int, steps: int, settings: FinetuneSettings) -> float:
    warm_up = max(1, steps // 20)
    if step < warm_up:
        return settings.learning_rate * (step + 1) / warm_up
    return (
        settings.learning_rate
        * 0.5
        * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up)))
    )


def _finetune(
    model: nn.Module,
    head: Head,
    inputs: Tensor,
    labels: Tensor,
    shifts: Tensor,
    settings: FinetuneSettings,
    progress: bool | None,
) -> tuple[EpochLosses, ...]:
    device, dtype = model_device(model), model_dtype(model)
    shifts = shifts.to(device, dtype)
    frozen = [p for p in model.parameters() if p.is_floating_point() and not p.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    optimizer = torch.optim.SGD(
        model.parameters(),
        lr=settings.learning_rate,
        momentum=0.9,
        weight_decay=settings.weight_decay,
    )
    steps_per_epoch = sum(1 for _ in _batches(len(labels), settings, 0))
    steps = settings.epochs * steps_per_epoch
    history: list[EpochLosses] = []
    step = 0
    devices = range(torch.cuda.device_count())  # manual_seed below seeds them all
    with (
        torch.random.fork_rng(devices=devices),  # dropout: seeded here, unnoticed outside
        torch.enable_grad(),
        recording_latents(head) as recorder,
        progress_bar("fine-tuning", steps, progress) as advance,
    ):
        torch.manual_seed(settings.seed)
        model.train()
        for epoch in range(settings.epochs):
            clean_sum = shifted_sum = 0.0
            for batch in _batches(len(labels), settings, epoch):
                x, y = inputs[batch], labels[batch].to(device)
                for group in optimizer.param_groups:
                    group["lr"] = _learning_rate(step, steps, settings)
                run(model, x, "repair", check_finite=False)
                latent = recorder.take()
                clean_loss = functional.cross_entropy(head.logits(latent), y)
                shifted_loss = torch.stack(
                    [functional.cross_entropy(head.logits(latent + s), y) for s in shifts]
                ).mean()
                _check_converging(clean_loss, shifted_loss)
                optimizer.zero_grad(set_to_none=True)
                (clean_loss + settings.beta * shifted_loss).backward()
                optimizer.step()
                clean_sum += float(clean_loss.detach())
                shifted_sum += float(shifted_loss.detach())
                step += 1
                advance(1)
            history.append(EpochLosses(clean_sum / steps_per_epoch, shifted_sum / steps_per_epoch))
            logger.info(
                "repair: epoch %d of %d: loss %.4f clean, %.4f shifted",
                epoch + 1,
                settings.epochs,
                history[-1].clean,
                history[-1].shifted,
            )
    for parameter in frozen:
        parameter.requires_grad_(False)
    optimizer.zero_grad(set_to_none=True)
    return tuple(history)


def _check_converging(*losses: Tensor) -> None:
    if not all(bool(torch.isfinite(loss)) for loss in losses):
        raise _diverged("a loss of NaN or infinity")


def _check_still_finite(before: nn.Module, after: nn.Module) -> None:
    """The last steps, whose loss nothing has looked at, and the statistics of batch norm."""
    old, new = before.state_dict(), after.state_dict()
    for name, value in new.items():
        if not isinstance(value, Tensor) or bool(torch.isfinite(value).all()):
            continue
        if bool(torch.isfinite(old[name]).all()):  # a mask may be infinite from the start
            raise _diverged(f"NaN or infinity in {name}")


def _diverged(got: str) -> InputError:
    return InputError.of(
        "repair",
        "settings",
        expected="a learning_rate at which the loss falls",
        got=got,
        way_out="lower the learning_rate",
    )


def _accuracy(model: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    correct = 0
    with evaluating(model), torch.no_grad():
        for x, y in zip(inputs.split(batch_size), labels.split(batch_size), strict=True):
            correct += int((run(model, x, "repair").argmax(1).cpu() == y).sum())
    return correct / len(labels)
