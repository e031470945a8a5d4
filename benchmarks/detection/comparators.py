"""Two detectors to compare with, compact but with the settings that their authors published.

Neural Cleanse (Wang et al., S&P 2019) looks for the smallest patch that sends images to each class,
MM-BD (Wang et al., S&P 2024, arXiv 2205.06900) for the largest margin that any input gives it. Both
run on the same `DifferentiableModel` as tacext, in the same precision and memory layout, so that the
times compare the methods and not how they were written. That is their one deviation: on
GPUs and on processors with AMX they run in bfloat16, which moves MM-BD's margins by some per cent.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import stats
from torch import Tensor
from torch.nn import functional

from tacext.detection import anomaly_index
from tacext.differentiable import DifferentiableModel, InputBox, class_margin

_FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Comparison:
    """What another detector says of one model.

    Attributes:
        statistic: [C], of every class: a mask's size or a margin.
        flagged: whether it calls the model backdoored.
        first: the class that it suspects most.
        score: larger where the model is more suspicious.
        seconds: altogether.
        unfinished: classes whose search was cut off or found nothing.
    """

    statistic: _FloatArray
    flagged: bool
    first: int
    score: float
    seconds: float
    unfinished: tuple[int, ...] = ()


class _Cost:
    """The weight of the mask's size, which rises while the patch works and falls while it does not."""

    INITIAL, UP, DOWN = 1e-3, 2.0, 2.0**1.5
    PATIENCE = 5

    def __init__(self) -> None:
        self.value = 0.0
        self.rose = self.fell = False
        self._runs = {"works at no cost": 0, "works": 0, "fails": 0}

    def _run(self, name: str, goes_on: bool) -> bool:
        self._runs[name] = self._runs[name] + 1 if goes_on else 0
        if self._runs[name] < self.PATIENCE:
            return False
        self._runs[name] = 0
        return True

    def update(self, works: bool) -> None:
        if self._run("works at no cost", self.value == 0 and works):
            self.value = self.INITIAL
            self._runs["works"] = self._runs["fails"] = 0
            self.rose = self.fell = False
        up, down = self._run("works", works), self._run("fails", not works)
        if up:
            self.value *= self.UP
            self.rose = True
        elif down:
            self.value /= self.DOWN
            self.fell = True


def _smallest_mask(
    model: DifferentiableModel, images: Tensor, k: int, steps: int, seed: int
) -> tuple[float, bool]:
    """The l1 norm of the smallest mask that works on 99 % of the images, and whether it was the end.

    Of the last mask where none ever worked.
    """
    generator = torch.Generator().manual_seed(1000 * seed + k)
    shape = images.shape[1:]

    def start(*size: int) -> Tensor:
        uniform = torch.rand(*size, generator=generator)
        return torch.atanh((uniform - 0.5) * (2 - 1e-7)).to(model.device).requires_grad_(True)

    pattern, mask = start(*shape), start(1, *shape[1:])
    optimizer = torch.optim.Adam([pattern, mask], 0.1, betas=(0.5, 0.9))
    cost, best, stale = _Cost(), np.inf, 0
    sizes: list[float] = []
    batches: list[Tensor] = []
    for _ in range(steps):
        hits = seen = 0
        sizes = []
        for _ in range(1000 // 32):
            if not batches:
                order = torch.randperm(len(images), generator=generator)
                batches = list(images[order].split(32))
            batch = model.place(batches.pop())
            share = torch.tanh(mask) / (2 - 1e-7) + 0.5
            patched = (1 - share) * batch + share * (torch.tanh(pattern) / (2 - 1e-7) + 0.5)
            logits = model.logits(patched)
            goal = torch.full((len(batch),), k, device=model.device)
            loss = functional.cross_entropy(logits, goal) + cost.value * share.sum()
            pattern.grad, mask.grad = torch.autograd.grad(loss, [pattern, mask])
            optimizer.step()
            hits += int((logits.argmax(1) == k).sum())
            seen += len(batch)
            sizes.append(float(share.sum().detach()))
        works = hits >= 0.99 * seen
        before = best
        if works:
            best = min(best, float(np.mean(sizes)))
        if best < np.inf:
            stale = 0 if best < before else stale + 1
        if cost.rose and cost.fell and stale >= 5 * _Cost.PATIENCE:
            return best, True
        cost.update(works)
    return (best if best < np.inf else sizes[-1]), False


def neural_cleanse(
    model: DifferentiableModel, images: Tensor, num_classes: int, steps: int = 1000, seed: int = 0
) -> Comparison:
    """Reverse-engineers a patch for each class; flagged where a mask's anomaly index exceeds 2.

    Args:
        model: the classifier, of inputs in [0, 1].
        images: clean ones, float [N, C, H, W] in [0, 1].
        num_classes: how many classes to look at.
        steps: of 31 batches of 32 images, at most; ends before where nothing is gained any more.
        seed: of starts and order.
    """
    begin = time.perf_counter()
    with model.open():
        found = [_smallest_mask(model, images, k, steps, seed) for k in range(num_classes)]
    norm = np.array([size for size, _ in found])
    index = anomaly_index(norm)
    first = int(np.nanargmin(norm))
    cut_off = tuple(k for k, (_, ended) in enumerate(found) if not ended)
    return Comparison(
        norm,
        bool(index[first] > 2),
        first,
        float(index[first]),
        time.perf_counter() - begin,
        cut_off,
    )


def _largest_margin(
    model: DifferentiableModel, box: InputBox, k: int, generator: torch.Generator
) -> float:
    """Of 30 inputs that start as noise and climb 300 steps, or until the loss stands still."""
    images = torch.rand(30, *box.shape, generator=generator).to(model.device)
    goal = torch.full((30,), k, device=model.device)
    last = 1000.0
    margin = torch.full((30,), -torch.inf)
    for _ in range(300):
        images.requires_grad_(True)
        margin = class_margin(model.logits(box.clamp(model.place(images))), goal)
        loss = -margin.sum()
        (gradient,) = torch.autograd.grad(loss, images)
        # The published code makes a new optimiser in every step, so that its momentum never acts.
        images = (images - 1e-2 * gradient).detach()
        now = float(loss.detach())
        if abs(last - now) / abs(last) < 1e-5:
            break
        last = now
    return float(margin.detach().max())


def mm_bd(
    model: DifferentiableModel, shape: tuple[int, ...], num_classes: int, seed: int = 0
) -> Comparison:
    """Drives every class's margin from noise; flagged where the largest is beyond a gamma null.

    Args:
        model: the classifier, of inputs in [0, 1].
        shape: of one input.
        num_classes: how many classes to look at.
        seed: of the noise.
    """
    begin = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)
    box = InputBox.unit(shape)
    with model.open():
        margin = np.array([_largest_margin(model, box, k, generator) for k in range(num_classes)])
    first = int(margin.argmax())
    others = np.delete(margin, first)
    p_value = 1 - stats.gamma.cdf(margin[first], *stats.gamma.fit(others)) ** num_classes
    score = -float(np.log(max(p_value, 1e-300)))
    return Comparison(margin, bool(p_value < 0.05), first, score, time.perf_counter() - begin)
