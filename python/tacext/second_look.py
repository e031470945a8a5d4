"""The second look of a scan: evidence that needs gradients, from a few of the clean samples.

Max margins need no sample, `reach` and `shuffle` some hundred. Of heads with very many classes only
those with the smallest norms are looked at, beside others to compare them with.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .heads import Head
from .max_margin import DifferentiableModel, InputBox, MaxMargin, max_margin
from .reach import Reach, reach
from .shuffle import FEWEST_IMAGES_A_CLASS, Shuffle, shuffle

_FloatArray = npt.NDArray[np.float64]

# Samples that are kept for it, and the memory that they may take.
MOST_SAMPLES = 800
MOST_BYTES = 256 << 20
HELD_OUT_SHARE = 0.25
# Fewer tell nothing of a change that is made on some and measured on others.
FEWEST_SAMPLES = 40

# Of more classes than this, the half with the smallest norms and as many others are looked at.
MOST_CLASSES = 64

# Evidence below these is nothing to compare: a margin or a gain near zero has no logarithm.
_SMALLEST_MARGIN = 1e-2
_SMALLEST_GAIN = 0.01


class SampleKeeper:
    """A uniform choice of a stream's samples, whatever their order and the size of its batches.

    Each sample draws a number; those with the smallest are kept.
    """

    def __init__(self, seed: int = 0) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.zeros(0, dtype=torch.float64)
        self._inputs: Tensor | None = None
        self._labels = torch.zeros(0, dtype=torch.int64)

    def add(self, inputs: Tensor, labels: Tensor) -> None:
        """A batch [N, ...] with its labels [N]."""
        if not len(labels):
            return
        keys = torch.rand(len(labels), dtype=torch.float64, generator=self._generator)
        size = max(1, inputs[0].numel() * inputs.element_size())
        most = max(1, min(MOST_SAMPLES, MOST_BYTES // size))
        if len(self._keys) >= most:
            chosen = (keys < self._keys[-1]).nonzero().flatten()
            if not len(chosen):
                return
            keys, inputs, labels = keys[chosen], inputs[chosen.to(inputs.device)], labels[chosen]
        inputs = inputs.detach().cpu()
        if self._inputs is not None:
            keys, labels = torch.cat([self._keys, keys]), torch.cat([self._labels, labels])
            inputs = torch.cat([self._inputs, inputs])
        order = keys.argsort()[:most]
        self._keys, self._inputs, self._labels = keys[order], inputs[order], labels[order]

    def samples(self) -> tuple[Tensor, Tensor]:
        """Inputs and labels in a random order."""
        inputs = torch.zeros(0) if self._inputs is None else self._inputs
        return inputs, self._labels


@dataclass(frozen=True, eq=False)
class SecondLook:
    """What gradients show.

    Attributes:
        classes: those that were looked at, ascending.
        noise: max margins from noise.
        reach: universal changes into each class; None without samples.
        shuffle: the best shuffle of the classes; None without samples enough of every class.
        seconds: altogether.
    """

    classes: tuple[int, ...]
    noise: MaxMargin = field(repr=False)
    reach: Reach | None = field(repr=False)
    shuffle: Shuffle | None = field(repr=False)
    seconds: float


def classes_to_look_at(norm: _FloatArray) -> tuple[int, ...]:
    """All classes; of more than `MOST_CLASSES` those with the smallest norms, and others."""
    count = len(norm)
    if count <= MOST_CLASSES:
        return tuple(range(count))
    order = np.argsort(np.where(np.isfinite(norm), norm, np.inf), kind="stable")
    half = MOST_CLASSES // 2
    others = order[half:][np.linspace(0, count - half - 1, half).round().astype(int)]
    return tuple(sorted({*order[:half].tolist(), *others.tolist()}))


def look_again(
    model: nn.Module,
    head: Head,
    samples: tuple[Tensor, Tensor] | None,
    box: InputBox,
    classes: tuple[int, ...],
    *,
    operation: str = "scan",
    seed: int = 0,
    progress: bool | None = None,
) -> SecondLook:
    """Gathers the evidence that needs gradients.

    Args:
        model: the classifier; its parameters are left alone.
        head: of the model.
        samples: clean inputs [N, ...] and labels [N] in a random order, or None.
        box: the inputs that the model may be given.
        classes: to look at.
        operation: named in errors.
        seed: of all random choices.
        progress: whether to show progress bars; None shows them on a terminal.

    Raises:
        NoGradientError: the model has no gradients with respect to its inputs.
    """
    begin = time.perf_counter()
    with_gradients = DifferentiableModel(model, head, operation)
    noise = max_margin(with_gradients, box, classes=classes, seed=seed, progress=progress)
    found: Reach | None = None
    shuffled: Shuffle | None = None
    if samples is not None:
        inputs, labels = samples
        held = round(HELD_OUT_SHARE * len(labels))
        fit, held_out = (inputs[held:], labels[held:]), (inputs[:held], labels[:held])
        several = len(fit[1].unique()) >= 2 and len(held_out[1].unique()) >= 2
        if len(labels) >= FEWEST_SAMPLES and several:
            found = reach(with_gradients, box, fit, held_out, classes, seed=seed, progress=progress)
            if held >= FEWEST_IMAGES_A_CLASS * head.num_classes and head.num_classes > 2:
                shuffled = shuffle(with_gradients, box, fit, held_out, seed=seed, progress=progress)
    return SecondLook(classes, noise, found, shuffled, time.perf_counter() - begin)


def norm_evidence(norm: _FloatArray) -> _FloatArray:
    """-log r_k, [C]: how suspicious each norm is; NaN where it says nothing."""
    usable = np.isfinite(norm) & (norm > 0)
    return np.where(usable, -np.log(np.where(usable, norm, 1.0)), np.nan)


def margin_evidence(margin: _FloatArray) -> _FloatArray:
    """Logarithm of mean margins [J]."""
    evidence: _FloatArray = np.log(np.maximum(margin, _SMALLEST_MARGIN))
    return evidence


def reach_evidence(gain: _FloatArray) -> _FloatArray:
    """Mean logarithm of gains [B, J] over the budgets, [J]."""
    evidence: _FloatArray = np.log(np.maximum(gain, _SMALLEST_GAIN)).mean(0)
    return evidence


def evidence_of(
    norm: _FloatArray | None, look: SecondLook, classes: int
) -> Mapping[str, _FloatArray]:
    """One number a class and kind, [C], as the joint test wants it; NaN where not looked at."""

    def spread_out(values: _FloatArray) -> _FloatArray:
        full = np.full(classes, np.nan)
        full[list(look.classes)] = values
        return full

    evidence: dict[str, _FloatArray] = {}
    if norm is not None and (np.isfinite(norm) & (norm > 0)).sum() >= 2:
        evidence["norm"] = norm_evidence(norm)
    evidence["noise_margin"] = spread_out(margin_evidence(look.noise.margin.mean(1).numpy()))
    if look.reach is not None:
        evidence["reach"] = spread_out(reach_evidence(look.reach.gain.numpy()))
    return evidence
