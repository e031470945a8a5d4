"""The methods of repair: each turns the same case into a candidate, a repaired copy of the model."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from . import ops
from .copies import different_inputs
from .early_exits import EarlyExits
from .early_exits_fit import MOST_INPUTS, fit_early_exits
from .errors import InputError, NotFiniteError
from .finetune_checkpoint import FinetuneCheckpoint, fingerprint
from .finetuning import EpochLosses, FinetuneSettings, diverged, finetune
from .heads import Head, HeadModule, evaluating, model_dtype, recording_latents
from .heads import run_model as run
from .input_adversary import FEWEST_LED, InputAdversary
from .latent_patch import with_latent_patch
from .latent_patch_fit import (
    LedLatents,
    PatchSettings,
    at_most,
    fit_latent_limit,
    fit_latent_patch,
    touched_by_exits,
)
from .ops import Status
from .pruning import PruneHistory, PruneSettings, prune
from .repair_case import RepairCase
from .repair_settings import RepairSettings

logger = logging.getLogger(__name__)

Method = Literal["auto", "patch", "prune", "finetune"]

# In order of what they cost.
SETTINGS_OF: dict[Method, type[RepairSettings]] = {
    "patch": PatchSettings,
    "prune": PruneSettings,
    "finetune": FinetuneSettings,
}

# Latents that are kept of each way.
_MOST_LED = 512


@dataclass(frozen=True, eq=False)
class Candidate:
    """A repaired copy, before anybody has judged it.

    Attributes:
        model: in evaluation mode, of the original's dtype.
        head: of it.
        history: losses of a fine-tuning.
        pruning: what was pruned.
        notes: what the caller should know of how it was made.
        seconds: that it took.
    """

    model: nn.Module
    head: Head
    seconds: float = 0.0
    history: tuple[EpochLosses, ...] = field(default=(), repr=False)
    pruning: PruneHistory | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()


def make_candidate(method: Method, case: RepairCase, settings: RepairSettings) -> Candidate:
    """Repairs by one method.

    Args:
        method: any but "auto".
        case: what there is to repair.
        settings: of that method.

    Raises:
        InputError: what the method cannot repair, or a training that ran away.
    """
    begin = time.perf_counter()
    made = _METHODS[method](case, settings)
    made.model.eval()
    _check_still_finite(case.model, made.model, method)
    return replace(made, seconds=time.perf_counter() - begin)


def _copy(case: RepairCase) -> tuple[nn.Module, Head]:
    model = copy.deepcopy(case.model)
    return model, Head(case.head.name, cast(HeadModule, model.get_submodule(case.head.name)))


def _by_patch(case: RepairCase, settings: RepairSettings) -> Candidate:
    """A limit in front of the head, for s_t and for what leads into a target, found in rounds.

    What a round finds in spite of the limits that are there gets one of its own. What no round finds
    is told by where clean latents of the target lie.
    """
    assert isinstance(settings, PatchSettings)
    case = _without_copies(case)
    head, size = case.head, settings.batch_size
    clean = _latents(case.model, head, case.inputs, size)
    predicted = head.logits(clean).argmax(1)
    ways = _shifted(case.targets, case.shifts, clean, predicted)
    patched, patched_head, adversary = case.model, head, case.adversary
    for round_ in range(settings.rounds):
        found = []
        if adversary is not None:
            found = _ways_of(case, adversary, patched, clean, predicted, size)
        if round_ and not found:
            break
        ways += found
        enough = [way for way in ways if len(way.latent) >= 2]
        patch = fit_latent_patch(head, clean, enough, settings)
        patched, patched_head = with_latent_patch(case.model, head, patch)
        if adversary is not None and round_ + 1 < settings.rounds:
            try:
                adversary = InputAdversary.sought(
                    patched,
                    patched_head,
                    case.inputs,
                    case.labels,
                    case.targets,
                    batch_size=size,
                    seed=settings.seed,
                    progress=case.progress,
                )
            except InputError:  # what was found so far stands
                break
    share = touched_by_exits(predicted, case.targets, settings)
    exits, notes = _exits(case, case.model, head, settings, share)
    # The last, as it would hide from the rounds what they are to find.
    patch.limit = fit_latent_limit(head, clean, case.targets, settings)
    patched, patched_head = with_latent_patch(case.model, head, patch, exits)
    return Candidate(patched, patched_head, notes=notes)


def with_limit(candidate: Candidate, case: RepairCase, settings: PatchSettings) -> Candidate | None:
    """A trained or pruned candidate with limits in front of its head, for s_t and for all else.

    Training closes the ways that were found, and is blind to others; the limits are not.

    Args:
        candidate: of "prune" or "finetune".
        case: what was repaired.
        settings: of the limits.

    Returns:
        None where they cannot be solved for: too few clean samples of a target are left.
    """
    begin = time.perf_counter()
    case = _without_copies(case)
    head = candidate.head
    clean = _latents(candidate.model, head, case.inputs, settings.batch_size)
    logits = head.logits(clean)
    predicted = logits.argmax(1)
    margins = ops.pairwise_margin_max(logits)
    solved = ops.minimal_perturbation(head.weight.detach(), margins, classes=case.targets)
    if not bool((solved.status == Status.OPTIMAL).all()):
        return None
    ways = _shifted(case.targets, solved.perturbation, clean, predicted)
    try:
        patch = fit_latent_patch(head, clean, ways, settings)
        patch.limit = fit_latent_limit(head, clean, case.targets, settings)
    except InputError:
        return None
    share = touched_by_exits(predicted, case.targets, settings)
    exits, notes = _exits(case, candidate.model, head, settings, share)
    model, limited_head = with_latent_patch(candidate.model, head, patch, exits)
    seconds = candidate.seconds + time.perf_counter() - begin
    return replace(candidate, model=model.eval(), head=limited_head, seconds=seconds, notes=notes)


def _without_copies(case: RepairCase) -> RepairCase:
    """The case with equal samples once, by their first label.

    Limits would be judged on what they were made of.
    """
    first = different_inputs(case.inputs)
    copies = len(case.inputs) - len(first)
    if not copies:
        return case
    logger.info("repair: %d of %d samples are copies of others", copies, len(case.inputs))
    inputs, labels = case.inputs[first.to(case.inputs.device)], case.labels[first]
    return replace(case, inputs=inputs, labels=labels)


def _exits(
    case: RepairCase, model: nn.Module, head: Head, settings: PatchSettings, share: float
) -> tuple[EarlyExits | None, tuple[str, ...]]:
    """What says where inputs belong that the limits keep out of the targets, and has a limit itself.

    It may touch this share of each target's clean inputs. None where it cannot be had, and why: other
    limits do without.
    """
    if not settings.early_exits:
        return None, ()

    def attacked() -> Iterator[tuple[Tensor, Tensor]]:
        adversary = case.adversary
        for j, target in enumerate(case.targets if adversary is not None else ()):
            assert adversary is not None
            others = (case.labels != target).nonzero().flatten()
            for part in others[: MOST_INPUTS // len(case.targets)].split(settings.batch_size):
                if not len(part):
                    continue
                for images in adversary.first_attacks(j, case.inputs[part]):
                    yield images, case.labels[part]

    samples = case.inputs, case.labels
    try:
        exits = fit_early_exits(
            model,
            head,
            samples,
            attacked(),
            touched=dict.fromkeys(case.targets, share),
            batch_size=settings.batch_size,
            seed=settings.seed,
        )
    except InputError as error:  # the model rejects changed inputs, or there is too little memory
        return None, (f"inner layers are not asked what limits keep out ({error})",)
    return exits, ()


def _shifted(
    targets: tuple[int, ...], shifts: Tensor, clean: Tensor, predicted: Tensor
) -> list[LedLatents]:
    """Clean latents of other classes with s_t added, the way into each target that nobody has seen."""
    ways = []
    for target, shift in zip(targets, shifts, strict=True):
        others = at_most(clean[predicted != target], _MOST_LED)
        ways.append(LedLatents(target, others + shift.to(clean), None))
    return ways


def _ways_of(
    case: RepairCase,
    adversary: InputAdversary,
    model: nn.Module,
    clean: Tensor,
    predicted: Tensor,
    batch_size: int,
) -> list[LedLatents]:
    """What leads enough samples into a target of a model, as latents of the original one."""
    found = []
    for j, target in enumerate(case.targets):
        movable = ((predicted.cpu() != target) & (case.labels != target)).nonzero().flatten()
        if not len(movable):
            continue
        before = clean[movable.to(clean.device)]
        attacked: list[list[tuple[Tensor, Tensor]]] = []
        for part in movable.split(batch_size):
            images = adversary.first_attacks(j, case.inputs[part])
            attacked = attacked or [[] for _ in images]
            for way, batch in zip(attacked, images, strict=True):
                with evaluating(model), torch.no_grad():
                    there = run(model, batch, "repair").argmax(1) == target
                way.append((_latents(case.model, case.head, batch, batch_size), there))
        for way in attacked:
            led, there = (torch.cat(parts) for parts in zip(*way, strict=True))
            if float(there.double().mean()) >= FEWEST_LED:
                pair = (at_most(part[there], _MOST_LED) for part in (led, before))
                found.append(LedLatents(target, *pair))
    return found


@torch.no_grad()
def _latents(model: nn.Module, head: Head, inputs: Tensor, batch_size: int) -> Tensor:
    found = [torch.zeros(0, head.latent_dim).to(head.weight)]
    with evaluating(model), recording_latents(head) as recorder:
        for batch in inputs.split(batch_size):
            run(model, batch, "repair")
            found.append(recorder.take())
    return torch.cat(found)


def _by_pruning(case: RepairCase, settings: RepairSettings) -> Candidate:
    assert isinstance(settings, PruneSettings)
    model, head = _copy(case)
    history = prune(
        model,
        head,
        case.inputs,
        case.labels,
        case.shifts,
        case.targets,
        case.adversary,
        settings,
        max_accuracy_drop=1.0 if case.max_accuracy_drop is None else case.max_accuracy_drop,
        quantile=case.quantile,
        progress=case.progress,
    )
    return Candidate(model, head, pruning=history)


def checkpoint_of(case: RepairCase, settings: FinetuneSettings) -> FinetuneCheckpoint | None:
    """The file of this very fine-tuning.

    s_t is no part of what it is known by: it follows from the rest, up to the last bits.
    """
    if case.checkpoint is None:
        return None
    more: list[object] = [list(case.targets), case.head.name, case.quantile]
    if case.adversary is not None and case.adversary.waves:
        more.append(sorted((k, *wave) for k, wave in case.adversary.waves.items()))
    belongs_to = fingerprint(case.model, (case.inputs, case.labels), settings, *more)
    return FinetuneCheckpoint(case.checkpoint, belongs_to)


def _by_finetuning(case: RepairCase, settings: RepairSettings) -> Candidate:
    assert isinstance(settings, FinetuneSettings)
    # Half precision holds no optimiser's steps; it is trained in single and rounded at the end.
    dtype = model_dtype(case.model)
    half = dtype in (torch.float16, torch.bfloat16)
    model, head = _copy(case)
    model = model.float() if half else model
    checkpoint = checkpoint_of(case, settings)
    history = finetune(
        model,
        head,
        case.inputs,
        case.labels,
        case.shifts,
        case.targets,
        copy.deepcopy(case.adversary),  # it moves on
        settings,
        quantile=case.quantile,
        progress=case.progress,
        checkpoint=checkpoint,
    )
    model = model.to(dtype) if half else model
    return Candidate(model, head, history=history)


_METHODS: dict[Method, Callable[[RepairCase, RepairSettings], Candidate]] = {
    "patch": _by_patch,
    "prune": _by_pruning,
    "finetune": _by_finetuning,
}


def _check_still_finite(before: nn.Module, after: nn.Module, method: Method) -> None:
    """The last steps, whose loss nothing has looked at, the statistics of batch norm, and limits."""
    old, new = before.state_dict(), after.state_dict()
    for name, value in new.items():
        if not isinstance(value, Tensor) or bool(torch.isfinite(value).all()):
            continue
        if name not in old or bool(torch.isfinite(old[name]).all()):  # a mask may be infinite
            got = f"NaN or infinity in {name}"
            if method == "finetune":
                raise diverged(got)
            raise InputError.of(
                "repair",
                "method",
                expected="a model and samples from which finite weights follow",
                got=got,
                way_out="pass more samples, or repair with method='finetune'",
            )


def count_right(model: nn.Module, inputs: Tensor, labels: Tensor, batch_size: int) -> int:
    """How many of the samples a model classifies right.

    Raises:
        NotFiniteError: logits of NaN or infinity.
    """
    correct = 0
    with evaluating(model), torch.no_grad():
        for x, y in zip(inputs.split(batch_size), labels.split(batch_size), strict=True):
            correct += int((run(model, x, "repair").argmax(1).cpu() == y).sum())
    return correct


def count_right_after(candidate: Candidate, samples: tuple[Tensor, Tensor], batch_size: int) -> int:
    """The same of a repaired model, whose logits may not be finite any more.

    Raises:
        InputError: they are not.
    """
    try:
        return count_right(candidate.model, *samples, batch_size)
    except NotFiniteError:
        raise diverged("logits of NaN or infinity") from None


def settings_for(method: Method, given: RepairSettings | None) -> dict[Method, RepairSettings]:
    """The settings of every method that is to be tried, in order of cost.

    Args:
        method: as asked for.
        given: settings of one method. With "auto" the others take what they share from them.

    Raises:
        InputError: settings of another method, or no settings at all.
    """
    if given is not None and not isinstance(given, RepairSettings):
        raise InputError.of(
            "repair",
            "settings",
            expected="the settings of a method, or None",
            got=type(given).__name__,
            way_out="pass tacext.FinetuneSettings(...), PatchSettings(...) or PruneSettings(...)",
        )
    tried = tuple(SETTINGS_OF) if method == "auto" else (method,)
    if given is not None and type(given) not in [SETTINGS_OF[m] for m in tried]:
        raise InputError.of(
            "repair",
            "settings",
            expected=f"{SETTINGS_OF[tried[0]].__name__} for method={method!r}",
            got=type(given).__name__,
            way_out="pass the settings of that method, or another method",
        )
    found: dict[Method, RepairSettings] = {}
    for name in tried:
        kind = SETTINGS_OF[name]
        if given is None:
            found[name] = kind()
        elif type(given) is kind:
            found[name] = given
        else:
            found[name] = kind(batch_size=given.batch_size, holdout=given.holdout, seed=given.seed)
    return found
