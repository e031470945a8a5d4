"""The problems that every solver of the benchmarks gets, by family, size and seed, or from files.

A case reads "CLASSES x LATENTS FAMILY", or "head NAME" for NAME.safetensors of the folder that
`run.py --heads` names.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tacext import ops

HEADS_VARIABLE = "TACEXT_BENCHMARK_HEADS"  # an environment variable, so that children see it, too
_SAMPLES = 2000
_COLLAPSE_NOISE = 0.2  # of a class's weight and mean, where the distance of two weights is 4.2
_HEAD = "head "


@dataclass(frozen=True, eq=False)
class Samples:
    """Latents [N, D] with their labels [N], and the head's bias [C]."""

    latents: Tensor
    labels: Tensor
    bias: Tensor


@dataclass(frozen=True, eq=False)
class Problem:
    """A head's weight [C, D] and logits [N, C] of some samples."""

    weight: Tensor
    logits: Tensor
    samples: Samples | None = None

    def margins(self) -> Tensor:
        """M [C, C], right-hand sides of all C problems."""
        return ops.pairwise_margin_max(self.logits)


class _Random:
    """Numbers of a seed, in float64."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *size: int) -> Tensor:
        return torch.randn(*size, generator=self.generator, dtype=torch.float64)

    def labels(self, classes: int, samples: int) -> Tensor:
        return torch.randint(classes, (samples,), generator=self.generator)


def _noisy_samples(r: _Random, weight: Tensor, samples: int) -> Problem:
    """Rectified latents around their class's weight, and a bias."""
    classes, latents = weight.shape
    labels = r.labels(classes, samples)
    latent = (8 * weight[labels] + 0.3 * r.normal(samples, latents)).relu()
    bias = 0.1 * r.normal(classes)
    return Problem(weight, latent @ weight.t() + bias, Samples(latent, labels, bias))


def random(classes: int, latents: int, samples: int = _SAMPLES, seed: int = 0) -> Problem:
    """A head as training leaves it, near a simplex, and logits of samples near their class."""
    r = _Random(seed)
    weight = r.normal(classes, latents) / latents**0.5
    return _noisy_samples(r, weight - weight.mean(0), samples)


def low_rank(classes: int, latents: int, samples: int = _SAMPLES, seed: int = 0) -> Problem:
    """As `random`, but the weight's rank is a quarter of the smaller side."""
    r = _Random(seed)
    rank = max(2, min(classes, latents) // 4)
    weight = r.normal(classes, rank) @ r.normal(rank, latents) / (rank * latents) ** 0.5
    return _noisy_samples(r, weight - weight.mean(0), samples)


def collapsed(classes: int, latents: int, samples: int = _SAMPLES, seed: int = 0) -> Problem:
    """Neural collapse: the weight is a simplex up to noise, samples sit at their class's mean.

    All margins are nearly equal then, so most constraints are active: four fifths of 100 classes,
    half of 1000. Every class has two samples or more, as the margins need one of each.
    """
    r = _Random(seed)
    samples = max(samples, 2 * classes)
    if latents < classes:
        raise ValueError(f"collapsed: expected latents >= {classes}, the classes, got {latents}")
    basis = torch.linalg.qr(r.normal(latents, classes))[0].t()
    simplex = 3 * (basis - basis.mean(0))
    weight = simplex + _COLLAPSE_NOISE * r.normal(classes, latents) / latents**0.5
    labels = torch.arange(samples) % classes
    latent = simplex[labels] + _COLLAPSE_NOISE * r.normal(samples, latents) / latents**0.5
    return Problem(weight, latent @ weight.t())


def _rank_deficient(classes: int, latents: int, samples: int = _SAMPLES, seed: int = 0) -> Problem:
    """As `random`, with fewer latents than it takes to tell all classes apart independently."""
    if latents >= classes - 1:
        raise ValueError(f"rank-deficient: expected latents < {classes - 1}, got {latents}")
    return random(classes, latents, samples, seed)


FAMILIES: dict[str, Callable[..., Problem]] = {
    "random": random,
    "rank-deficient": _rank_deficient,
    "low-rank": low_rank,
    "collapsed": collapsed,
}


def make(case: str) -> Problem:
    """The problem of a case's name.

    Raises:
        ValueError: it is no case.
    """
    if case.startswith(_HEAD):
        return load_head(heads_folder() / f"{case.removeprefix(_HEAD)}.safetensors")
    classes, _, latents, family = case.split(" ")
    return FAMILIES[family](int(classes), int(latents))


# ---- real heads ----------------------------------------------------------------------------------


def heads_folder() -> Path:
    """The folder that --heads names."""
    return Path(os.environ[HEADS_VARIABLE])


def head_cases() -> list[str]:
    """One case for each head in the folder; none without a folder."""
    if HEADS_VARIABLE not in os.environ:
        return []
    return [_HEAD + path.stem for path in sorted(heads_folder().glob("*.safetensors"))]


def load_head(path: Path) -> Problem:
    """Reads `weight` [C, D] and `logits` [N, C], or `latents` [N, D] with `bias` [C].

    Raises:
        ValueError: the file has neither.
    """
    tensors = load_file(path)
    weight = tensors["weight"]
    if "logits" in tensors:
        return Problem(weight, tensors["logits"])
    if "latents" not in tensors:
        raise ValueError(f"{path}: expected logits or latents, got {', '.join(tensors)}")
    logits = tensors["latents"] @ weight.t()
    return Problem(weight, logits + tensors["bias"] if "bias" in tensors else logits)
