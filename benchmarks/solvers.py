"""Other QP solvers on one class's problem, each in the forms that suit it.

primal: minimise 1/2 |s|^2 subject to A s >= m, with rows w_k - w_j of A.
dual:   minimise 1/2 l'Gl - m'l over l >= 0, with G = A A'; then |s|^2 = l'Gl.

A solver's arrays are laid out before the clock starts; what is timed is its own work, including its
set-up and factorisations. quadprog and DAQP are active-set methods on the dual already; they get
the primal alone, because all of the dual's bounds but a few are active.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Solve = Callable[[], float]  # returns |s|, or NaN where the solver gives up

_NO_BOUND = 1e30
_LOOSEST, _TIGHTEST = 1e-8, 1e-13


@dataclass(frozen=True, eq=False)
class ClassProblem:
    """Class k against all others: rows [C - 1, D], their Gram matrix, and m [C - 1]."""

    rows: Array
    gram: Array
    margins: Array

    def norm_of(self, multipliers: Array) -> float:
        """|s| of a dual point, whose negative entries are rounding."""
        return float(np.linalg.norm(np.maximum(multipliers, 0) @ self.rows))


def class_problem(weight: Array, gram: Array, margins: Array, k: int) -> ClassProblem:
    """The problem of class k, given W, W W' and M."""
    others = np.delete(np.arange(len(weight)), k)
    cross = gram[others, k]
    return ClassProblem(
        weight[k] - weight[others],
        gram[k, k] - cross[:, None] - cross[None, :] + gram[np.ix_(others, others)],
        margins[k, others],
    )


@dataclass(frozen=True)
class Solver:
    """One solver in one form.

    Attributes:
        name: as the table has it.
        module: what must be installed.
        prepare: lays out a problem for a tolerance.
        direct: an active-set method, exact up to rounding, with no tolerance to speak of.
        scale: how the work grows, as a power of the number of variables and rows: to skip the form
            that is hopeless.
    """

    name: str
    module: str
    form: str
    prepare: Callable[[ClassProblem, float], Solve]
    direct: bool = False

    @property
    def label(self) -> str:
        """Name and form."""
        return f"{self.name}, {self.form}"

    @property
    def installed(self) -> bool:
        """Whether its package is there."""
        return importlib.util.find_spec(self.module) is not None


# ---- quadprog, DAQP ------------------------------------------------------------------------------


def _quadprog(p: ClassProblem, _tolerance: float) -> Solve:
    import quadprog

    latents = p.rows.shape[1]
    # factorized: it gets the inverse Cholesky factor of the identity and need not compute it.
    identity, zeros, columns = np.eye(latents), np.zeros(latents), p.rows.T.copy()
    return lambda: float(
        np.linalg.norm(quadprog.solve_qp(identity, zeros, columns, p.margins, 0, True)[0])
    )


def _daqp(p: ClassProblem, tolerance: float) -> Solve:
    import daqp

    count, latents = p.rows.shape
    identity, zeros = np.eye(latents), np.zeros(latents)
    rows, above = np.ascontiguousarray(p.rows), np.full(count, _NO_BOUND)

    def solve() -> float:
        s, _, flag, _ = daqp.solve(
            identity, zeros, rows, above, p.margins, primal_tol=tolerance, iter_limit=100_000
        )
        return float(np.linalg.norm(s)) if flag == 1 else math.nan

    return solve


# ---- ProxQP --------------------------------------------------------------------------------------


def _run_proxqp(n: int, rows: int, box: bool, diagonal: bool, tolerance: float, *data: Any) -> Any:
    from proxsuite import proxqp

    kind = proxqp.dense.HessianType
    qp = proxqp.dense.QP(n, 0, rows, box, kind.Diagonal if diagonal else kind.Dense)
    qp.settings.eps_abs = tolerance
    qp.settings.eps_rel = 0
    qp.settings.max_iter = 10_000
    qp.init(*data)
    qp.solve()
    return qp.results


def _proxqp_primal(p: ClassProblem, tolerance: float) -> Solve:
    count, latents = p.rows.shape
    identity, zeros = np.eye(latents), np.zeros(latents)
    rows, above = np.ascontiguousarray(p.rows), np.full(count, _NO_BOUND)
    data = identity, zeros, None, None, rows, p.margins, above
    return lambda: float(
        np.linalg.norm(_run_proxqp(latents, count, False, True, tolerance, *data).x)
    )


def _proxqp_dual(p: ClassProblem, tolerance: float) -> Solve:
    count = len(p.margins)
    zeros, above = np.zeros(count), np.full(count, _NO_BOUND)
    data = p.gram, -p.margins, None, None, None, None, None, zeros, above
    return lambda: p.norm_of(_run_proxqp(count, 0, True, False, tolerance, *data).x)


