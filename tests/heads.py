"""Families of heads and of the problems that they pose, easy, degenerate and badly scaled."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Head:
    """A head's weight [C, D] and the margins [C, C] of some samples' logits."""

    name: str
    weight: Matrix
    margins: Matrix

    @property
    def classes(self) -> int:
        return self.weight.shape[0]


def _random(r: Generator, c: int, d: int) -> Matrix:
    return r.normal(size=(c, d))


def _duplicated_rows(r: Generator, c: int, d: int) -> Matrix:
    w = r.normal(size=(c, d))
    w[-1] = w[0]
    return w


def _near_duplicates(r: Generator, c: int, d: int) -> Matrix:
    w = r.normal(size=(c, d))
    w[-1] = w[0] * (1 + 1e-9)
    return w


def _centred(r: Generator, c: int, d: int) -> Matrix:
    w = r.normal(size=(c, d))
    return w - w.mean(0)


def _common_offset(r: Generator, c: int, d: int) -> Matrix:
    return r.normal(size=(c, d)) + 100 * r.normal(size=d)


def _rank_deficient(r: Generator, c: int, d: int) -> Matrix:
    # Integers, so that the rank is below c - 1 exactly and not just to rounding.
    rank = max(1, min(d, (c - 1) // 2))
    return (r.integers(-9, 10, (c, rank)) @ r.integers(-9, 10, (rank, d))).astype(float)


def _scaled_rows(r: Generator, c: int, d: int) -> Matrix:
    return r.normal(size=(c, d)) * 10 ** np.linspace(-6, 6, c)[:, None]


def _scaled_columns(r: Generator, c: int, d: int) -> Matrix:
    return r.normal(size=(c, d)) * 10 ** np.linspace(-6, 6, d)


def _tiny(r: Generator, c: int, d: int) -> Matrix:
    return r.normal(size=(c, d)) * 1e-6


def _huge(r: Generator, c: int, d: int) -> Matrix:
    return r.normal(size=(c, d)) * 1e6


def _inside_hull(r: Generator, c: int, d: int) -> Matrix:
    # On a grid and with weights 1/2, 1/4, ..., so that row 0 lies in the hull exactly.
    w = np.round(r.normal(size=(c, d)) * 256) / 256
    mixed = min(c - 1, 8)
    mixture = 0.5 ** np.arange(1, mixed + 1)
    mixture[-1] *= 2
    w[0] = mixture @ w[1 : mixed + 1]
    return w


def _equal_rows(r: Generator, c: int, d: int) -> Matrix:
    return np.repeat(r.normal(size=(1, d)), c, axis=0)


def _collapsed(r: Generator, c: int, d: int) -> Matrix:
    # The simplex that classifiers converge to, a little off.
    w = r.normal(size=(c, d))
    if d >= c:
        basis = np.linalg.qr(w.T)[0].T
        return 3 * (basis - basis.mean(0)) + 1e-3 * w
    return 3 * w / np.linalg.norm(w, axis=1, keepdims=True)


FAMILIES: dict[str, Callable[[Generator, int, int], Matrix]] = {
    "random": _random,
    "duplicated_rows": _duplicated_rows,
    "near_duplicates": _near_duplicates,
    "centred": _centred,
    "common_offset": _common_offset,
    "rank_deficient": _rank_deficient,
    "scaled_rows": _scaled_rows,
    "scaled_columns": _scaled_columns,
    "tiny": _tiny,
    "huge": _huge,
    "inside_hull": _inside_hull,
    "equal_rows": _equal_rows,
    "collapsed": _collapsed,
}


def margins_of(logits: Matrix) -> Matrix:
    """M[k, j] = max_i (z_ij - z_ik), as it reads."""
    return (logits[:, None, :] - logits[:, :, None]).max(0)


def make_head(family: str, classes: int, latents: int, samples: int = 200) -> Head:
    """The same head for the same arguments. M comes from the logits of latents and a bias."""
    name = f"{family}-{classes}x{latents}"
    r = np.random.default_rng(zlib.crc32(name.encode()))
    weight = FAMILIES[family](r, classes, latents)
    latent = r.normal(size=(samples, latents))
    bias = r.normal(size=classes)
    if family == "collapsed":  # samples sit at their class's row
        latent = weight[r.integers(0, classes, samples)] + 0.05 * latent
        bias *= 0.01
    return Head(name, weight, margins_of(latent @ weight.T + bias))
