"""Scanning a classifier: one pass over clean data, one exact QP a class, a second look, one test."""

from __future__ import annotations

import functools
import importlib
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from . import ops
from .corner_patches import FEWEST_IMAGES
from .data import DataLike, check_positive, check_seed
from .data_free import scan_without_data
from .detection import NormTest, judge_norms
from .doubts import doubted, doubts_of, samples_advised
from .errors import InputError, check_choice, counted
from .heads import Head, HeadModule, check_model
from .identity import lengths_of
from .joint_test import shipped_calibration
from .latent_patch import has_latent_patch, patch_in_front
from .limited_scan import hidden_by_patch, holds_back, not_cleared, with_limits
from .observation import Metric, Observation, observe, proven_norms, solve, solve_balanced
from .ops import MinimalPerturbation, SolverSettings
from .patch_reach import FEWEST_PIXELS, has_room
from .reach import ENOUGH_GAIN
from .sample_keeper import LookKeeper
from .scan_report import Depth, ScanReport, ScanTimings
from .second_look import SecondLook, classes_to_look_at, look_again, look_without_gradients
from .verdict import Evidence, Finding, finding_of_norms, weigh

logger = logging.getLogger(__name__)

_NO_ROOM = (
    f"; only the norms were tested, as squares in corners take images of {FEWEST_PIXELS} pixels"
)

# Gradients take several times the memory of a forward pass.
_LOOK_BATCH_SIZE = 128


def scan(
    model: nn.Module,
    data: DataLike | None,
    *,
    input_shape: Sequence[int] | None = None,
    head: str | None = None,
    metric: Metric = "standardized",
    quantile: float = 1.0,
    alpha: float = 0.01,
    depth: Depth = "thorough",
    batch_size: int = 256,
    settings: SolverSettings = ops.DEFAULT_SETTINGS,
    trust_patch: bool = False,
    seed: int = 0,
    progress: bool | None = None,
) -> ScanReport:
    """Scans a classifier for a backdoor, with a few clean samples and no knowledge of the trigger.

    For every class k the minimal latent perturbation s_k that sends all samples to k is solved
    exactly (arXiv 2511.08944); a class whose norm |s_k| is abnormally small is suspect. So it is where
    latents are rescaled to weigh the same in the head, as whoever made the model can give them any scale.
    Then random
    squares are laid into the corners of a few images, and faint waves over them. A thorough scan also
    asks the gradients how far one small change of the input drives all images into each class, how
    many images a small patch moves, whether one change shuffles the classes, and whether a small patch
    in a corner leads a single class astray.

    Args:
        model: maps inputs [N, ...] to logits [N, C] through a last nn.Linear, or a 1x1 nn.Conv2d at
            a pooled latent. Used in evaluation mode, on its own device; left as it was.
        data: clean samples: a pair of tensors (inputs, labels), an ImageSet, a Dataset, or any
            iterable of (inputs, labels) batches; streamed once. Samples of at least 2 classes.
            None scans without any: classes are driven from noise, many backdoors pass unseen, and
            the verdict is "backdoored" or "inconclusive".
        input_shape: of one input, such as (3, 32, 32), where there is no data; values in [0, 1].
        head: the name of the last linear layer, where the model is too unusual to tell.
        metric: "standardized" measures every latent in units of 1 / its spread over the data;
            "l2" is the paper's plain norm.
        quantile: the share of samples that must be carried past each pair of classes; 1, the
            paper's, is all of them, and 0.99 leaves out the one in a hundred that is hardest. Below
            1 the margins need more memory: all logits, N x C, or, where that is less and N known
            beforehand, (1 - quantile) N x C x C.
        alpha: false-alarm rate of the verdict on a clean model, over all classes and all evidence
            together; between 0 and 1. It is that of one scan: of several quantiles, choose one
            before looking.
        depth: "thorough" asks gradients as well, which takes some seconds to minutes and a model
            that has them (of another, a warning says so, and it is never called clean); "fast" runs
            the model forward alone, on some thousand changed images beside the samples, and misses
            more, all-to-all backdoors above all; of inputs that are no images, or of less than 12 pixels, it judges the norms alone, as
            "norms" always does, which finds half of what the others do, is mostly inconclusive of ten
            classes, and costs nothing beyond one pass over the samples.
        batch_size: samples in a forward pass, where the data is not already in batches.
        settings: of the exact solver.
        trust_patch: whether a latent patch of the model is of a repair of your own. One that somebody else
            put into the weights could lead inputs into a class as well as keep them out, so that a
            model with a patch is not called clean otherwise.
        seed: of all random choices; on one machine the same seed gives the same
            report.
        progress: whether to show a progress bar; None shows it on a terminal.

    Returns:
        ScanReport with the verdict, the suspects, the p-value, norms, perturbations, certificates.

    Raises:
        HeadNotFoundError: no layer reproduces the model's logits; name it with `head`.
        InputError: no samples, samples of one class, labels out of range, NaN or infinity, inputs
            of a shape that the model rejects.
    """
    return scan_looking_at(
        (),
        model,
        data,
        input_shape=input_shape,
        head=head,
        metric=metric,
        quantile=quantile,
        alpha=alpha,
        depth=depth,
        batch_size=batch_size,
        settings=settings,
        trust_patch=trust_patch,
        seed=seed,
        progress=progress,
    )


