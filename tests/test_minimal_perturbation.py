from __future__ import annotations

import dataclasses
import math
import pickle
import threading
import time

import daqp
import numpy as np
import pytest
import quadprog
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.typing import NDArray

import peak_memory
from heads import FAMILIES, Head, Matrix, make_head, margins_of
from reference import Problem
from tacext import ops
from tacext.errors import InputError
from tacext.ops import MinimalPerturbation, SolverSettings, Status

TOLERANCE = 1e-8
FIELDS = [f.name for f in dataclasses.fields(MinimalPerturbation)]


def solve(head: Head, device: str = "cpu", **arguments: object) -> MinimalPerturbation:
    """Solves on `device`; the result is back on the CPU."""
    weight, margins = (torch.tensor(x, device=device) for x in (head.weight, head.margins))
    result = ops.minimal_perturbation(weight, margins, **arguments)  # type: ignore[arg-type]
    return MinimalPerturbation(*(getattr(result, name).cpu() for name in FIELDS))


def assert_same_bits(a: MinimalPerturbation, b: MinimalPerturbation) -> None:
    for name in FIELDS:
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype, name
        assert left.numpy().tobytes() == right.numpy().tobytes(), name


# ---- plain references ---------------------------------------------------------------------------


def constraints(head: Head, k: int) -> tuple[Matrix, NDArray[np.float64]]:
    return np.delete(head.weight[k] - head.weight, k, 0), np.delete(head.margins[k], k)


def solve_quadprog(head: Head, k: int) -> float:
    """The norm; infinite where quadprog finds the constraints inconsistent."""
    a, m = constraints(head, k)
    latents = a.shape[1]
    try:
        s = quadprog.solve_qp(np.eye(latents), np.zeros(latents), a.T.copy(), m.copy())[0]
    except ValueError as error:
        if "inconsistent" not in str(error):
            raise
        return math.inf
    return float(np.linalg.norm(s))


def solve_daqp(head: Head, k: int) -> float:
    """The norm; infinite where DAQP finds the constraints inconsistent."""
    a, m = constraints(head, k)
    # DAQP's tolerances are absolute: it gets rows of length 1, and no empty ones.
    length = np.linalg.norm(a, axis=1)
    if (m[length == 0] > 0).any():
        return math.inf
    m = m[length > 0] / length[length > 0]
    a = a[length > 0] / length[length > 0, None]
    latents = a.shape[1]
    upper = np.full(len(m), 1e30)
    s, _, flag, _ = daqp.solve(
        np.eye(latents), np.zeros(latents), a, upper, m, primal_tol=1e-12, progress_tol=1e-16
    )
    if flag == -1:
        return math.inf
    assert flag == 1
    return float(np.linalg.norm(s))


def assert_proven(
    head: Head, result: MinimalPerturbation, scale: NDArray[np.float64] | None = None
) -> None:
    """Recomputes every certificate from W and M alone, in extended precision."""
    for i, k in enumerate(result.classes.tolist()):
        wide = head.weight.astype(np.longdouble)
        unit = np.ones(wide.shape[1]) if scale is None else scale
        a = (wide[k] - wide) * unit
        m = head.margins[k].astype(np.longdouble)
        l = result.multipliers[i].numpy().astype(np.longdouble)
        lengths = np.linalg.norm(a.astype(float), axis=1)
        where = f"{head.name}, class {k}"
        assert (l >= 0).all(), where
        assert l[k] == 0, where
        assert int(result.active[i]) == (l > 0).sum(), where

        if result.status[i] == Status.UNREACHABLE:
            # l is a Farkas ray: 0 = sum l_j a_j . s >= m.l > 0 would hold for any feasible s.
            cancelled = np.linalg.norm((l @ a).astype(float)) / max(l @ lengths, 1e-300)
            assert cancelled <= 1e-11, where
            assert m @ l > 0, where
            assert float(result.gap[i]) == pytest.approx(-float(m @ l), rel=1e-9)
            assert math.isinf(result.norm[i])
            assert result.perturbation[i].isnan().all()
            continue

        assert result.status[i] == Status.OPTIMAL, where
        s = result.perturbation[i].numpy().astype(np.longdouble) / unit
        length = np.linalg.norm(s.astype(float))
        assert float(result.norm[i]) == pytest.approx(length, rel=1e-12), where
        slack = np.delete(a @ s - m, k)
        sizes = np.delete(np.abs(m) + lengths * length, k)
        some = sizes > 0
        primal = (np.maximum(0, -slack[some]) / sizes[some]).max(initial=0)
        dual = np.linalg.norm((s - l @ a).astype(float)) / max(length + l @ lengths, 1e-300)
        bound = 2 * (m @ l) - (l @ a) @ (l @ a)  # of |s|^2, whatever l >= 0
        gap = abs(s @ s - bound) / max(s @ s, abs(bound), 1e-300)
        # Complementary slackness: no multiplier on a constraint that holds with room to spare.
        slackness = (np.delete(l, k) * np.abs(slack)).sum() / max(
            float(np.delete(l, k) @ sizes), 1e-300
        )
        residuals = {"primal": primal, "dual": dual, "gap": gap, "slackness": slackness}
        assert max(residuals.values()) <= TOLERANCE, (where, residuals)
        reported = (result.primal_residual[i], result.dual_residual[i], result.gap[i])
        assert max(float(x) for x in reported) <= TOLERANCE, where


