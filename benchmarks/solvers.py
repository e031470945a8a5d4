"""Other QP solvers on one class's problem, each in the forms that suit it.

primal: minimise 1/2 |s|^2 subject to A s >= m, with rows w_k - w_j of A.
dual:   minimise 1/2 l'Gl - m'l over l >= 0, with G = A A'; then |s|^2 = l'Gl.

A solver's arrays, G among them, are laid out before the clock starts; what is timed is its own work,
set-up and factorisations included. `choose` finds the faster form and the loosest tolerance that
reaches the wanted accuracy.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Solve = Callable[[], float]  # returns |s|, or NaN where the solver gives up

_NO_BOUND = 1e30
_TOLERANCES = (1e-8, 1e-10, 1e-12)
_WORTH_REPEATING, _TOO_LONG = 0.05, 20.0  # seconds
_RESERVE = 0.03  # of the accuracy: other classes than the first may come out worse
_HOPELESS = 1e8  # classes * latents^2 from which interior points take seconds for a primal


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
        form: primal or dual.
        prepare: lays out a problem for a tolerance.
    """

    name: str
    module: str
    form: str
    prepare: Callable[[ClassProblem, float], Solve]

    @property
    def label(self) -> str:
        """Name and form."""
        return f"{self.name}, {self.form}"

    def is_worth_trying(self, classes: int, latents: int) -> bool:
        """False for primals that have more variables than rows and would take minutes."""
        interior = self.name not in ("DAQP", "quadprog")
        many = latents >= classes and classes * latents**2 > _HOPELESS
        return not (interior and self.form == "primal" and many)

    def norm(self, problem: ClassProblem, tolerance: float) -> tuple[float, float]:
        """|s|, NaN where the solver gives up, and the seconds that it took."""
        solve = self.prepare(problem, tolerance)
        with muted():
            begin = time.perf_counter()
            norm = attempt(solve)
            return norm, time.perf_counter() - begin


@contextlib.contextmanager
def muted() -> Iterator[None]:
    """Keeps what native code prints, as OSQP does of its polishing, off the terminal."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
        ctypes.CDLL(None).fflush(None)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def attempt(solve: Solve) -> float:
    """What `solve` returns, or NaN where it fails."""
    try:
        return solve()
    except (ValueError, ArithmeticError, RuntimeError):
        return math.nan


@dataclass(frozen=True)
class Choice:
    """A solver's better form, with the tolerance that it needs and the time of one class."""

    solver: Solver
    tolerance: float
    seconds: float
    error: float
    compared: str  # how the other form did


def _tighten(solver: Solver, problem: ClassProblem, norm: float, accuracy: float) -> Choice:
    """The loosest tolerance whose norm is as accurate as wanted, else the one that is nearest."""
    tried: list[Choice] = []
    for tolerance in _TOLERANCES:
        found, seconds = solver.norm(problem, tolerance)
        if seconds < _WORTH_REPEATING:  # the first call warms up
            found, seconds = solver.norm(problem, tolerance)
        error = abs(found / norm - 1)
        tried.append(
            Choice(solver, tolerance, seconds, math.inf if math.isnan(error) else error, "")
        )
        if error <= accuracy or seconds > _TOO_LONG:
            break
    return min(tried, key=lambda choice: choice.error)


def choose(name: str, problem: ClassProblem, norm: float, accuracy: float) -> Choice:
    """The faster of a solver's forms among those that reach `accuracy` on one class's problem."""
    rows, latents = problem.rows.shape
    forms = [s for s in SOLVERS if s.name == name and s.is_worth_trying(rows + 1, latents)]
    choices = sorted(
        (_tighten(solver, problem, norm, _RESERVE * accuracy) for solver in forms),
        key=lambda choice: (choice.error > accuracy, choice.seconds),
    )
    best, *others = choices
    compared = ", ".join(
        f"{other.solver.form} {other.seconds / best.seconds:.2g}x"
        if other.error <= accuracy
        else f"{other.solver.form} misses it"
        for other in others
    )
    return replace(best, compared=compared)


# ---- quadprog, DAQP ------------------------------------------------------------------------------


def _quadprog_primal(p: ClassProblem, _tolerance: float) -> Solve:
    import quadprog

    latents = p.rows.shape[1]
    # factorized: it gets the inverse Cholesky factor of the identity and need not compute it.
    identity, zeros, columns = np.eye(latents), np.zeros(latents), p.rows.T.copy()
    return lambda: float(
        np.linalg.norm(quadprog.solve_qp(identity, zeros, columns, p.margins, 0, True)[0])
    )


def _quadprog_dual(p: ClassProblem, _tolerance: float) -> Solve:
    import quadprog

    count = len(p.margins)
    identity, zeros = np.eye(count), np.zeros(count)
    return lambda: p.norm_of(quadprog.solve_qp(p.gram, p.margins, identity, zeros)[0])


def _run_daqp(tolerance: float, *data: Any) -> Array:
    import daqp

    x: Array
    x, _, flag, _ = daqp.solve(*data, primal_tol=tolerance, iter_limit=100_000)
    return x if flag == 1 else np.full(len(x), np.nan)


def _daqp_primal(p: ClassProblem, tolerance: float) -> Solve:
    count, latents = p.rows.shape
    rows, above = np.ascontiguousarray(p.rows), np.full(count, _NO_BOUND)
    # No Hessian stands for the identity, which it then need not factor.
    data = None, np.zeros(latents), rows, above, p.margins
    return lambda: float(np.linalg.norm(_run_daqp(tolerance, *data)))


def _daqp_dual(p: ClassProblem, tolerance: float) -> Solve:
    count = len(p.margins)
    gram, no_rows, above = (
        np.ascontiguousarray(p.gram),
        np.zeros((0, count)),
        np.full(count, _NO_BOUND),
    )
    data = gram, -p.margins, no_rows, above, np.zeros(count)
    return lambda: p.norm_of(_run_daqp(tolerance, *data))


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
    return np.asarray(
        clarabel.DefaultSolver(hessian, linear, rows, right, cone, settings).solve().x
    )


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
    Solver("DAQP", "daqp", "primal", _daqp_primal),
    Solver("DAQP", "daqp", "dual", _daqp_dual),
    Solver("quadprog", "quadprog", "primal", _quadprog_primal),
    Solver("quadprog", "quadprog", "dual", _quadprog_dual),
    Solver("ProxQP", "proxsuite", "primal", _proxqp_primal),
    Solver("ProxQP", "proxsuite", "dual", _proxqp_dual),
    Solver("PIQP", "piqp", "primal", _piqp_primal),
    Solver("PIQP", "piqp", "dual", _piqp_dual),
    Solver("OSQP", "osqp", "primal", _osqp_primal),
    Solver("OSQP", "osqp", "dual", _osqp_dual),
    Solver("Clarabel", "clarabel", "primal", _clarabel_primal),
    Solver("Clarabel", "clarabel", "dual", _clarabel_dual),
)
NAMES = tuple(dict.fromkeys(solver.name for solver in SOLVERS))


def is_installed(name: str) -> bool:
    """Whether a solver's package is there."""
    modules = {solver.module for solver in SOLVERS if solver.name == name}
    return all(importlib.util.find_spec(module) is not None for module in modules)
