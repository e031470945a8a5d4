"""`minimal_perturbation`, all classes, against general QP solvers called class by class.

A large head takes them minutes, so they solve a few classes and their time is extrapolated; the
table says from what share.
"""

from __future__ import annotations

from collections.abc import Callable

import daqp
import numpy as np
import quadprog
import torch
from numpy.typing import NDArray
from torch import Tensor

import timing
from tacext import ops
from timing import Form, Row

Array = NDArray[np.float64]

# classes x latents
CASES = ("10 x 128", "43 x 512", "100 x 512", "1000 x 2048")
QUICK_CASES = ("10 x 128", "43 x 512")
_SAMPLED_WORK = 2e7  # classes * latents^2 that each of the other solvers may do


def make_head(classes: int, latents: int, samples: int = 2000) -> tuple[Tensor, Tensor]:
    """A head as training leaves it, near a simplex, and logits of samples near their class."""
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    weight = random(classes, latents) / latents**0.5
    weight -= weight.mean(0)
    labels = torch.randint(classes, (samples,), generator=generator)
    latent = (8 * weight[labels] + 0.3 * random(samples, latents)).relu()
    return weight, latent @ weight.t() + 0.1 * random(classes)


def _quadprog(a: Array, m: Array) -> Array:
    identity = np.eye(a.shape[1])
    # factorized: it gets the inverse Cholesky factor of the identity and need not compute it.
    s: Array = quadprog.solve_qp(identity, np.zeros(len(identity)), a.T.copy(), m, 0, True)[0]
    return s


def _daqp(a: Array, m: Array) -> Array:
    identity = np.eye(a.shape[1])
    s: Array
    s, _, flag, _ = daqp.solve(
        identity, np.zeros(len(identity)), a, np.full(len(m), 1e30), m, primal_tol=1e-9
    )
    assert flag == 1
    return s


def forms(case: str, device: str) -> list[Form]:
    """The operator on all classes, and the other solvers on some of them. Answers are norms."""
    classes, latents = (int(x) for x in case.split(" x "))
    weight, logits = make_head(classes, latents)
    margins = ops.pairwise_margin_max(logits)
    moved_weight, moved_margins = weight.to(device), margins.to(device)
    w, m = weight.numpy(), margins.numpy()

    count = max(1, min(classes, int(_SAMPLED_WORK / latents**2)))
    sampled = np.linspace(0, classes - 1, count).round().astype(int)

    def norms(solve: Callable[[Array, Array], Array]) -> Tensor:
        found = [
            np.linalg.norm(solve(np.delete(w[k] - w, k, 0), np.delete(m[k], k))) for k in sampled
        ]
        return torch.tensor(np.array(found))

    def pick(answer: Tensor) -> Tensor:
        return answer.cpu()[torch.tensor(sampled)]

    share = count / classes
    return [
        Form("tacext", lambda: ops.minimal_perturbation(moved_weight, moved_margins).norm),
        Form("DAQP, class by class", lambda: norms(_daqp), share, pick),
        Form("quadprog, class by class", lambda: norms(_quadprog), share, pick),
    ]


def run(case: str, device: str, budget: float) -> list[Row]:
    """Measures one case."""
    return timing.compare("bench_minimal_perturbation", case, forms(case, device), device, budget)
