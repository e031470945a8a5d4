"""Removing a backdoor: a repaired copy of the model, and what the repair cost."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import SupportsIndex, get_args

import torch
from torch import Tensor, nn

from . import ops
from .data import DataLike, materialise
from .errors import InputError, check_choice
from .files import StrPath
from .finetune_checkpoint import check_checkpoint
from .finetuning import FinetuneSettings
from .further_targets import with_further_targets
from .heads import Head, check_labels_in_range, check_model, model_dtype
from .identity import lengths_of, same_lengths
from .latent_patch import has_latent_patch
from .repair_attempts import Judge, result_of, try_methods
from .repair_case import (
    RepairCase,
    choose_targets,
    locate_head,
    reconstructed_tac,
    seek_adversary,
    split_of,
    without_unreachable,
)
from .repair_methods import (
    Method,
    checkpoint_of,
    count_right,
    settings_for,
)
from .repair_result import RepairResult
from .repair_settings import RepairSettings
from .scan_report import Depth, ScanReport
from .scanning import scan

logger = logging.getLogger(__name__)

# Where torch.compile keeps what it compiles.
_COMPILED = "_orig_mod."


@torch.inference_mode(False)
def repair(
    model: nn.Module,
    data: DataLike,
    report: ScanReport | None = None,
    targets: Iterable[SupportsIndex] | SupportsIndex | None = None,
    method: Method = "auto",
    *,
    settings: RepairSettings | None = None,
    max_accuracy_drop: float | None = 0.02,
    head: str | None = None,
    progress: bool | None = None,
    checkpoint: StrPath | None = None,
) -> RepairResult:
    """Removes the backdoor of the suspect classes and returns a repaired copy of the model.

    Where there is no suspect, the classes are repaired that the scan is in doubt of
    (`ScanReport.doubtful`), by a patch alone if nothing leads inputs there. Beside suspects they get
    limits of their own where a patch is what is accepted, and only if the gate accepts that as well.
    Where a repair is rolled back and a scan of its outcome suspects another class, now that the first
    are gone, that one is repaired with them, three times at most. Of these classes those are left out,
    with a warning, into which no perturbation is known.

    First an adversary is sought, as `scan` does: a small change of the whole input and a small patch
    that lead into each target. Latents are led there by the reconstructed trigger-activated change
    s_t as well. Then one of three methods takes these ways away:

    "patch" puts a limit in front of the last layer (`latent_patch`): latents that lie further along
    such a way than clean ones of the target get the change taken off and the target's logit lowered.
    Nothing is trained, all other latents pass as they are, and `remove_latent_patch` undoes it.

    "prune" makes channels constant that lead there and are worth little on clean samples (`pruning`).

    "finetune" trains on clean data with the loss

        CE(z(x), y) + distillation KL(z_0(x) || z(x))
                    + beta CE(W (phi(x) + s_t) + b, y) + gamma A(z(a_t(x)))

    The first and the third term are the removal step of arXiv 2511.08944: latents shifted by the
    reconstructed trigger-activated change s_t are taught their true class. The second holds the
    model where it was. The last is an `InputAdversary`: small changes of the whole input and small
    patches, made to lead into t and moving on with the model, must not lead there. With several
    targets they take turns, and the third term is a mean over them. `FinetuneSettings.of_the_paper()`
    is the published loss alone.

    "auto" tries them in this order, which is that of their cost, until one is accepted and what led
    into the targets leaves accuracy near to what it was; of several that are accepted it keeps the
    one with the highest sum of accuracies with and without it, of which that without counts thrice.
    In front of a model that was pruned or trained it then puts limits as well, if they cost no more
    than is allowed: they also stop triggers that the training never saw.

    The accuracies are measured on samples that are not repaired with; s_t comes from the report's
    margins first, from all samples that it saw, at its quantile, and is solved again after every
    epoch. A report at a quantile below 1 has a shorter s_t, which some of the samples need not follow.

    Args:
        model: the classifier, as for `scan`; it is copied and left untouched. Of a compiled one
            (torch.compile) what was compiled is repaired. Of a copy that is
            fine-tuned every parameter is trained, also those that are frozen.
        data: clean labelled samples, as for `scan`; held in memory.
        report: a scan of this model; None scans it with the same data first, as `scan` does by
            default, or without gradients where there are targets: of a patch that leads a single class
            astray, which the gate would ask again, only a thorough report tells.
        targets: the class or classes to repair, overriding what the report suspects or doubts.
        method: "auto", "patch", "prune" or "finetune".
        settings: `PatchSettings`, `PruneSettings` or `FinetuneSettings` of the method; None for the
            defaults. With "auto" of any of them, whose split of the data the others share.
        max_accuracy_drop: what the repair may cost on held-out samples. One that costs more, after
            which what led into a target still does, or of which a thorough scan has doubts about a
            target, is rolled back; but where "auto" has nothing better, and norms alone stand against a
            patch, which cannot move them, that is handed out as a precaution. None accepts whatever
            comes out, unseen, and needs a method.
        head: the name of the last linear layer, where the model is too unusual to tell.
        progress: whether to show a progress bar; None shows it on a terminal.
        checkpoint: a .safetensors file in which a fine-tuning keeps its state after every epoch, and
            from which it goes on where it was interrupted, with the same outcome. It stays there, and
            is of the first classes alone: what is repaired once these are gone has none.

    Returns:
        RepairResult with the repaired model, or a copy of the original where no repair was
        accepted, and the accuracy before and after on held-out data.

    Raises:
        InputError: nothing to repair, a target out of range or unreachable, a report of a model
            of other sizes, too few samples, settings of another method, a loss that diverges, a
            checkpoint of something else, and everything that `scan` raises.
        FileError: a checkpoint that cannot be read or written.
    """
    check_choice("repair", "method", method, get_args(Method), "auto")
    check_model(model, "repair")
    all_settings = settings_for(method, settings)
    shared = settings if settings is not None else next(iter(all_settings.values()))
    _check_drop(max_accuracy_drop, method)
    kept_at = _checked_checkpoint(checkpoint, method)
    if has_latent_patch(model):
        raise InputError.of(
            "repair",
            "model",
            expected="a model without a latent patch",
            got="one that has one",
            way_out="repair what tacext.remove_latent_patch(model) returns, with all targets",
        )
    inputs, labels = materialise(data, operation="repair")
    model, head = _before_compiling(model, head)
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        model = copy.deepcopy(model)  # which gradients may pass by
    training, holdout = split_of(len(labels), shared, judged=max_accuracy_drop is not None)
    report = _checked_report(report, model)
    if report is None:
        # Targets that are given need not be found, but the gate wants to know what leads into them, and
        # the repair of a wave: both are seen without gradients. Not so the patch of a single
        # class: for that a thorough report can be passed.
        depth: Depth = "thorough" if targets is None else "fast"
        report = scan(
            model,
            (inputs, labels),
            head=head,
            depth=depth,
            batch_size=shared.batch_size,
            seed=shared.seed,
            progress=progress,
        )
    found = locate_head(model, inputs[:8], head, report)
    check_labels_in_range(labels, found.num_classes, "repair")
    work = _Work(
        model,
        found,
        (inputs, labels),
        training,
        holdout,
        report,
        shared,
        max_accuracy_drop,
        progress,
    )
    blind = method == "finetune" and _is_blind(settings)
    chosen, left_out = choose_targets(report, targets, found), dict[int, str]()

    def reachable(classes: tuple[int, ...]) -> tuple[int, ...]:
        kept, others = without_unreachable(report, found, choose_targets(report, classes, found))
        left_out.update(others)
        return kept

    if targets is None:
        chosen = reachable(chosen) or chosen  # of none there is the error of a class that was named
    result = _repair_classes(work, chosen, method, all_settings, kept_at, blind=blind)
    if targets is None:
        result = with_further_targets(
            result,
            report.doubtful,
            method,
            lambda classes, by: _repair_classes(
                work,
                choose_targets(report, classes, found),
                by,
                all_settings if by == method else {by: all_settings[by]},
                None,
                blind=blind,
            ),
            reachable,
        )
        result = replace(result, warnings=(*result.warnings, *left_out.values()))
    for warning in result.warnings:
        logger.warning("repair: %s", warning)
    logger.info(
        "repair: targets %s by %s, held-out accuracy %.4f -> %.4f",
        result.targets,
        result.method,
        result.accuracy_before,
        result.accuracy_after,
    )
    return result


@dataclass(frozen=True, eq=False)
class _Work:
    """What all attempts have in common, whichever classes they repair."""

    model: nn.Module
    head: Head
    samples: tuple[Tensor, Tensor]
    training: Tensor
    holdout: Tensor
    report: ScanReport
    shared: RepairSettings
    max_accuracy_drop: float | None
    progress: bool | None


def _repair_classes(
    work: _Work,
    targets: tuple[int, ...],
    method: Method,
    all_settings: Mapping[Method, RepairSettings],
    checkpoint: Path | None,
    *,
    blind: bool,
) -> RepairResult:
    """The outcome for these classes; with `blind` nothing is sought that leads into them."""
    (inputs, labels), report, shared = work.samples, work.report, work.shared
    shifts = reconstructed_tac(report, work.head, targets)
    held_out = inputs[work.holdout], labels[work.holdout]
    trained_on = inputs[work.training], labels[work.training]
    right_before = count_right(work.model, *held_out, shared.batch_size)

    started = time.perf_counter()
    adversary, why_blind = None, ""
    if not blind:
        adversary, why_blind = seek_adversary(
            work.model, work.head, trained_on, targets, shared, work.progress, report
        )
    case = RepairCase(
        work.model,
        work.head,
        *trained_on,
        shifts,
        targets,
        adversary,
        work.max_accuracy_drop,
        report.quantile,
        work.progress,
        checkpoint,
    )
    tuning = all_settings.get("finetune")
    if isinstance(tuning, FinetuneSettings) and (file := checkpoint_of(case, tuning)) is not None:
        file.load()  # a file of something else is no matter of one method alone
    seconds = time.perf_counter() - started
    was = None if adversary is None else adversary.effects(work.model, *held_out, shared.batch_size)
    judge = Judge(case, work.samples, held_out, report, right_before, was, why_blind)
    attempts, kept, candidate = try_methods(judge, all_settings, method)
    return result_of(judge, attempts, kept, candidate, all_settings[kept.method], seconds)


def _checked_report(report: ScanReport | None, model: nn.Module) -> ScanReport | None:
    """The caller's report, of a compiled model as one of what was compiled."""
    if report is None:
        return None
    if not isinstance(report, ScanReport):
        raise InputError.of(
            "repair",
            "report",
            expected="a ScanReport or None",
            got=type(report).__name__,
            way_out="pass classes as targets=[...]",
        )
    known = report.model_norms
    if known and not same_lengths(lengths_of(model), known, model_dtype(model)):
        raise InputError.of(
            "repair",
            "report",
            expected="a scan of this very model",
            got="one of other weights, or of another normalisation around them",
            way_out="scan this model, or leave the report out",
        )
    if not report.head.startswith(_COMPILED):
        return report
    return replace(report, head=report.head.removeprefix(_COMPILED))


