"""Measuring a model against a known trigger: ACC, ASR, RA, DER."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from .attacks import AllToOne, Goal, SourceSpecific, Trigger
from .data import DataLike, as_batches, as_index, sample_count
from .errors import InputError
from .files import explain
from .heads import check_labels_in_range, check_model, evaluating, run_model
from .progress import progress_bar

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """How a model behaves on clean and on triggered inputs.

    Attributes:
        acc: share of clean samples classified right.
        asr: attack success rate, the share of triggered victims sent where the attack wants them:
            samples of other classes than the target, or whom the goal names.
        ra: robust accuracy, the share of the same samples still classified right.
        der: defence effectiveness rating against a baseline,
            (max(0, ASR0 - ASR) - max(0, ACC0 - ACC) + 1) / 2; None without a baseline.
        target: the attacked class; None where there are several.
        samples: clean samples.
        triggered: victims among them.
        source_class: the only class that is attacked; None where there are several.
    """

    acc: float
    asr: float
    ra: float
    der: float | None
    target: int | None
    samples: int
    triggered: int
    source_class: int | None = None


def evaluate(
    model: nn.Module,
    data: DataLike,
    trigger: Trigger,
    target: int | Goal,
    *,
    baseline: Evaluation | nn.Module | None = None,
    batch_size: int = 256,
    progress: bool | None = None,
) -> Evaluation:
    """Measures clean accuracy, attack success and robust accuracy under a known trigger.

    Args:
        model: maps inputs [N, ...] to logits [N, C]; used in evaluation mode and left as it was.
        data: clean test samples with labels, as for `scan`.
        trigger: maps a batch of inputs to the same inputs with the trigger; may not change shape.
        target: the class that the trigger leads to, or an `attacks.Goal`: `AllToAll(C)`,
            `SourceSpecific(source, target)`.
        baseline: the model before repair, or its evaluation; the DER is measured against it.
        batch_size: samples in a forward pass, where the data is not already in batches. With a
            model as the baseline the data is read twice.
        progress: whether to show a progress bar; None shows it on a terminal.

    Raises:
        InputError: no samples of a class that is attacked, a target out of range, a trigger
            that changes the shape or gives NaN, or anything that the model rejects.

    Warns of a trigger that leaves samples as they are, and of one that goes far beyond their values.
    """
    found, doubts = measured(
        model, data, trigger, target, baseline=baseline, batch_size=batch_size, progress=progress
    )
    for doubt in doubts:
        logger.warning("evaluate: %s", doubt)
    return found


def measured(
    model: nn.Module,
    data: DataLike,
    trigger: Trigger,
    target: int | Goal,
    *,
    baseline: Evaluation | nn.Module | None = None,
    batch_size: int = 256,
    progress: bool | None = None,
) -> tuple[Evaluation, tuple[str, ...]]:
    """What `evaluate` returns, and what it warns of."""
    check_model(model, "evaluate")
    if baseline is not None and not isinstance(baseline, Evaluation | nn.Module):
        raise InputError.of(
            "evaluate",
            "baseline",
            expected="an nn.Module, an Evaluation or None",
            got=repr(baseline) if isinstance(baseline, str) else type(baseline).__name__,
            way_out="pass the model before repair; tacext.load_model reads one from a file",
        )
    if isinstance(baseline, nn.Module):
        baseline, _ = measured(
            baseline, data, trigger, target, batch_size=batch_size, progress=progress
        )
    goal = _goal_of(target)
    samples = correct = triggered = hit = held = changed = 0
    seen, painted = _Range(), _Range()
    with (
        evaluating(model),
        torch.no_grad(),
        progress_bar("clean and triggered data", sample_count(data), progress) as advance,
    ):
        for inputs, given_labels in as_batches(data, operation="evaluate", batch_size=batch_size):
            labels = given_labels.cpu()
            logits = run_model(model, inputs, "evaluate")
            _check_class("target", max(goal.targets), logits.shape[1])
            if isinstance(goal, SourceSpecific):
                _check_class("target", goal.source, logits.shape[1], " as the source")
            check_labels_in_range(labels, logits.shape[1], "evaluate")
            samples += len(labels)
            seen = seen.with_values(inputs)
            correct += int((logits.argmax(1).cpu() == labels).sum())
            victims = goal.victims(labels)
            if bool(victims.any()):
                given = inputs[victims.to(inputs.device)]
                stamped = _stamp(trigger, given)
                changed += int(_differ(stamped, given).sum())
                painted = painted.with_values(stamped)
                predicted = run_model(model, stamped, "evaluate").argmax(1).cpu()
                triggered += len(predicted)
                hit += int((predicted == goal(labels[victims])).sum())
                held += int((predicted == labels[victims]).sum())
            advance(len(labels))
    if not triggered:
        attacked = f"classes that {goal} attacks"
        if isinstance(goal, AllToOne):
            attacked = f"other classes than the target {goal.target}"
        raise InputError.of(
            "evaluate",
            "data",
            expected=f"samples of {attacked}",
            got="none",
            way_out="pass test samples of all classes",
        )
    acc, asr, ra = correct / samples, hit / triggered, held / triggered
    der = None
    if baseline is not None:
        der = (max(0.0, baseline.asr - asr) - max(0.0, baseline.acc - acc) + 1) / 2
    single = goal.targets[0] if len(goal.targets) == 1 else None
    source = goal.source if isinstance(goal, SourceSpecific) else None
    found = Evaluation(acc, asr, ra, der, single, samples, triggered, source)
    return found, _doubts(triggered - changed, triggered, seen, painted)


@dataclass(frozen=True)
class _Range:
    """The smallest and the largest value that was met."""

    least: float = math.inf
    most: float = -math.inf

    def with_values(self, values: Tensor) -> _Range:
        if not values.numel():
            return self
        least, most = values.aminmax()
        return _Range(min(self.least, float(least)), max(self.most, float(most)))

    def __str__(self) -> str:
        return f"{self.least + 0.0:.4g} to {self.most + 0.0:.4g}"  # never -0


def _differ(stamped: Tensor, given: Tensor) -> Tensor:
    """Which samples a trigger changes by more than a conversion there and back: bool [N]."""
    least, most = given.aminmax()
    moved = (stamped.to(given.dtype) - given).abs()
    return (moved > 1e-3 * (most - least)).flatten(1).any(1)


def _doubts(unchanged: int, triggered: int, seen: _Range, painted: _Range) -> tuple[str, ...]:
    """What speaks against the trigger: that it is not there, or in other units than the inputs."""
    doubts = []
    if unchanged == triggered:
        doubts.append(
            "the trigger changes no sample, so the rates are those of clean ones; check where it paints"
        )
    elif 2 * unchanged >= triggered:
        doubts.append(
            f"the trigger leaves {unchanged} of {triggered} samples as they are; check where it paints"
        )
    span = seen.most - seen.least
    beyond = painted.most > seen.most + span or painted.least < seen.least - span
    if span > 0 and beyond:
        doubts.append(
            f"with the trigger, inputs reach from {painted}, without it from {seen}; "
            "check that it paints in their units"
        )
    return tuple(doubts)


def _goal_of(target: int | Goal) -> Goal:
    if all(hasattr(target, name) for name in ("targets", "victims")):
        return cast(Goal, target)
    index = as_index(target)
    if index is None or index < 0:
        raise InputError.of(
            "evaluate",
            "target",
            expected="a class of 0 or more",
            got=repr(target),
            way_out="pass a class index of this model, or a goal of tacext.attacks",
        )
    return AllToOne(index)


def _check_class(argument: str, index: int, num_classes: int, role: str = "") -> None:
    if index >= num_classes:
        raise InputError.of(
            "evaluate",
            argument,
            expected=f"a class from 0 to {num_classes - 1}{role}",
            got=str(index),
            way_out="pass a class index of this model",
        )


def _stamp(trigger: Trigger, inputs: Tensor) -> Tensor:
    try:
        stamped = trigger(inputs.clone())
    except Exception as error:
        raise InputError.of(
            "evaluate",
            "trigger",
            expected="a function that takes a batch of inputs",
            got=f"one that fails ({explain(error)})",
            way_out="correct it",
        ) from error
    if not isinstance(stamped, Tensor) or stamped.shape != inputs.shape:
        got = f"{list(stamped.shape)}" if isinstance(stamped, Tensor) else type(stamped).__name__
        raise InputError.of(
            "evaluate",
            "trigger",
            expected=f"a tensor of the inputs' shape {list(inputs.shape)}",
            got=got,
            way_out="return the batch with the trigger in it",
        )
    if stamped.is_complex():
        raise InputError.of(
            "evaluate",
            "trigger",
            expected="real values",
            got=str(stamped.dtype),
            way_out="return the batch with the trigger in it",
        )
    if not bool(torch.isfinite(stamped).all()):
        raise InputError.of(
            "evaluate",
            "trigger",
            expected="finite values",
            got="NaN or infinity",
            way_out="check the trigger's arithmetic",
        )
    return stamped.to(inputs.device)