def scan_looking_at(
    classes: tuple[int, ...],
    model: nn.Module,
    data: DataLike | None,
    *,
    head: str | None,
    metric: Metric,
    quantile: float,
    alpha: float,
    batch_size: int,
    trust_patch: bool,
    seed: int,
    progress: bool | None,
    input_shape: Sequence[int] | None = None,
    depth: Depth = "thorough",
    settings: SolverSettings = ops.DEFAULT_SETTINGS,
    for_gate: bool = False,
) -> ScanReport:
    """As `scan`, but that these classes are looked at however many there are, and whatever their norms.

    With `for_gate` what a latent patch holds back is left in doubt, also if it is trusted: the gate of
    a repair asks for that in its own way.
    """
    check_model(model, "scan")
    check_choice("scan", "metric", metric, get_args(Metric), "standardized")
    check_choice("scan", "depth", depth, get_args(Depth), "thorough")
    ops.check_quantile(quantile, "scan")
    ops.check_settings(settings, "scan")
    if not ops.is_number(alpha) or not 0 < alpha < 1:
        raise InputError.of(
            "scan",
            "alpha",
            expected="a rate between 0 and 1",
            got=repr(alpha),
            way_out="leave it out for 0.01",
        )
    if not isinstance(trust_patch, bool):
        raise InputError.of(
            "scan",
            "trust_patch",
            expected="True or False",
            got=repr(trust_patch),
            way_out="leave it out unless the patch is of a repair of your own",
        )
    batch_size = check_positive("scan", "batch_size", batch_size, None)
    seed = check_seed("scan", seed)
    quantile, alpha = float(quantile), float(alpha)  # numpy's have no place in JSON
    if (data is None) != (input_shape is not None):
        raise InputError.of(
            "scan",
            "input_shape",
            expected="the shape of one input where there is no data, and nothing where there is",
            got="none" if input_shape is None else f"{input_shape!r} beside data",
            way_out="pass clean samples, or data=None and an input_shape such as (3, 32, 32)",
        )
    if input_shape is not None:
        _refuse_what_needs_data(depth, quantile)
        report = scan_without_data(
            model,
            input_shape,
            head=head,
            metric=metric,
            alpha=alpha,
            batch_size=min(batch_size, _LOOK_BATCH_SIZE),
            settings=settings,
            seed=seed,
            progress=progress,
        )
        module = cast(HeadModule, model.get_submodule(report.head))
        bare = Head(report.head, module)
        return _with_limits(report, model, bare, None, batch_size, trust_patch, for_gate)
    assert data is not None
    looks = depth != "norms"
    keeper = None
    if looks or has_latent_patch(model):
        keeper = LookKeeper(seed, gradients=depth == "thorough")
    observation = observe(
        model,
        data,
        head=head,
        batch_size=batch_size,
        progress=progress,
        operation="scan",
        quantile=quantile,
        keeper=keeper,
        before_patch=True,
    )
    if observation.classes_seen < 2:
        raise InputError.of(
            "scan",
            "data",
            expected="samples of at least 2 classes",
            got=f"{counted(observation.samples, 'sample')} of 1 class",
            way_out="pass clean samples of all classes",
        )
    importlib.import_module("scipy.stats")  # its first use takes a second, which is no analysis
    started = time.perf_counter()
    perturbations, scale = solve(observation, metric, settings, operation="scan")
    balanced = solve_balanced(observation, settings)
    solved = time.perf_counter()
    norm = proven_norms(perturbations)
    beside = None if balanced is None else proven_norms(balanced)
    test = _explained(judge_norms(norm, alpha, beside), norm, quantile)
    notes: list[str] = []
    hidden = patch_in_front(model, observation.head) is not None and bool((norm == 0).any())
    if hidden:
        # Whoever wrote the patch may have shifted the head, and have the patch undo it: the norms say nothing.
        reason = hidden_by_patch(norm, quantile)
        notes.append(reason)
        norm[:] = math.nan
        test = replace(judge_norms(norm, alpha), reason=reason, hidden=True)
    finding = finding_of_norms(test)
    evidence: Evidence | None = None
    tested = time.perf_counter()
    looked = tested
    # Where the norms have nothing to compare the model is beyond any test, unless a patch is why.
    if looks and keeper is not None and (hidden or not math.isnan(test.usual_norm)):
        chosen = tuple(sorted({*classes_to_look_at(norm, test.balanced), *classes}))
        look, untold = _look_again(model, observation, keeper, chosen, batch_size, seed, progress)
        notes += untold
        looked = time.perf_counter()
        if look is not None:
            finding, evidence = weigh(test, look, alpha, shipped_calibration())
        elif depth == "fast" and not has_room(keeper.all.samples()[0].shape[1:]):
            finding = replace(finding, reason=finding.reason + _NO_ROOM)
    report = _report(
        observation,
        perturbations,
        balanced,
        scale,
        test,
        finding,
        evidence,
        notes,
        metric,
        quantile,
        alpha,
        depth,
        ScanTimings(
            observation.forward_seconds,
            observation.margin_seconds,
            solved - started,
            looked - tested,
            tested - solved + time.perf_counter() - looked,
        ),
    )
    return _with_limits(report, model, observation.head, keeper, batch_size, trust_patch, for_gate)


