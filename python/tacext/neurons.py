"""TAC-weighted scores of every convolution and linear layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import ops
from .data import DataLike, as_batches, sample_count
from .errors import InputError
from .heads import Head, check_model, evaluating, find_head, recording_latents, run_model
from .progress import progress_bar
from .tensor_checks import check_tensor

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class NeuronScores(Mapping[str, Tensor]):
    """Scores by layer name, in order of execution; each float64 [channels].

    The score of a channel is its first-order share of <s, phi(x)>, averaged over the samples: what
    zeroing the channel takes away from the latent's component along the perturbation s.
    """

    by_layer: Mapping[str, Tensor]
    samples: int

    def __getitem__(self, name: str) -> Tensor:
        return self.by_layer[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_layer)

    def __len__(self) -> int:
        return len(self.by_layer)

    def ranking(self) -> list[tuple[str, int, float]]:
        """(layer, channel, score) over all layers, the strongest push along s first."""
        rows = [
            (name, channel, float(score))
            for name, scores in self.by_layer.items()
            for channel, score in enumerate(scores)
        ]
        return sorted(rows, key=lambda row: -row[2])


def score_neurons(
    model: nn.Module,
    data: DataLike,
    perturbation: Tensor,
    *,
    head: str | None = None,
    batch_size: int = 256,
    progress: bool | None = None,
) -> NeuronScores:
    """Scores every channel of every conv and linear layer by its push along a perturbation.

    Args:
        model: the classifier, as for `scan`; used in evaluation mode and left as it was.
        data: samples with labels, as for `scan`; the labels are not used.
        perturbation: s, [D], for instance `report.perturbation[t]`; finite.
        head: the name of the last linear layer, where the model is too unusual to tell.
        batch_size: samples in a pass, where the data is not already in batches.
        progress: whether to show a progress bar; None shows it on a terminal.

    Returns:
        NeuronScores for every nn.Linear and nn.Conv1d/2d/3d but the head; empty where there is none.

    Raises:
        InputError: a perturbation of the wrong length or not finite, and what `scan` raises.
    """
    check_model(model, "score_neurons")
    check_tensor("score_neurons", "perturbation", perturbation)
    totals: dict[str, Tensor] = {}
    samples = 0
    found: Head | None = None
    with progress_bar("scoring neurons", sample_count(data), progress) as advance:
        for inputs, _ in as_batches(data, operation="score_neurons", batch_size=batch_size):
            if found is None:
                found = find_head(model, inputs[:8], head, operation="score_neurons")
                _check_perturbation(perturbation, found.latent_dim)
            for name, scores in _score_batch(model, found, inputs, perturbation).items():
                totals[name] = totals.get(name, torch.zeros_like(scores)) + scores * len(inputs)
            samples += len(inputs)
            advance(len(inputs))
    return NeuronScores({name: total / samples for name, total in totals.items()}, samples)


def _check_perturbation(perturbation: Tensor, latent_dim: int) -> None:
    if perturbation.shape != (latent_dim,):
        raise InputError.of(
            "score_neurons",
            "perturbation",
            expected=f"shape [{latent_dim}], one value a latent",
            got=f"{list(perturbation.shape)}",
            way_out="pass one row of report.perturbation",
        )
    if not bool(torch.isfinite(perturbation).all()):
        raise InputError.of(
            "score_neurons",
            "perturbation",
            expected="finite values",
            got="NaN or infinity (an unreachable class has no perturbation)",
            way_out="pass the row of a class that can be reached",
        )


def _score_batch(
    model: nn.Module, head: Head, inputs: Tensor, perturbation: Tensor
) -> dict[str, Tensor]:
    outputs: list[tuple[str, Tensor]] = []

    def keep(name: str, output: Tensor) -> Tensor:
        if not output.requires_grad:
            return output
        outputs.append((name, output))
        return output.clone()  # what an in-place layer may now overwrite is the copy

    handles = []
    for name, module in model.named_modules():
        if isinstance(module, LAYERS) and module is not head.module:
            handles.append(
                module.register_forward_hook(
                    lambda _module, _inputs, output, name=name: keep(name, output)
                )
            )
    try:
        with evaluating(model), torch.enable_grad(), recording_latents(head) as recorder:
            # Gradients must flow even where every parameter is frozen.
            run_model(
                model, inputs.clone().requires_grad_(inputs.is_floating_point()), "score_neurons"
            )
            latent = recorder.take()
    finally:
        for handle in handles:
            handle.remove()
    push = (latent * perturbation.to(latent)).sum()  # sum_i <s, phi(x_i)>
    if not outputs or not push.requires_grad:
        return {}
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(
        push, [output for _, output in outputs], allow_unused=True
    )
    scores: dict[str, Tensor] = {}
    for (name, output), gradient in zip(outputs, gradients, strict=True):
        if gradient is None:
            continue
        layer = model.get_submodule(name)
        score = ops.neuron_scores(channels_second(layer, output), channels_second(layer, gradient))
        # A layer that runs several times pushes with each of its calls.
        scores[name] = scores[name] + score if name in scores else score
    return scores


def channels_second(layer: nn.Module, values: Tensor) -> Tensor:
    """[N, channels, positions...]: a linear layer on tokens [N, T, D] has its channels last."""
    if isinstance(layer, nn.Linear) and values.dim() > 2:
        return values.movedim(-1, 1)
    return values
