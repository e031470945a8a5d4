"""A scan without any data: what gradients make of noise, class by class.

Every class is driven, from noise, as far ahead of the others as inputs allow (`max_margin`); a class
that overshoots is suspect. The furthest input of each class, its prototype, then stands in for data:
a class is also suspect that the prototypes of all others reach with a small latent change. Both
together see less than real images do, so a model is never cleared this way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from .detection import FEWEST_CLASSES, judge_norms
from .differentiable import DifferentiableModel, InputBox
from .doubts import ENOUGH_SAMPLES, Doubt, doubted, unsolved_doubt
from .errors import InputError, counted
from .files import explain
from .heads import Head, evaluating, find_head, run_model
from .joint_test import judge_jointly, shipped_calibration
from .max_margin import MaxMargin, drive_classes
from .observation import Metric, Observation, observe, proven_norms, solve
from .ops import SolverSettings
from .scan_report import ScanReport, ScanTimings
from .second_look import margin_evidence, norm_evidence
from .verdict import Evidence, doubt_level, weigh_without_data

_OPERATION = "scan"


def _checked_shape(model: nn.Module, input_shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a tuple, which the model takes."""
    shape = tuple(input_shape) if isinstance(input_shape, Sequence | torch.Size) else ()
    if not shape or not all(type(n) is int and n > 0 for n in shape):
        raise InputError.of(
            _OPERATION,
            "input_shape",
            expected="the shape of one input, such as (3, 32, 32)",
            got=repr(input_shape),
            way_out="give channels, height and width as the model takes them, without the batch",
        )
    try:
        noise = InputBox.unit(shape).noise(2, 0)
    except (RuntimeError, MemoryError) as error:
        raise InputError.of(
            _OPERATION,
            "input_shape",
            expected="inputs that fit into memory",
            got=f"{list(shape)} ({explain(error)})",
            way_out="give channels, height and width as in the model's training",
        ) from error
    with evaluating(model), torch.no_grad():
        run_model(model, noise, _OPERATION, argument="input_shape")
    return shape


def observe_prototypes(
    model: nn.Module,
    head: Head,
    box: InputBox,
    *,
    batch_size: int,
    seed: int = 0,
    progress: bool | None = None,
) -> tuple[Observation, MaxMargin]:
    """Drives every class from noise and observes what comes of it, a few classes at a time.

    Of each class the input that got furthest is observed, and none is kept.
    """
    driven = drive_classes(
        DifferentiableModel(model, head, _OPERATION, without_gradients="or pass clean samples"),
        box,
        range(head.num_classes),
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    margins: list[Tensor] = []
    seconds = 0.0

    def prototypes() -> Iterator[tuple[Tensor, Tensor]]:
        nonlocal seconds
        began = time.perf_counter()
        for group in driven:
            seconds += time.perf_counter() - began
            margins.append(group.margin)
            yield group.inputs, torch.tensor(group.classes)
            began = time.perf_counter()

    observation = observe(
        model,
        prototypes(),
        head=head.name,
        batch_size=batch_size,
        progress=False,
        operation=_OPERATION,
        before_patch=True,
    )
    classes = tuple(range(head.num_classes))
    return observation, MaxMargin(classes, torch.cat(margins), seconds)


@torch.inference_mode(False)
def scan_without_data(
    model: nn.Module,
    input_shape: Sequence[int],
    *,
    head: str | None,
    metric: Metric,
    alpha: float,
    batch_size: int,
    settings: SolverSettings,
    seed: int,
    progress: bool | None,
) -> ScanReport:
    """Scans with synthetic inputs alone; see `scan` for the arguments and errors.

    Inputs are taken to lie in [0, 1].
    """
    box = InputBox.unit(_checked_shape(model, input_shape))
    found_head = find_head(model, box.noise(4, seed), head, operation=_OPERATION)
    observation, found = observe_prototypes(
        model, found_head, box, batch_size=batch_size, seed=seed, progress=progress
    )
    started = time.perf_counter()
    perturbations, scale = solve(observation, metric, settings, operation=_OPERATION)
    solved = time.perf_counter()
    norm = proven_norms(perturbations)
    test = judge_norms(norm, alpha)
    evidence = {
        "margin": margin_evidence(found.margin.mean(1).numpy()),
        "prototype": norm_evidence(norm),
    }
    joint = judge_jointly(evidence, alpha, shipped_calibration(), doubt_level(alpha))
    finding = weigh_without_data(joint)
    unsolved = unsolved_doubt(perturbations)
    doubts: tuple[Doubt, ...] = () if unsolved is None else (unsolved,)
    if np.isfinite(norm).sum() < FEWEST_CLASSES:
        few = f"{counted(int(np.isfinite(norm).sum()), 'class has', 'classes have')} a norm"
        doubts += (Doubt(f"{few}; {FEWEST_CLASSES} or more can be compared", severe=True),)
    if stuck := (norm == 0).nonzero()[0].tolist():
        classes = " or ".join(map(str, stuck))
        everything = (
            f"every synthetic input is taken for class {classes}, whatever class it was driven to: check "
            f"the normalisation (mean and std), or look at class {classes}"
        )
        doubts += (Doubt(everything, severe=False),)
    finding = doubted(finding, doubts)
    return ScanReport(
        verdict=finding.verdict,
        suspects=finding.suspects,
        doubtful=finding.doubtful,
        p_value=finding.p_value,
        reason=finding.reason,
        warnings=tuple(doubt.text for doubt in doubts),
        test=test,
        evidence=Evidence(None, found, joint, None, None),
        perturbations=perturbations,
        head=observation.head.name,
        num_classes=observation.head.num_classes,
        latent_dim=observation.head.latent_dim,
        samples=0,
        samples_advised=ENOUGH_SAMPLES if finding.verdict == "inconclusive" else None,
        accuracy=math.nan,
        confidence=math.nan,
        metric=metric,
        quantile=1.0,
        scale=scale,
        margins=observation.margins,
        alpha=alpha,
        depth="thorough",
        timings=ScanTimings(
            observation.forward_seconds,
            observation.margin_seconds,
            solved - started,
            found.seconds,
            time.perf_counter() - solved,
        ),
    )