def _with_limits(
    report: ScanReport,
    model: nn.Module,
    head: Head,
    keeper: LookKeeper | None,
    batch_size: int,
    trust_patch: bool,
    for_gate: bool,
) -> ScanReport:
    """The report in the light of the latent patch in front of the model's head, if there is one."""
    patch = patch_in_front(model, head)
    if patch is not None:
        targets = tuple(sorted(set(patch.patch.targets.tolist())))
        samples = (torch.zeros(0), torch.zeros(0)) if keeper is None else keeper.all.samples()
        size = min(batch_size, _LOOK_BATCH_SIZE)
        holds = functools.partial(holds_back, model, patch, samples, report.perturbation, size)
        report = with_limits(report, targets, holds, trusted=trust_patch and not for_gate)
    report = replace(report, trust_patch=trust_patch, model_norms=lengths_of(model))
    return not_cleared(report) if has_latent_patch(model) and not trust_patch else report


def _refuse_what_needs_data(depth: Depth, quantile: float) -> None:
    if depth != "thorough" or quantile != 1:
        raise InputError.of(
            "scan",
            "data",
            expected='clean samples for a quantile or any depth but "thorough"',
            got="None",
            way_out="leave depth and quantile out, or pass clean samples",
        )


def _look_again(
    model: nn.Module,
    observation: Observation,
    keeper: LookKeeper,
    classes: tuple[int, ...],
    batch_size: int,
    seed: int,
    progress: bool | None,
) -> tuple[SecondLook | None, list[str]]:
    """The second look at these classes, as far as there is one, and a warning of why there is no more."""
    if not keeper.all.one_shape:
        return None, ["the inputs differ in shape, so that only the norms were tested"]
    samples = keeper.all.samples()
    more: dict[str, Any] = {
        "batch_size": min(batch_size, _LOOK_BATCH_SIZE),
        "seed": seed,
        "progress": progress,
    }
    notes: list[str] = []
    enough = observation.samples >= FEWEST_IMAGES  # of fewer it is told that they are too few
    look = None
    if keeper.by_class is not None:
        by_class = keeper.by_class.samples()
        try:
            look = look_again(model, observation.head, samples, classes, by_class, **more)
            notes += look.notes if enough else ()
        except InputError as error:
            notes.append(f"gradients were not asked, as that was not possible ({error})")
    if look is None:
        look, untried = look_without_gradients(model, observation.head, samples, classes, **more)
        notes += untried if enough else ()
    if look is None and notes:
        notes = [f"only the norms were tested: {'; '.join(notes)}"]
    reached = None if look is None else look.reach
    # Of a gain that is no number nothing is known either.
    if reached is not None and not float(reached.gain[-1].median()) >= ENOUGH_GAIN:
        notes.append(
            "no change of the inputs moves the model much, by its gradients at least; what hides them "
            "would hide a backdoor from the second look, too"
        )
    return look, notes


