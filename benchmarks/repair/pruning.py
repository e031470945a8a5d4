"""Removals that silence neurons and train no weight: ANP and CLP."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from clean_images import CleanImages, accuracy
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from tacext.heads import find_head

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def _neurons(model: nn.Module, head: str) -> dict[str, nn.Module]:
    """Layers whose weights scale neurons: batch norms, else layer norms, else all but the head."""
    modules = dict(model.named_modules())
    for kinds in (_NORMS, (nn.LayerNorm,), (nn.Conv2d, nn.Linear)):
        found: dict[str, nn.Module] = {
            n: m for n, m in modules.items() if isinstance(m, kinds) and n != head
        }
        if found:
            return found
    return {}


def _column(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (like.dim() - 1))


@dataclass(frozen=True, eq=False)
class _Perturbed:
    """The model with factors on the weights and the biases of its neurons."""

    model: nn.Module
    weights: dict[str, Tensor]
    biases: dict[str, Tensor]

    def loss(
        self,
        batch: tuple[Tensor, Tensor],
        of_weights: dict[str, Tensor],
        of_biases: dict[str, Tensor],
    ) -> Tensor:
        """Cross-entropy on (images, labels)."""
        changed = {
            f"{n}.weight": w * _column(of_weights[n], w) for n, w in self.weights.items()
        } | {f"{n}.bias": b * of_biases[n] for n, b in self.biases.items()}
        images, labels = batch
        return functional.cross_entropy(functional_call(self.model, changed, (images,)), labels)


def _endless(clean: CleanImages, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    epoch = 0
    while True:
        yield from clean.batches(epoch, size)
        epoch += 1


def _noise(
    group: dict[str, Tensor], epsilon: float, generator: torch.Generator
) -> dict[str, Tensor]:
    return {
        n: ((2 * torch.rand(len(v), generator=generator) - 1) * epsilon).requires_grad_()
        for n, v in group.items()
    }


def neuron_masks(
    model: nn.Module,
    neurons: dict[str, nn.Module],
    clean: CleanImages,
    epsilon: float = 0.4,
    alpha: float = 0.2,
) -> dict[str, Tensor]:
    """Of each neuron how much of it is kept, in [0, 1], where its weights are disturbed.

    2,000 steps of SGD at .2 with momentum .9, batches of 128, on alpha CE + (1 - alpha) max CE, the
    maximum by one step of size epsilon from a random place (equations 3 and 4 of the paper). As in
    the authors' code batch norm normalises by the batch meanwhile.
    """
    probe = copy.deepcopy(model).train().requires_grad_(False)
    state = _Perturbed(
        probe,
        {n: m.weight.detach() for n, m in neurons.items() if isinstance(m.weight, Tensor)},
        {n: m.bias.detach() for n, m in neurons.items() if isinstance(m.bias, Tensor)},
    )
    mask = {n: torch.ones(len(w), requires_grad=True) for n, w in state.weights.items()}
    whole = {n: torch.ones(len(b)) for n, b in state.biases.items()}
    optimizer = torch.optim.SGD(mask.values(), 0.2, momentum=0.9)
    generator = torch.Generator().manual_seed(clean.seed)
    for _, batch in zip(range(clean.rounds(2000)), _endless(clean, 128), strict=False):
        noise = _noise(state.weights, epsilon, generator)
        shift = _noise(state.biases, epsilon, generator)
        moved = [*noise.values(), *shift.values()]
        rising = state.loss(
            batch,
            {n: mask[n].detach() + v for n, v in noise.items()},
            {n: 1 + v for n, v in shift.items()},
        )
        with torch.no_grad():
            for v, g in zip(moved, torch.autograd.grad(rising, moved), strict=True):
                v.add_(epsilon * g.sign()).clamp_(-epsilon, epsilon)
        disturbed = state.loss(
            batch,
            {n: mask[n] + v.detach() for n, v in noise.items()},
            {n: 1 + v.detach() for n, v in shift.items()},
        )
        optimizer.zero_grad()
        (alpha * state.loss(batch, mask, whole) + (1 - alpha) * disturbed).backward()
        optimizer.step()
        with torch.no_grad():
            for values in mask.values():
                values.clamp_(0, 1)
    return {n: values.detach() for n, values in mask.items()}


def without_neurons(model: nn.Module, gone: dict[str, Tensor]) -> nn.Module:
    """A copy with weights of 0 where `gone` holds; as in the authors' code biases stay."""
    pruned = copy.deepcopy(model).eval()
    with torch.no_grad():
        for name, out in gone.items():
            layer = pruned.get_submodule(name)
            assert isinstance(layer.weight, Tensor)
            layer.weight[out] = 0
    return pruned


def anp(model: nn.Module, clean: CleanImages, most_lost: float = 0.05) -> nn.Module:
    """Adversarial neuron pruning (Wu and Wang, NeurIPS 2021).

    The neurons with the smallest masks go, as many as cost no more than `most_lost` of the accuracy
    on a fifth of the images, which the masks have not seen; a fiftieth of all neurons at a time.
    """
    head = find_head(model, clean.images[:4]).name
    training, held_out = clean.split()
    masks = neuron_masks(model, _neurons(model, head), training)
    best, enough = copy.deepcopy(model).eval(), accuracy(model, held_out) - most_lost
    ordered = torch.cat(list(masks.values())).sort().values
    for count in range(1, 51):
        threshold = ordered[round(count / 50 * len(ordered)) - 1]
        if threshold >= 1:
            break
        pruned = without_neurons(model, {n: values <= threshold for n, values in masks.items()})
        if accuracy(pruned, held_out) < enough:
            break
        best = pruned
    return best


def clp(model: nn.Module, clean: CleanImages, deviations: float = 3.0) -> nn.Module:
    """Channel Lipschitz pruning (Zheng et al., ECCV 2022): no data, no training.

    A channel goes whose bound, the largest singular value of its kernel times the gain of the batch
    norm behind it, is more than `deviations` standard deviations above the mean of its layer.
    """
    del clean
    pruned = copy.deepcopy(model).eval()
    with torch.no_grad():
        for convolution, norm in _convolutions(pruned):
            bound = torch.linalg.svdvals(convolution.weight.flatten(2))[:, 0]
            last: nn.Conv2d | nn.BatchNorm2d = convolution if norm is None else norm
            if norm is not None and norm.running_var is not None:
                bound = bound * (norm.weight / (norm.running_var + norm.eps).sqrt()).abs()
            out = bound > bound.mean() + deviations * bound.std()
            last.weight[out] = 0
            if last.bias is not None:
                last.bias[out] = 0
    return pruned


def _convolutions(model: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d | None]]:
    """Every convolution with the batch norm that comes next, if there is one of its width."""
    found: list[tuple[nn.Conv2d, nn.BatchNorm2d | None]] = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            found.append((module, None))
        elif isinstance(module, nn.BatchNorm2d) and found:
            convolution, norm = found[-1]
            if norm is None and convolution.out_channels == module.num_features:
                found[-1] = convolution, module
    return found