# ---- against exact arithmetic and other solvers -------------------------------------------------

EXACT_SHAPES = [(2, 1), (2, 6), (3, 1), (6, 3), (8, 12), (12, 4)]
# Where the other solver is off or gives up, by the exact reference.
BEYOND = {"quadprog": {"near_duplicates", "scaled_columns"}, "daqp": {"scaled_columns"}}
SOLVER_SHAPES = [(2, 5), (10, 64), (30, 8), (43, 128), (100, 256)]


@pytest.mark.parametrize("shape", EXACT_SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_exact_rational_solution(
    family: str, shape: tuple[int, int], device: str
) -> None:
    head = make_head(family, *shape)
    result = solve(head, device)
    assert_proven(head, result)
    for k in range(head.classes):
        exact = Problem(head.weight, head.margins, k).solve()
        assert (result.status[k] == Status.OPTIMAL) == exact.reachable
        assert float(result.norm[k]) == pytest.approx(exact.norm, rel=TOLERANCE)
        if exact.reachable:
            s = np.array([float(x) for x in exact.perturbation])
            error = np.linalg.norm(result.perturbation[k].numpy() - s)
            assert error <= TOLERANCE * np.linalg.norm(s)


def test_constraints_that_nearly_cancel_are_solved_from_the_weights() -> None:
    # K alone passes the certificate here, too, but leaves one norm 8e-11 off.
    head = make_head("scaled_columns", 20, 3)
    result = solve(head)
    for k in range(head.classes):
        exact = Problem(head.weight, head.margins, k).solve()
        assert float(result.norm[k]) == pytest.approx(exact.norm, rel=1e-12)


@pytest.mark.parametrize("shape", SOLVER_SHAPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_agrees_with_quadprog_and_daqp(family: str, shape: tuple[int, int], device: str) -> None:
    head = make_head(family, *shape)
    result = solve(head, device)
    assert_proven(head, result)
    for k in range(0, head.classes, 1 + head.classes // 10):
        for name, other in (("quadprog", solve_quadprog), ("daqp", solve_daqp)):
            if family in BEYOND[name]:
                continue
            assert other(head, k) == pytest.approx(float(result.norm[k]), rel=TOLERANCE), name


@pytest.mark.parametrize("shape", [(3, 1), (10, 64), (30, 8), (43, 128)], ids=str)
def test_a_row_inside_the_hull_to_rounding_is_unreachable(
    shape: tuple[int, int], device: str
) -> None:
    # The mean is rounded: in exact arithmetic it may lie outside, at a norm near 1e16.
    random = make_head("random", *shape)
    weight = np.vstack([random.weight[1:].mean(0), random.weight[1:]])
    logits = np.random.default_rng(0).normal(size=(100, shape[0]))
    head = Head("mean", weight, margins_of(logits))
    result = solve(head, device)
    assert result.status[0] == Status.UNREACHABLE
    assert_proven(head, result)


@given(
    problem=st.integers(2, 5).flatmap(
        lambda c: st.tuples(
            st.integers(1, 4).flatmap(
                lambda d: st.lists(
                    st.lists(st.integers(-3, 3), min_size=d, max_size=d), min_size=c, max_size=c
                )
            ),
            st.lists(st.lists(st.integers(-3, 3), min_size=c, max_size=c), min_size=c, max_size=c),
        )
    ),
    closed_form=st.booleans(),
)
@example(([[0], [0]], [[0, 0], [0, 0]]), True)
@example(([[1, 1]] * 4, [[0, -1, -2, 0]] * 4), True)
@example(([[1, 0], [0, 1], [1, 1]], [[2, 2, 2]] * 3), True)
def test_small_integers_against_brute_force(
    problem: tuple[list[list[int]], list[list[int]]], closed_form: bool
) -> None:
    # Ties, equal rows, empty constraints and rows inside the hull come up all the time here.
    weight, margins = (np.array(x, dtype=float) for x in problem)
    head = Head("integers", weight, margins)
    result = solve(head, settings=SolverSettings(closed_form=closed_form))
    assert_proven(head, result)
    for k in range(head.classes):
        exact = Problem(weight, margins, k).solve_brute_force()
        assert (result.status[k] == Status.UNREACHABLE) == (exact is None)
        if exact is not None:
            s = np.array([float(x) for x in exact.perturbation])
            assert float(result.norm[k]) == pytest.approx(exact.norm, rel=TOLERANCE, abs=1e-12)
            assert np.allclose(result.perturbation[k].numpy(), s, rtol=TOLERANCE, atol=1e-12)


def test_the_references_agree() -> None:
    for family in FAMILIES:
        head = make_head(family, 5, 3)
        for k in range(5):
            problem = Problem(head.weight, head.margins, k)
            exact, brute = problem.solve(), problem.solve_brute_force()
            assert exact.reachable == (brute is not None)
            assert brute is None or exact.squared_norm == brute.squared_norm


# ---- laws ---------------------------------------------------------------------------------------


@given(
    family=st.sampled_from(["random", "centred", "rank_deficient", "inside_hull", "collapsed"]),
    shape=st.sampled_from([(2, 3), (5, 8), (9, 4)]),
    data=st.data(),
)
def test_permuting_classes_permutes_the_solutions(
    family: str, shape: tuple[int, int], data: st.DataObject
) -> None:
    head = make_head(family, *shape)
    order = np.array(data.draw(st.permutations(range(shape[0]))))
    permuted = Head("permuted", head.weight[order], head.margins[order][:, order])
    expected, result = solve(head), solve(permuted)
    assert torch.equal(result.status, expected.status[order])
    assert np.allclose(result.norm, expected.norm[order], rtol=1e-9)
    assert np.allclose(
        result.perturbation, expected.perturbation[order], rtol=1e-7, atol=1e-9, equal_nan=True
    )


@pytest.mark.parametrize("family", ["random", "rank_deficient", "collapsed", "inside_hull"])
def test_adding_a_vector_to_every_row_changes_nothing(family: str, device: str) -> None:
    head = make_head(family, 12, 20)
    # On a grid, so that the sum is exact and the problem the same.
    weight = np.round(head.weight * 2**20) / 2**20
    shift = np.round(np.random.default_rng(0).normal(size=20) * 50)
    expected = solve(Head("plain", weight, head.margins), device)
    result = solve(Head("shifted", weight + shift, head.margins), device)
    assert torch.equal(result.status, expected.status)
    assert np.allclose(result.norm, expected.norm, rtol=1e-9)
    assert np.allclose(
        result.perturbation, expected.perturbation, rtol=1e-9, atol=1e-10, equal_nan=True
    )


@pytest.mark.parametrize("factor", [1e-6, 3.0, 1e6])
@pytest.mark.parametrize("family", ["random", "rank_deficient", "collapsed"])
def test_scaling_weight_or_margins_scales_the_solution(
    family: str, factor: float, device: str
) -> None:
    head = make_head(family, 10, 12)
    expected = solve(head, device)
    smaller = solve(Head("weight", head.weight * factor, head.margins), device)
    larger = solve(Head("margins", head.weight, head.margins * factor), device)
    assert torch.equal(smaller.status, expected.status)
    assert torch.equal(larger.status, expected.status)
    assert np.allclose(smaller.norm * factor, expected.norm, rtol=1e-9)
    assert np.allclose(larger.norm / factor, expected.norm, rtol=1e-9)


@pytest.mark.parametrize("family", ["random", "collapsed", "rank_deficient", "inside_hull"])
def test_scale_is_the_rescaled_problem(family: str, device: str) -> None:
    head = make_head(family, 14, 20)
    scale = 10 ** np.random.default_rng(1).uniform(-2, 2, 20)
    result = solve(head, device, scale=torch.tensor(scale, device=device))
    assert_proven(head, result, scale)
    rescaled = solve(Head("rescaled", head.weight * scale, head.margins), device)
    assert torch.equal(result.status, rescaled.status)
    assert np.allclose(result.norm, rescaled.norm, rtol=1e-12)
    assert np.allclose(
        result.perturbation.numpy(),
        rescaled.perturbation.numpy() * scale,
        rtol=1e-9,
        equal_nan=True,
    )
    reachable = result.status == Status.OPTIMAL
    lengths = (result.perturbation / torch.tensor(scale)).norm(dim=1)
    assert np.allclose(lengths[reachable], result.norm[reachable], rtol=1e-12)


def test_unit_scale_is_no_scale(device: str) -> None:
    head = make_head("random", 10, 12)
    assert_same_bits(solve(head, device), solve(head, device, scale=torch.ones(12, device=device)))


def test_a_class_that_every_sample_already_has_needs_nothing(device: str) -> None:
    head = make_head("random", 6, 8)
    head.margins[2] = [-1, -2, 0, 0, -1e-9, -5]
    result = solve(head, device)
    assert result.status[2] == Status.OPTIMAL
    assert float(result.norm[2]) == 0
    assert not result.perturbation[2].any()
    assert not result.multipliers[2].any()
    assert int(result.active[2]) == 0


def test_the_perturbation_sends_every_sample_to_the_class(device: str) -> None:
    r = np.random.default_rng(0)
    weight, bias, latent = r.normal(size=(8, 20)), r.normal(size=8), r.normal(size=(500, 20))
    logits = latent @ weight.T + bias
    margins = ops.pairwise_margin_max(torch.tensor(logits, device=device))
    result = ops.minimal_perturbation(torch.tensor(weight, device=device), margins)
    for k, s in enumerate(result.perturbation.cpu().numpy()):
        pushed = (latent + s) @ weight.T + bias
        assert (pushed[:, [k]] - pushed >= -1e-10).all()
        # Minimal: a little shorter, and some sample stays behind.
        short = (latent + (1 - 1e-6) * s) @ weight.T + bias
        assert (short[:, [k]] - short).min() < 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("shape", [(2, 3), (10, 30), (80, 100)], ids=str)
def test_closed_form_and_active_set_agree(family: str, shape: tuple[int, int], device: str) -> None:
    head = make_head(family, *shape)
    fast = solve(head, device)
    plain = solve(head, device, settings=SolverSettings(closed_form=False))
    assert_proven(head, plain)
    assert torch.equal(fast.status, plain.status)
    assert np.allclose(fast.norm, plain.norm, rtol=TOLERANCE)


def test_all_active_takes_no_iterations(device: str) -> None:
    basis = np.eye(10, 15) - 0.1
    head = Head("simplex", basis, np.full((10, 10), 2.0))
    closed = solve(head, device)
    assert not closed.iterations.any()
    assert (closed.active == 9).all()
    plain = solve(head, device, settings=SolverSettings(closed_form=False))
    assert (plain.iterations >= 9).all()
    assert np.allclose(plain.norm, closed.norm, rtol=1e-12)


# ---- the same bits ------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["random", "near_duplicates", "collapsed", "scaled_rows"])
@pytest.mark.parametrize("shape", [(20, 30), (100, 128)], ids=str)
def test_a_subset_of_classes_gives_the_bits_of_the_full_solve(
    family: str, shape: tuple[int, int], device: str
) -> None:
    head = make_head(family, *shape)
    full = solve(head, device)
    subset = [shape[0] - 1, 0, 3, 3, 17]
    for classes in (subset, torch.tensor(subset, device=device)):
        part = solve(head, device, classes=classes)
        assert part.classes.tolist() == subset
        picked = MinimalPerturbation(*(getattr(full, name)[subset] for name in FIELDS))
        assert_same_bits(part, picked)


def test_no_classes_gives_no_rows(device: str) -> None:
    result = solve(make_head("random", 5, 6), device, classes=[])
    assert result.perturbation.shape == (0, 6)
    assert result.multipliers.shape == (0, 5)
    assert math.isnan(result.certificate)


@pytest.mark.usefixtures("restore_threads")
@pytest.mark.parametrize("family", ["random", "near_duplicates", "scaled_columns"])
def test_threads_do_not_change_the_bits(family: str) -> None:
    head = make_head(family, 90, 128)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(solve(head))
    assert_same_bits(results[0], results[1])
    assert_same_bits(results[0], results[2])


def test_solves_in_parallel_python_threads_give_the_serial_bits() -> None:
    heads = [make_head(f, 60, 80) for f in ("random", "collapsed", "scaled_rows", "inside_hull")]
    serial = [solve(head) for head in heads]
    parallel: list[list[MinimalPerturbation]] = [[] for _ in heads]
    start = threading.Barrier(len(heads))

    def work(i: int) -> None:
        start.wait()
        for _ in range(5):
            parallel[i].append(solve(heads[i]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(heads))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for expected, results in zip(serial, parallel, strict=True):
        assert len(results) == 5
        for result in results:
            assert_same_bits(result, expected)


def test_the_gil_is_free_during_a_solve() -> None:
    head = make_head("random", 400, 1024, samples=50)
    weight, margins = torch.tensor(head.weight), torch.tensor(head.margins)
    ticks: list[float] = []
    stop = threading.Event()

    def tick() -> None:
        while not stop.wait(0.001):
            ticks.append(time.perf_counter())

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.perf_counter()
    ops.minimal_perturbation(weight, margins)
    end = time.perf_counter()
    stop.set()
    thread.join()
    # Well inside the call: a held GIL would leave this window empty.
    margin = 0.2 * (end - begin)
    assert sum(begin + margin < t < end - margin for t in ticks) >= 3


# ---- settings, dtypes, result -------------------------------------------------------------------


def test_the_iteration_limit_is_reported(device: str) -> None:
    head = make_head("random", 30, 40)
    limited = solve(head, device, settings=SolverSettings(max_iterations=1, closed_form=False))
    complete = solve(head, device)
    assert (limited.status == Status.ITERATION_LIMIT).any()
    stopped = limited.status == Status.ITERATION_LIMIT
    assert (complete.iterations[stopped] > 1).all()
    worst = torch.stack([limited.primal_residual, limited.dual_residual, limited.gap]).amax(0)
    assert (worst[stopped] > SolverSettings().tolerance).all()
    assert not limited.certificate > SolverSettings().tolerance  # NaN where no class is optimal


def test_a_tolerance_that_nothing_meets_proves_nothing(device: str) -> None:
    result = solve(make_head("random", 30, 8), device, settings=SolverSettings(tolerance=1e-300))
    assert (result.status == Status.ITERATION_LIMIT).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lower_precision_is_read_exactly(dtype: torch.dtype, device: str) -> None:
    head = make_head("random", 10, 16)
    weight = torch.tensor(head.weight, device=device).to(dtype)
    margins = torch.tensor(head.margins, device=device).to(dtype)
    scale = torch.rand(16, generator=torch.Generator().manual_seed(0)).add(0.5).to(device).to(dtype)
    low = ops.minimal_perturbation(weight, margins, scale=scale)
    high = ops.minimal_perturbation(weight.double(), margins.double(), scale=scale.double())
    assert low.perturbation.dtype == torch.float64
    for name in FIELDS:
        assert torch.equal(getattr(low, name), getattr(high, name)), name


def test_strided_inputs_and_parameters(device: str) -> None:
    head = make_head("random", 10, 16)
    expected = solve(head, device)
    weight = torch.tensor(head.weight.T.copy(), device=device).t().requires_grad_()
    margins = torch.tensor(head.margins.T.copy(), device=device).t()
    result = ops.minimal_perturbation(weight, margins)
    assert torch.equal(result.perturbation.cpu(), expected.perturbation)
    assert not result.perturbation.requires_grad


def test_the_diagonal_of_the_margins_is_ignored(device: str) -> None:
    head = make_head("random", 10, 16)
    other = head.margins.copy()
    np.fill_diagonal(other, 1e9)
    assert_same_bits(solve(head, device), solve(Head("diagonal", head.weight, other), device))


def test_shapes_dtypes_and_device_of_the_result(device: str) -> None:
    head = make_head("random", 7, 9)
    weight, margins = (torch.tensor(x, device=device) for x in (head.weight, head.margins))
    result = ops.minimal_perturbation(weight, margins, classes=[4, 2])
    expected = {
        "classes": ((2,), torch.int64),
        "perturbation": ((2, 9), torch.float64),
        "norm": ((2,), torch.float64),
        "multipliers": ((2, 7), torch.float64),
        "status": ((2,), torch.int32),
        "iterations": ((2,), torch.int64),
        "active": ((2,), torch.int64),
        "primal_residual": ((2,), torch.float64),
        "dual_residual": ((2,), torch.float64),
        "gap": ((2,), torch.float64),
    }
    assert list(expected) == FIELDS
    for name, (shape, dtype) in expected.items():
        value = getattr(result, name)
        assert (tuple(value.shape), value.dtype, value.device) == (shape, dtype, weight.device)


def test_the_result_is_frozen_and_carries_its_certificate() -> None:
    result = solve(make_head("inside_hull", 10, 16))
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.norm = torch.zeros(1)  # type: ignore[misc]
    optimal = result.status == Status.OPTIMAL
    worst = torch.stack([result.primal_residual, result.dual_residual, result.gap])[:, optimal]
    assert 0 < result.certificate == float(worst.max()) <= TOLERANCE
    nothing = solve(make_head("inside_hull", 10, 16), classes=[0])
    assert nothing.status.tolist() == [Status.UNREACHABLE]
    assert math.isnan(nothing.certificate)


@pytest.mark.parametrize("tolerance", [0.0, -1e-9, 1.0, math.nan, math.inf])
def test_a_tolerance_out_of_range(tolerance: float) -> None:
    with pytest.raises(InputError, match="tolerance: expected a number between 0 and 1, got"):
        SolverSettings(tolerance=tolerance)


def test_other_wrong_settings() -> None:
    with pytest.raises(InputError, match=r"max_iterations: expected 0 .* or more, got -1"):
        SolverSettings(max_iterations=-1)
    with pytest.raises(TypeError):
        SolverSettings(1e-9)  # type: ignore[misc]
    with pytest.raises(InputError, match=r"expected a number, .* got tolerance='small'"):
        SolverSettings(tolerance="small")  # type: ignore[arg-type]
    settings = SolverSettings()
    with pytest.raises(AttributeError):
        settings.tolerance = 1e-3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        settings.rounds = 3  # type: ignore[attr-defined]
    copied = pickle.loads(pickle.dumps(settings))
    assert (type(copied), copied) == (SolverSettings, settings)
    assert settings == SolverSettings(tolerance=1e-9, max_iterations=0, closed_form=True)
    assert settings != SolverSettings(max_iterations=5)
    assert repr(settings) == "SolverSettings(tolerance=1e-09, max_iterations=0, closed_form=True)"


# ---- what is refused ----------------------------------------------------------------------------

EYE = torch.eye(3, 4)
ZERO = torch.zeros(3, 3)


def with_value(tensor: torch.Tensor, position: tuple[int, ...], value: float) -> torch.Tensor:
    changed = tensor.clone()
    changed[position] = value
    return changed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weight": torch.zeros(4)}, r"weight: expected 2 dimensions, got 1"),
        ({"weight": EYE.long()}, r"weight: expected float64, float32, float16 or bfloat16"),
        ({"weight": EYE[:1], "margins": ZERO[:1, :1]}, r"weight: expected at least 2 classes"),
        ({"weight": EYE[:, :0]}, r"weight: expected at least 2 classes and 1 latent, got shape"),
        ({"weight": EYE.tolist()}, r"weight: expected a torch.Tensor, got list"),
        ({"margins": ZERO[0]}, r"margins: expected 2 dimensions, got 1"),
        ({"margins": ZERO[:2]}, r"margins: expected shape \[3, 3\], got \[2, 3\]"),
        ({"margins": torch.zeros(4, 4)}, r"margins: expected shape \[3, 3\], got \[4, 4\]"),
        ({"margins": ZERO.int()}, r"margins: expected float64, float32"),
        ({"margins": None}, r"margins: expected a torch.Tensor, got NoneType"),
        ({"scale": torch.ones(3)}, r"scale: expected 4 values, one a latent, got 3"),
        ({"scale": torch.ones(4, 1)}, r"scale: expected 1 dimension, got 2"),
        ({"scale": torch.ones(4).int()}, r"scale: expected float64, float32"),
        ({"scale": [1.0, 1.0, 1.0, 1.0]}, r"scale: expected a torch.Tensor, got list"),
        ({"classes": [0, 3]}, r"classes: expected indices from 0 to 2, got 3 at \[1\]"),
        ({"classes": [-1]}, r"classes: expected indices from 0 to 2, got -1 at \[0\]"),
        ({"classes": [0.5]}, r"classes: expected int64, got float32"),
        ({"classes": torch.tensor([1], dtype=torch.int32)}, r"classes: expected int64"),
        ({"classes": torch.tensor([True, False])}, r"classes: expected int64"),
        ({"classes": 1}, r"classes: expected 1 dimension, got 0"),
        ({"classes": [[1]]}, r"classes: expected 1 dimension, got 2"),
        ({"classes": "a"}, r"classes: expected class indices, got 'a'; pass a list of integers"),
        ({"classes": [None]}, r"classes: expected class indices, got \[None\]; pass"),
        ({"settings": None}, r"settings: expected SolverSettings, got NoneType; pass"),
        ({"settings": {}}, r"settings: expected SolverSettings, got dict; pass"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    complete: dict[str, object] = {"weight": EYE, "margins": ZERO, **arguments}
    with pytest.raises(InputError, match=rf"^minimal_perturbation: {message}"):
        ops.minimal_perturbation(**complete)  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("position", [(0, 0), (1, 2), (2, 1)])
@pytest.mark.parametrize("argument", ["weight", "margins"])
def test_non_finite_matrices(argument: str, position: tuple[int, int], bad: float) -> None:
    inputs = {"weight": EYE, "margins": ZERO}
    inputs[argument] = with_value(inputs[argument], position, bad)
    where = rf"at \[{position[0]}, {position[1]}\]"
    with pytest.raises(InputError, match=f"{argument}: expected finite values, .* {where}"):
        ops.minimal_perturbation(**inputs)


@pytest.mark.parametrize("bad", [0.0, -0.0, -1.0, torch.nan, torch.inf])
@pytest.mark.parametrize("at", [0, 3])
def test_scales_that_are_no_metric(at: int, bad: float) -> None:
    scale = with_value(torch.ones(4), (at,), bad)
    with pytest.raises(InputError, match=rf"scale: expected positive finite .* at \[{at}\]"):
        ops.minimal_perturbation(EYE, ZERO, scale=scale)


@pytest.mark.parametrize(
    ("settings", "message"),
    [((bad, 0), r"tolerance: expected a number between 0 and 1") for bad in (0.0, 1.0, -1.0)]
    + [((bad, 0), r"tolerance: expected a number") for bad in (math.inf, math.nan)]
    + [((1e-9, -1), r"max_iterations: expected 0 \(automatic\) or more, got -1")],
)
def test_the_bare_operator_checks_its_settings(settings: tuple[float, int], message: str) -> None:
    with pytest.raises(RuntimeError, match=f"minimal_perturbation: {message}"):
        torch.ops.tacext.minimal_perturbation(EYE, ZERO, None, None, *settings, True)


# ---- torch integration --------------------------------------------------------------------------


def test_opcheck() -> None:
    head = make_head("random", 6, 8)
    weight, margins = torch.tensor(head.weight), torch.tensor(head.margins)
    operator = torch.ops.tacext.minimal_perturbation.default
    torch.library.opcheck(operator, (weight, margins))
    scale, classes = torch.full((8,), 2.0), torch.tensor([1, 4])
    torch.library.opcheck(operator, (weight.float(), margins, scale, classes, 1e-9, 0, False))


def test_compiles_without_a_graph_break() -> None:
    def norms(weight: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        margins = torch.ops.tacext.pairwise_margin_max(logits)
        return torch.ops.tacext.minimal_perturbation(weight, margins)[1] * 2

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 8, generator=generator)
    logits = torch.randn(50, 6, generator=generator)
    compiled = torch.compile(norms, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(weight, logits), norms(weight, logits))


# ---- a large head -------------------------------------------------------------------------------


def test_a_thousand_classes_within_a_gibibyte() -> None:
    measured = peak_memory.measure(
        setup="""
generator = torch.Generator().manual_seed(0)
weight = torch.empty(1000, 2048).normal_(generator=generator) / 45
logits = torch.empty(10_000, 1000).normal_(generator=generator)
ops.minimal_perturbation(weight[:3], torch.zeros(3, 3))
""",
        measured="""
margins = ops.pairwise_margin_max(logits)
result = ops.minimal_perturbation(weight, margins)
""",
        report="{'certificate': result.certificate, 'solved': int((result.status == 0).sum())}",
    )
    assert measured["solved"] == 1000
    assert measured["certificate"] <= TOLERANCE
    assert measured["extra"] < 2**30