def _before_compiling(model: nn.Module, head: str | None) -> tuple[nn.Module, str | None]:
    """The module that torch.compile wrapped: compiled code passes by hooks, and copies share it."""
    inner = model._modules.get(_COMPILED.removesuffix("."))
    if inner is None:
        return model, head
    return inner, None if head is None else head.removeprefix(_COMPILED)


def _is_blind(settings: RepairSettings | None) -> bool:
    """Whether shifted latents alone are to be trained against, for which no gradients are needed."""
    return isinstance(settings, FinetuneSettings) and settings.gamma == 0


def _checked_checkpoint(checkpoint: StrPath | None, method: Method) -> Path | None:
    if checkpoint is None:
        return None
    if method not in ("auto", "finetune"):
        raise InputError.of(
            "repair",
            "checkpoint",
            expected="nothing, as only a fine-tuning has one",
            got=f"{os.fspath(checkpoint)!r} with method={method!r}",
            way_out="leave it out",
        )
    return check_checkpoint(checkpoint)


def _check_drop(max_accuracy_drop: float | None, method: Method) -> None:
    if max_accuracy_drop is None:
        if method == "auto":
            raise InputError.of(
                "repair",
                "method",
                expected="one method, as nothing judges what comes out",
                got="'auto' with max_accuracy_drop=None",
                way_out='pass method="patch", "prune" or "finetune"',
            )
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
