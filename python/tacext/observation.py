"""One pass over clean data: everything that the QPs of a head need, and nothing of size N."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from . import ops
from .data import DataLike, as_batches, sample_count
from .errors import InputError, NotFiniteError
from .heads import (
    Head,
    check_labels_in_range,
    check_predictions,
    evaluating,
    find_head,
    is_out_of_memory,
    recording_latents,
    run_model,
)
from .latent_patch import patch_in_front
from .latents import LatentMoments
from .margins import MarginMax, MarginQuantile
from .memory_layout import fastest_layout, placed
from .ops import MinimalPerturbation, SolverSettings, Status
from .progress import progress_bar
from .sample_keeper import LookKeeper, SampleKeeper

Metric = Literal["standardized", "l2"]


@dataclass(frozen=True)
class Observation:
    """What one pass over the data leaves: everything the QPs need, nothing of size N.

    Attributes:
        head: the last layer.
        margins: M, [C, C].
        moments: of the latents.
        samples, correct: how many there were, and how many the model got right.
        confidence: the mean probability that the model gives to its own answers.
        classes_seen: how many classes the labels have; unseen: those that they lack.
        forward_seconds, margin_seconds: in the model and beside it.
    """

    head: Head
    margins: Tensor
    moments: LatentMoments
    samples: int
    correct: int
    confidence: float
    classes_seen: int
    unseen: tuple[int, ...]
    forward_seconds: float
    margin_seconds: float


def observe(
    model: nn.Module,
    data: DataLike,
    *,
    head: str | None,
    batch_size: int,
    progress: bool | None,
    operation: str,
    quantile: float = 1.0,
    keeper: LookKeeper | SampleKeeper | None = None,
    latent_keeper: SampleKeeper | None = None,
    before_patch: bool = False,
) -> Observation:
    """Streams the data through the model once; see `scan` for the arguments and errors.

    `keeper` gets the samples to choose some from, `latent_keeper` their latents, each with the head's
    logits behind it: [N, D + C], float32. With `before_patch` latents are as they come to a latent patch
    in front of the head, which could make anything of them, and logits as they would be without it.
    """
    found: Head | None = None
    entry: Head | nn.Module | None = None
    layout = torch.contiguous_format
    moments = LatentMoments.empty(0)
    # With the number of samples known, a quantile can do without all logits.
    count = sample_count(data)
    margins = MarginMax() if quantile == 1 else MarginQuantile(quantile, count or None)
    seen = torch.zeros(0, dtype=torch.bool)
    samples = correct = 0
    confidence = 0.0
    forward_seconds = margin_seconds = 0.0
    with progress_bar("clean data", count, progress) as advance:
        for inputs, given_labels in as_batches(data, operation=operation, batch_size=batch_size):
            labels = given_labels.cpu()
            if found is None:
                first = placed(inputs[:8], layout)
                found = find_head(model, first, head, operation=operation)
                patch = patch_in_front(model, found) if before_patch else None
                entry = found if patch is None else patch
                layout = fastest_layout(model, inputs, operation)
                moments = LatentMoments.empty(found.latent_dim)
                seen = torch.zeros(found.num_classes, dtype=torch.bool)
            assert entry is not None
            check_labels_in_range(labels, found.num_classes, operation)
            started = time.perf_counter()
            with (
                evaluating(model),
                torch.no_grad(),
                recording_latents(found) as recorder,
                recording_latents(entry) as entering,
            ):
                output = run_model(model, placed(inputs, layout), operation)
                latent = recorder.take()
                logits = found.logits(latent)
                check_predictions(logits, output, operation)
                if entry is not found:
                    latent = entering.take()
                    logits = found.logits(latent)
            now = time.perf_counter()
            forward_seconds += now - started
            _update(margins, logits, operation)
            moments.update(latent)
            margin_seconds += time.perf_counter() - now
            if keeper is not None:
                keeper.add(inputs, labels)
            if latent_keeper is not None:
                latent_keeper.add(torch.cat([latent, logits], 1).float(), labels)
            seen[labels] = True
            confidence += float(_probabilities(output).amax(1).sum())
            correct += int((output.argmax(1).cpu() == labels).sum())
            samples += len(labels)
            advance(len(labels))
    assert found is not None  # as_batches raises where there is no sample
    started = time.perf_counter()
    result = margins.result()
    if not bool(torch.isfinite(result).all()):
        raise NotFiniteError.of(
            operation,
            "model",
            expected=f"logits whose differences {str(result.dtype).removeprefix('torch.')} holds",
            got="larger ones",
            way_out="divide the weight and the bias of its head by one number, which changes no prediction",
        )
    margin_seconds += time.perf_counter() - started
    return Observation(
        found,
        result,
        moments,
        samples,
        correct,
        confidence / samples,
        int(seen.sum()),
        tuple((~seen).nonzero()[:, 0].tolist()),
        forward_seconds,
        margin_seconds,
    )


def _update(margins: MarginMax | MarginQuantile, logits: Tensor, operation: str) -> None:
    try:
        margins.update(logits)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        classes = logits.shape[1]
        raise InputError.of(
            operation,
            "model",
            expected="a head whose margins fit into memory",
            got=f"{classes} classes, which take {8 * classes**2 / 2**30:.1f} GiB",
            way_out="use a machine with more memory",
        ) from error


def _probabilities(output: Tensor) -> Tensor:
    """float32 [N, C] of a model that returns logits, their log-softmax or softmax."""
    output = output.float()
    total = output.sum(1)
    are_already = bool((output >= 0).all()) and bool((total - 1).abs().max() < 1e-2)
    return output if are_already else output.softmax(1)


def solve(
    observation: Observation,
    metric: Metric,
    settings: SolverSettings = ops.DEFAULT_SETTINGS,
    *,
    operation: str,
) -> tuple[MinimalPerturbation, Tensor | None]:
    """s_k for every class of an observed head, and the scale of the metric."""
    scale = None
    if metric == "standardized":
        scale = observation.moments.standardized_scale(operation)
    margins = observation.margins
    weight = observation.head.weight.detach()
    if not bool(torch.isfinite(weight).all()):
        raise InputError.of(
            operation,
            "model",
            expected="a head with finite weights",
            got="NaN or infinity",
            way_out="the weights are damaged; get them again",
        )
    perturbations = ops.minimal_perturbation(
        weight,
        margins,
        scale=None if scale is None else scale.to(weight.device),
        settings=settings,
    )
    return perturbations, scale


def solve_balanced(
    observation: Observation, settings: SolverSettings = ops.DEFAULT_SETTINGS
) -> MinimalPerturbation | None:
    """s_k in the metric that no rescaling of latents changes (`LatentMoments.balanced`); None where they do not vary."""
    found = observation.moments.balanced(observation.head.weight)
    if found is None:
        return None
    device = observation.margins.device
    weight, scale = (part.to(device) for part in found)
    return ops.minimal_perturbation(weight, observation.margins, scale=scale, settings=settings)


def proven_norms(perturbations: MinimalPerturbation) -> npt.NDArray[np.float64]:
    """r_k, [C]: infinite where unreachable, NaN where there is no certificate.

    A class that the solver left on its way up from 0 would seem too easily reached.
    """
    unproven = perturbations.status == Status.ITERATION_LIMIT
    norm: npt.NDArray[np.float64] = (
        torch.where(unproven, torch.nan, perturbations.norm).cpu().numpy()
    )
    return norm
