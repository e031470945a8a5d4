"""`minimal_perturbation`, all classes, against general QP solvers called class by class.

Each of them gets its faster form (`solvers.choose`), the loosest tolerance that reaches ACCURACY, and
as many classes as fit into the budget, from which its time for all is extrapolated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

import problems
import solvers
import timing
from tacext import ops
from timing import Form, Row

ACCURACY = 1e-8  # of the norm, relative
_NO_HEADS = "real heads"
CASES = (
    "10 x 128 random",
    "10 x 512 random",
    "43 x 512 random",
    "100 x 512 random",
    "200 x 512 random",
    "200 x 512 low-rank",
    "200 x 512 collapsed",
    "1000 x 512 rank-deficient",
    "1000 x 2048 random",
    "1000 x 2048 collapsed",
    *(problems.head_cases() or (_NO_HEADS,)),
)
QUICK_CASES = ("10 x 128 random", "43 x 512 random", "50 x 128 collapsed")
# How time and memory grow with the classes, tacext alone.
LARGE_CASES = tuple(f"{c} x 1024 random" for c in (100, 300, 1000, 3000, 10_000))
_TURNS = 4  # of a call within the budget
_MEMORY_FROM = 500_000  # classes * latents; below, the other solvers' memory is hardly seen


class _Sampled:
    """One solver on some classes, whose problems are laid out only when it is their turn."""

    def __init__(
        self, solver: solvers.Solver, tolerance: float, pose: Callable[[int], solvers.ClassProblem]
    ) -> None:
        self.solver, self.tolerance, self.pose = solver, tolerance, pose
        self.classes = [0]
        self._posed: list[solvers.Solve] = []

    def prepare(self) -> None:
        self._posed = [self.solver.prepare(self.pose(k), self.tolerance) for k in self.classes]

    def first(self) -> float:
        with solvers.muted():
            return solvers.attempt(self._posed[0])

    def norms(self) -> Tensor:
        with solvers.muted():
            found = [solvers.attempt(solve) for solve in self._posed]
        return torch.tensor(found, dtype=torch.float64)


def _on_one_thread(weight: Tensor, margins: Tensor) -> Tensor:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return ops.minimal_perturbation(weight, margins).norm
    finally:
        torch.set_num_threads(threads)


class _Case:
    """A problem where both sides can use it."""

    def __init__(self, case: str, device: str) -> None:
        problem = problems.make(case)
        self.margins = problem.margins().to(device)
        self.weight = problem.weight.to(device)
        self.shape = tuple(problem.weight.shape)
        self.found: ops.MinimalPerturbation | None = None
        self._arrays: tuple[solvers.Array, solvers.Array, solvers.Array] | None = None

    def norms(self) -> Tensor:
        """The operator on all classes; it keeps what it found."""
        self.found = ops.minimal_perturbation(self.weight, self.margins)
        return self.found.norm

    def norm(self, k: int) -> float:
        """The norm of one class."""
        return float(ops.minimal_perturbation(self.weight, self.margins, classes=[k]).norm)

    def pose(self, k: int) -> solvers.ClassProblem:
        """The problem of class k for the other solvers."""
        if self._arrays is None:
            w, m = (t.cpu().double().numpy() for t in (self.weight, self.margins))
            self._arrays = w, w @ w.T, m
        return solvers.class_problem(*self._arrays, k)

    def own_forms(self, device: str, large: bool) -> list[Form]:
        """The operator."""
        forms = [Form("tacext", self.norms)]
        if device == "cpu" and torch.get_num_threads() > 1 and not large:
            # The others run on one.
            forms.append(
                Form(
                    "tacext, one thread",
                    lambda: _on_one_thread(self.weight, self.margins),
                    memory=False,
                )
            )
        return forms

    def chosen_form(self, choice: solvers.Choice, budget: float) -> Form:
        """A solver's better form on as many classes as a quarter of the budget allows."""
        classes = self.shape[0]
        sampled = _Sampled(choice.solver, choice.tolerance, self.pose)
        count = max(1, min(classes, int(budget / _TURNS / choice.seconds)))
        index = np.linspace(0, classes - 1, count + 2).round().astype(int)[1:-1]
        sampled.classes = index.tolist() if count < classes else list(range(classes))
        notes = [f"tolerance {choice.tolerance:.0e}", choice.compared]
        if count < classes:
            notes.append(f"from {count} of {classes} classes")
        return Form(
            choice.solver.label,
            sampled.norms,
            count / classes,
            lambda norm: norm.cpu()[torch.tensor(sampled.classes)],
            rtol=float("inf"),
            prepare=sampled.prepare,
            memory=classes * self.shape[1] >= _MEMORY_FROM,
            note="; ".join(note for note in notes if note),
        )


def forms(case: str, device: str) -> list[Form]:
    """The operator on all classes and every solver's forms on one: what memory is measured on."""
    posed = _Case(case, device)
    found = posed.own_forms(device, case in LARGE_CASES)
    for solver in solvers.SOLVERS:
        sampled = _Sampled(solver, ACCURACY, posed.pose)
        found.append(
            Form(solver.label, sampled.norms, prepare=sampled.prepare, sample=sampled.first)
        )
    return found


def run(case: str, device: str, budget: float) -> list[Row]:
    """Measures one case."""
    name = "minimal_perturbation"
    if case == _NO_HEADS:
        return [Row.skipped(name, case, "all", "give their folder with --heads")]
    posed = _Case(case, device)
    classes = posed.shape[0]
    candidates = posed.own_forms(device, case in LARGE_CASES)
    skipped: list[Row] = []
    pilot = classes // 3
    for other in solvers.NAMES if case not in LARGE_CASES else ():
        if not solvers.is_installed(other):
            skipped.append(Row.skipped(name, case, other, "not installed"))
            continue
        choice = solvers.choose(other, posed.pose(pilot), posed.norm(pilot), ACCURACY)
        candidates.append(posed.chosen_form(choice, budget))
    rows = timing.compare(f"bench_{name}", case, candidates, device, budget)
    assert posed.found is not None
    active = posed.found.active.double()
    about = (
        f"certificate; {active.mean():.0f} ({active.min():.0f} to {active.max():.0f}) "
        f"of {classes - 1} constraints active"
    )
    rows[0] = replace(rows[0], error=posed.found.certificate, note=about)
    return [_judged(row) for row in rows] + skipped


def _judged(row: Row) -> Row:
    """Says where the accuracy was missed, or no answer came."""
    if row.error is None:
        return replace(row, note="gives up on a class; " + row.note)
    return replace(row, note="less accurate; " + row.note) if row.error > ACCURACY else row
