"""Plain, slow and exact: the minimal perturbation in rational numbers.

A float is a rational number, so nothing here rounds. However an answer was found, it is accepted
only where `prove` shows it: a point that satisfies the KKT conditions of a strictly convex problem
is its one solution, and a Farkas ray shows that there is none.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

Vector = list[Fraction]
Rows = list[Vector]
ZERO = Fraction(0)


def dot(a: Sequence[Fraction], b: Sequence[Fraction]) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), ZERO)


def solve(matrix: Rows, right: Vector) -> Vector | None:
    """Gauss-Jordan elimination; None where the matrix is singular."""
    n = len(right)
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    for i in range(n):
        pivot = next((p for p in range(i, n) if rows[p][i] != 0), None)
        if pivot is None:
            return None
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for p in range(n):
            if p != i and rows[p][i] != 0:
                factor = rows[p][i]
                rows[p] = [x - factor * y for x, y in zip(rows[p], rows[i], strict=True)]
    return [row[n] for row in rows]


@dataclass(frozen=True)
class Exact:
    """l over the constraints j != k in order; a Farkas ray where `reachable` is false."""

    reachable: bool
    multipliers: Vector
    perturbation: Vector
    squared_norm: Fraction

    @property
    def norm(self) -> float:
        if not self.reachable:
            return math.inf
        # An integer square root, as the rational may lie outside the range of float.
        scale = 1 << 400
        return float(Fraction(math.isqrt(int(self.squared_norm * scale)), 1 << 200))


class Problem:
    """min 1/2 |s|^2 subject to a_i . s >= m_i, with a_i = w_k - w_j exactly."""

    def __init__(self, weight: NDArray[np.float64], margins: NDArray[np.float64], target: int):
        rows = [[Fraction(x) for x in row] for row in weight.tolist()]
        others = [j for j in range(len(rows)) if j != target]
        self.a: Rows = [[x - y for x, y in zip(rows[target], rows[j], strict=True)] for j in others]
        self.m: Vector = [Fraction(float(margins[target, j])) for j in others]
        self.gram: Rows = [[dot(x, y) for y in self.a] for x in self.a]
        self.latents = weight.shape[1]

    def combine(self, multipliers: Vector) -> Vector:
        s = [ZERO] * self.latents
        for l, row in zip(multipliers, self.a, strict=True):
            if l != 0:
                s = [x + l * y for x, y in zip(s, row, strict=True)]
        return s

    def prove(self, multipliers: Vector, *, reachable: bool) -> Exact:
        s = self.combine(multipliers)
        value = dot(multipliers, self.m)
        assert all(l >= 0 for l in multipliers)
        if not reachable:
            assert not any(s), "the ray does not cancel"
            assert value > 0
            return Exact(False, multipliers, s, ZERO)
        slack = [dot(row, s) - m for row, m in zip(self.a, self.m, strict=True)]
        assert all(x >= 0 for x in slack), "infeasible"
        assert all(l == 0 or x == 0 for l, x in zip(multipliers, slack, strict=True))
        return Exact(True, multipliers, s, dot(s, s))

    def solve_brute_force(self) -> Exact | None:
        """Tries every set of active constraints; None where no set solves, so none is feasible.

        A solution has multipliers on linearly independent constraints (Caratheodory), so sets with
        a singular Gram matrix need no look.
        """
        count = len(self.m)
        for size in range(count + 1):
            for active in itertools.combinations(range(count), size):
                part = solve(
                    [[self.gram[i][j] for j in active] for i in active],
                    [self.m[i] for i in active],
                )
                if part is None or any(l < 0 for l in part):
                    continue
                multipliers = [ZERO] * count
                for i, l in zip(active, part, strict=True):
                    multipliers[i] = l
                s = self.combine(multipliers)
                if all(dot(row, s) >= m for row, m in zip(self.a, self.m, strict=True)):
                    return self.prove(multipliers, reachable=True)
        return None

    def solve(self) -> Exact:
        """The dual active-set method of Goldfarb and Idnani, in rational numbers."""
        count = len(self.m)
        active: list[int] = []
        l: Vector = []
        while True:
            slack = [m - dot([self.gram[i][j] for j in active], l) for i, m in enumerate(self.m)]
            violated = [i for i in range(count) if slack[i] > 0]
            if not violated:
                return self.prove(self._spread(active, l), reachable=True)
            p = max(violated, key=lambda i: _distance(slack[i], self.gram[i][i]))
            l_p = ZERO
            while True:
                r = solve(
                    [[self.gram[i][j] for j in active] for i in active],
                    [self.gram[i][p] for i in active],
                )
                assert r is not None
                curvature = self.gram[p][p] - dot([self.gram[p][i] for i in active], r)
                blocking = [(x / y, i) for i, (x, y) in enumerate(zip(l, r, strict=True)) if y > 0]
                if curvature == 0 and not blocking:
                    ray = self._spread([*active, p], [*(-x for x in r), Fraction(1)])
                    return self.prove(ray, reachable=False)
                left = self.m[p] - dot([self.gram[p][i] for i in active], l)
                left -= l_p * self.gram[p][p]
                step, leaving = min(blocking) if blocking else (None, None)
                full = left / curvature if curvature != 0 else None
                take = full if step is None or (full is not None and full <= step) else step
                assert take is not None
                l = [x - take * y for x, y in zip(l, r, strict=True)]
                l_p += take
                if take == full:
                    active.append(p)
                    l.append(l_p)
                    break
                assert leaving is not None
                del active[leaving], l[leaving]

    def _spread(self, active: list[int], values: Vector) -> Vector:
        multipliers = [ZERO] * len(self.m)
        for i, l in zip(active, values, strict=True):
            multipliers[i] = l
        return multipliers


def _distance(slack: Fraction, squared_norm: Fraction) -> float:
    """How far the constraint is from holding; only picks the next one, so rounding is harmless."""
    return math.inf if squared_norm == 0 else float(slack * slack / squared_norm)
