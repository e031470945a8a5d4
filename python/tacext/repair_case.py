"""What there is to repair: the model, its targets, the split of the data, and what leads there."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import SupportsIndex

import torch
from torch import Tensor, nn

from . import ops
from .data import as_index
from .errors import HeadNotFoundError, InputError
from .heads import Head, find_head
from .input_adversary import InputAdversary
from .ops import Status
from .repair_settings import RepairSettings
from .scan_report import ScanReport
from .verdict import doubt_level, telling_waves

# Of fewer held-out samples nothing can be judged.
FEWEST_HELD_OUT = 50


@dataclass(frozen=True, eq=False)
class RepairCase:
    """What there is to repair, and with what.

    Attributes:
        model: the original, which no method changes.
        head: of it.
        inputs, labels: clean samples to repair with [N, ...] and [N].
        shifts: s_t, float64 [T, D], in the l2 metric.
        targets: the T classes.
        adversary: what drives inputs into them; None where the model has no gradients.
        max_accuracy_drop: what may be lost; None where nobody looks.
        quantile: of the margins that the shifts were solved from.
        progress: whether to show progress bars.
        checkpoint: where a fine-tuning keeps its state; None keeps none.
    """

    model: nn.Module
    head: Head
    inputs: Tensor
    labels: Tensor
    shifts: Tensor
    targets: tuple[int, ...]
    adversary: InputAdversary | None
    max_accuracy_drop: float | None
    quantile: float
    progress: bool | None
    checkpoint: Path | None = None


def seek_adversary(
    model: nn.Module,
    head: Head,
    samples: tuple[Tensor, Tensor],
    targets: tuple[int, ...],
    settings: RepairSettings,
    progress: bool | None,
    report: ScanReport,
) -> tuple[InputAdversary | None, str]:
    """What the model is trained against beside shifted latents, or why there is nothing."""
    try:
        adversary = InputAdversary.sought(
            model,
            head,
            *samples,
            targets,
            waves=telling_waves(report.evidence, doubt_level(report.alpha)),
            batch_size=settings.batch_size,
            seed=settings.seed,
            progress=progress,
        )
    except InputError as error:
        return None, str(error)
    return adversary, ""


def locate_head(model: nn.Module, example: Tensor, head: str | None, report: ScanReport) -> Head:
    """The head of the model to repair, or the one that the scan was told of."""
    try:
        return find_head(model, example, head, operation="repair")
    except HeadNotFoundError:
        if head is not None:
            raise
        return find_head(model, example, report.head, operation="repair")  # named for the scan


def choose_targets(
    report: ScanReport, targets: Iterable[SupportsIndex] | SupportsIndex | None, head: Head
) -> tuple[int, ...]:
    """The classes to repair: those asked for, or the suspects of the scan, or else those in doubt."""
    if report.num_classes != head.num_classes or report.latent_dim != head.latent_dim:
        raise InputError.of(
            "repair",
            "report",
            expected=f"a scan of this model ({head.num_classes} classes, {head.latent_dim} latents)",
            got=f"one of {report.num_classes} classes and {report.latent_dim} latents",
            way_out="scan this model, or leave the report out",
        )
    if targets is None:
        wanted: tuple[object, ...] = report.suspects or report.doubtful
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
            way_out="name the class with targets=[...] where you know better than the scan",
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


def without_unreachable(
    report: ScanReport, head: Head, targets: tuple[int, ...]
) -> tuple[tuple[int, ...], dict[int, str]]:
    """The targets into which a perturbation is known, and the others, each with a warning about it."""
    weight = head.weight.detach()
    solved = ops.minimal_perturbation(weight, report.margins.to(weight.device), classes=targets)
    states = dict(zip(targets, map(Status, solved.status.tolist()), strict=True))
    left_out = {
        k: f"class {k} was left out: no latent perturbation into it is known ({state.name.lower()})"
        for k, state in states.items()
        if state != Status.OPTIMAL
    }
    return tuple(k for k in targets if k not in left_out), left_out


def reconstructed_tac(report: ScanReport, head: Head, targets: tuple[int, ...]) -> Tensor:
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


def split_of(
    samples: int, settings: RepairSettings, *, judged: bool = False
) -> tuple[Tensor, Tensor]:
    """Indices to repair with, and those held out to measure with, by the seed.

    Args:
        samples: how many there are.
        settings: their holdout and seed.
        judged: whether a gate judges the outcome by those held out.

    Raises:
        InputError: too few of either.
    """
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
    if judged and holdout < FEWEST_HELD_OUT:
        raise InputError.of(
            "repair",
            "data",
            expected=f"{FEWEST_HELD_OUT} held-out samples or more, as fewer judge no repair",
            got=f"{holdout} of {samples}",
            way_out=f"pass {math.ceil(FEWEST_HELD_OUT / settings.holdout)} samples, raise holdout (--holdout) "
            f"above {settings.holdout:g}, or name a method and do without the gate (max_accuracy_drop=None, "
            "--no-gate)",
        )
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(settings.seed))
    return order[holdout:], order[:holdout]