def _explained(test: NormTest, norm: npt.NDArray[np.float64], quantile: float) -> NormTest:
    """The test, whose reason says what a norm of 0 means: at a quantile not what it does at 1."""
    stuck = np.flatnonzero(norm == 0)
    if not len(stuck):
        return test
    if quantile == 1:
        reason = (
            f"every sample is already predicted as class {stuck[0]}, so that the norms cannot be "
            "compared"
        )
    else:
        reason = (
            f"class {stuck[0]} needs no change at quantile {quantile:g}, so that the norms cannot "
            "be compared; raise the quantile"
        )
    return replace(test, reason=reason)


def _report(
    observation: Observation,
    perturbations: MinimalPerturbation,
    balanced: MinimalPerturbation | None,
    scale: Tensor | None,
    test: NormTest,
    finding: Finding,
    evidence: Evidence | None,
    notes: list[str],
    metric: Metric,
    quantile: float,
    alpha: float,
    depth: Depth,
    timings: ScanTimings,
) -> ScanReport:
    solved = [perturbations] if balanced is None else [perturbations, balanced]
    doubts = doubts_of(observation, solved, notes)
    finding = doubted(finding, doubts)
    for doubt in doubts:
        logger.warning("scan: %s", doubt.text)
    return ScanReport(
        verdict=finding.verdict,
        suspects=finding.suspects,
        doubtful=finding.doubtful,
        p_value=finding.p_value,
        reason=finding.reason,
        warnings=tuple(doubt.text for doubt in doubts),
        test=test,
        evidence=evidence,
        perturbations=perturbations,
        head=observation.head.name,
        num_classes=observation.head.num_classes,
        latent_dim=observation.head.latent_dim,
        samples=observation.samples,
        samples_advised=samples_advised(
            finding, doubts, observation.samples, comparable=not math.isnan(test.usual_norm)
        ),
        accuracy=observation.correct / observation.samples,
        confidence=observation.confidence,
        metric=metric,
        quantile=quantile,
        scale=scale,
        margins=observation.margins,
        alpha=alpha,
        depth=depth,
        timings=timings,
    )