# ---- PIQP ----------------------------------------------------------------------------------------


def _run_piqp(tolerance: float, *data: Any) -> Array:
    import piqp

    solver = piqp.DenseSolver()
    settings = solver.settings
    settings.eps_abs = settings.eps_duality_gap_abs = tolerance
    settings.eps_rel = settings.eps_duality_gap_rel = 0
    settings.max_iter = 1000
    solver.setup(*data)
    solver.solve()
    x: Array = solver.result.x
    return x


def _piqp_primal(p: ClassProblem, tolerance: float) -> Solve:
    latents = p.rows.shape[1]
    identity, zeros = np.asfortranarray(np.eye(latents)), np.zeros(latents)
    data = identity, zeros, None, None, np.asfortranarray(p.rows), p.margins
    return lambda: float(np.linalg.norm(_run_piqp(tolerance, *data)))


def _piqp_dual(p: ClassProblem, tolerance: float) -> Solve:
    gram, zeros = np.asfortranarray(p.gram), np.zeros(len(p.margins))
    data = gram, -p.margins, None, None, None, None, None, zeros
    return lambda: p.norm_of(_run_piqp(tolerance, *data))


# ---- OSQP ----------------------------------------------------------------------------------------


def _run_osqp(tolerance: float, hessian: Any, linear: Array, rows: Any, below: Array) -> Array:
    import osqp

    solver = osqp.OSQP()
    solver.setup(
        hessian,
        linear,
        rows,
        below,
        np.full(len(below), np.inf),
        verbose=False,
        eps_abs=tolerance,
        eps_rel=0.0,
        max_iter=50_000,
        polishing=True,  # without it hardly any problem gets below 1e-6
    )
    x: Array = np.asarray(solver.solve(raise_error=False).x)
    return x


def _osqp_primal(p: ClassProblem, tolerance: float) -> Solve:
    from scipy import sparse

    latents = p.rows.shape[1]
    data = sparse.eye(latents, format="csc"), np.zeros(latents), sparse.csc_matrix(p.rows)
    return lambda: float(np.linalg.norm(_run_osqp(tolerance, *data, p.margins)))


def _osqp_dual(p: ClassProblem, tolerance: float) -> Solve:
    from scipy import sparse

    count = len(p.margins)
    data = sparse.triu(p.gram, format="csc"), -p.margins, sparse.eye(count, format="csc")
    return lambda: p.norm_of(_run_osqp(tolerance, *data, np.zeros(count)))


# ---- Clarabel ------------------------------------------------------------------------------------


def _run_clarabel(tolerance: float, hessian: Any, linear: Array, rows: Any, right: Array) -> Array:
    import clarabel

    settings = clarabel.DefaultSettings()
    settings.verbose = False
    settings.max_threads = 1
    settings.tol_feas = settings.tol_gap_abs = settings.tol_gap_rel = tolerance
    cone = [clarabel.NonnegativeConeT(len(right))]
    return np.asarray(clarabel.DefaultSolver(hessian, linear, rows, right, cone, settings).solve().x)


def _clarabel_primal(p: ClassProblem, tolerance: float) -> Solve:
    from scipy import sparse

    latents = p.rows.shape[1]
    data = sparse.eye(latents, format="csc"), np.zeros(latents), sparse.csc_matrix(-p.rows)
    return lambda: float(np.linalg.norm(_run_clarabel(tolerance, *data, -p.margins)))


def _clarabel_dual(p: ClassProblem, tolerance: float) -> Solve:
    from scipy import sparse

    count = len(p.margins)
    data = sparse.triu(p.gram, format="csc"), -p.margins, -sparse.eye(count, format="csc")
    return lambda: p.norm_of(_run_clarabel(tolerance, *data, np.zeros(count)))


SOLVERS = (
    Solver("DAQP", "daqp", "primal", _daqp, direct=True),
    Solver("quadprog", "quadprog", "primal", _quadprog, direct=True),
    Solver("ProxQP", "proxsuite", "primal", _proxqp_primal),
    Solver("ProxQP", "proxsuite", "dual", _proxqp_dual),
    Solver("PIQP", "piqp", "primal", _piqp_primal),
    Solver("PIQP", "piqp", "dual", _piqp_dual),
    Solver("OSQP", "osqp", "primal", _osqp_primal),
    Solver("OSQP", "osqp", "dual", _osqp_dual),
    Solver("Clarabel", "clarabel", "primal", _clarabel_primal),
    Solver("Clarabel", "clarabel", "dual", _clarabel_dual),
)
