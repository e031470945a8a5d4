"""The parts of benchmarks/ that have logic of their own; solvers may be missing here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tacext import ops

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import bench_minimal_perturbation
import bench_pairwise_margin_max
import bench_pairwise_margin_quantile
import bench_scan_stages
import ceiling
import machine
import problems
import solvers

CASES = ("20 x 30 random", "40 x 64 collapsed", "30 x 20 rank-deficient", "80 x 64 low-rank")


# ---- problems ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_a_case_is_the_same_problem_every_time_and_can_be_solved(case: str) -> None:
    one, two = problems.make(case), problems.make(case)
    assert torch.equal(one.weight, two.weight)
    assert torch.equal(one.logits, two.logits)
    found = ops.minimal_perturbation(one.weight, one.margins())
    assert bool((found.status == ops.Status.OPTIMAL).all())


@pytest.mark.parametrize("family", sorted(problems.FAMILIES))
def test_another_seed_is_another_problem(family: str) -> None:
    size = (30, 20) if family == "rank-deficient" else (20, 30)
    make = problems.FAMILIES[family]
    assert not torch.equal(make(*size, seed=0).weight, make(*size, seed=1).weight)


def test_most_constraints_of_a_collapsed_head_are_active() -> None:
    problem = problems.make("40 x 64 collapsed")
    active = ops.minimal_perturbation(problem.weight, problem.margins()).active
    assert float(active.double().mean()) > 0.75 * 39
    ordinary = problems.make("40 x 64 random")
    active = ops.minimal_perturbation(ordinary.weight, ordinary.margins()).active
    assert float(active.double().mean()) < 0.5 * 39


def test_ranks_are_as_the_families_say() -> None:
    assert int(torch.linalg.matrix_rank(problems.make("80 x 64 low-rank").weight)) == 16
    with pytest.raises(ValueError, match="rank-deficient: expected latents < 29"):
        problems.make("30 x 29 rank-deficient")
    with pytest.raises(ValueError, match="collapsed: expected latents >= 30"):
        problems.make("30 x 29 collapsed")


def test_heads_are_read_from_logits_or_from_latents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, latents, bias = torch.randn(4, 6), torch.randn(9, 6), torch.randn(4)
    logits = latents @ weight.t() + bias
    save_file({"weight": weight, "logits": logits}, tmp_path / "a.safetensors")
    save_file({"weight": weight, "latents": latents, "bias": bias}, tmp_path / "b.safetensors")
    save_file({"weight": weight}, tmp_path / "c.safetensors")
    monkeypatch.delenv(problems.HEADS_VARIABLE, raising=False)
    assert problems.head_cases() == []
    monkeypatch.setenv(problems.HEADS_VARIABLE, str(tmp_path))
    assert problems.head_cases() == ["head a", "head b", "head c"]
    assert torch.equal(problems.make("head a").logits, logits)
    torch.testing.assert_close(problems.make("head b").logits, logits)
    with pytest.raises(ValueError, match="expected logits or latents"):
        problems.make("head c")


# ---- solvers -------------------------------------------------------------------------------------


def posed(case: str, k: int) -> tuple[solvers.ClassProblem, float]:
    problem = problems.make(case)
    margins = problem.margins()
    norm = float(ops.minimal_perturbation(problem.weight, margins).norm[k])
    weight = problem.weight.numpy()
    return solvers.class_problem(weight, weight @ weight.T, margins.numpy(), k), norm


def test_a_class_problem_is_the_one_that_tacext_solves() -> None:
    problem = problems.make("20 x 30 random")
    margins = problem.margins()
    found = ops.minimal_perturbation(problem.weight, margins)
    one, _ = posed("20 x 30 random", 7)
    s = found.perturbation[7].numpy()
    assert (one.rows @ s >= one.margins - 1e-9).all()
    np.testing.assert_allclose(one.gram, one.rows @ one.rows.T, atol=1e-12)
    multipliers = np.delete(found.multipliers[7].numpy(), 7)
    assert one.norm_of(multipliers) == pytest.approx(float(found.norm[7]), rel=1e-12)


@pytest.mark.parametrize("solver", solvers.SOLVERS, ids=lambda solver: solver.label)
@pytest.mark.parametrize("case", ["20 x 30 random", "12 x 16 collapsed"])
def test_every_form_of_every_solver_finds_the_same_norm(solver: solvers.Solver, case: str) -> None:
    if not solvers.is_installed(solver.name):
        pytest.skip(f"{solver.module} is not installed")
    problem, norm = posed(case, 3)
    found, seconds = solver.norm(problem, 1e-10)
    assert found == pytest.approx(norm, rel=1e-7)
    assert seconds > 0


def test_the_faster_form_that_is_accurate_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    def form(name: str, error: float, seconds: float) -> solvers.Solver:
        class Fixed(solvers.Solver):
            def norm(self, problem: solvers.ClassProblem, tolerance: float) -> tuple[float, float]:
                return 2 * (1 + error), seconds

        return Fixed("it", "it", name, lambda problem, tolerance: lambda: 0.0)

    problem, _ = posed("20 x 30 random", 0)
    monkeypatch.setattr(
        solvers, "SOLVERS", (form("slow", 0, 2.0), form("good", 0, 1.0), form("rough", 1e-3, 0.1))
    )
    choice = solvers.choose("it", problem, 2.0, 1e-8)
    assert choice.solver.form == "good"
    assert choice.compared == "slow 2x, rough misses it"


def test_what_is_not_installed_is_listed_as_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solvers, "is_installed", lambda name: False)
    rows = bench_minimal_perturbation.run("10 x 16 random", "cpu", 0.001)
    skipped = {row.form: row for row in rows if row.seconds is None}
    assert set(skipped) == set(solvers.NAMES)
    assert skipped["PIQP"].note == "skipped: not installed"
    assert rows[0].form == "tacext"
    assert rows[0].error is not None
    assert rows[0].error <= 1e-9


# ---- margins, ceiling, stages, machine -----------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("samples", "classes"), [(1, 1), (4, 3), (13, 7), (5, 7)])
def test_chunks_compute_the_margins(samples: int, classes: int, transposed: bool) -> None:
    logits = torch.randn(13, 7, generator=torch.Generator().manual_seed(0))
    wanted = ops.pairwise_margin_max(logits)
    chunk = bench_pairwise_margin_max._Chunk(samples, classes, transposed)
    assert torch.equal(chunk.torch(logits), wanted)
    assert torch.equal(chunk.numpy(logits.numpy()), wanted)


@pytest.mark.parametrize("name", bench_pairwise_margin_quantile._NAMES)
@pytest.mark.parametrize("classes", [1, 4, 8])
def test_selections_compute_the_quantile(name: str, classes: int) -> None:
    logits = torch.randn(31, 7, generator=torch.Generator().manual_seed(0))
    for quantile in (0.5, 0.9, 1.0):
        keep = ops.differences_above(31, quantile)
        found = bench_pairwise_margin_quantile.Selection(name, classes).all(logits.t(), keep)
        assert torch.equal(found, ops.pairwise_margin_quantile(logits, quantile))


def test_every_quantile_form_can_be_measured() -> None:
    case = bench_pairwise_margin_quantile.QUICK_CASES[0]
    rows = bench_pairwise_margin_quantile.run(case, "cpu", 0.001)
    names = {form.name for form in bench_pairwise_margin_quantile.forms(case, "cpu")}
    assert rows[0].form == "tacext"
    assert {row.form for row in rows} <= names
    assert {row.form.split(",")[0] for row in rows[1:]} >= {"torch topk", "numpy partition"}


def test_a_missing_compiler_is_listed_as_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceiling.shutil, "which", lambda name: None)
    ceiling.measure.cache_clear()
    try:
        (row,) = ceiling.rows("pairwise_margin_max", "ceiling", "cpu")
    finally:
        ceiling.measure.cache_clear()
    assert row.note == "skipped: no C++ compiler found"


def test_the_ceiling_is_measured() -> None:
    found = ceiling.of_one_core(seconds=0.02)
    if found.missing:
        pytest.skip(found.missing)
    assert found.float32 is not None
    assert found.float32 > 1e8
    assert found.rates["int8_sub_max"] > found.rates["int8_sub_max_min"] > 1e8


def test_a_scan_is_shared_out() -> None:
    rows = bench_scan_stages.run(bench_scan_stages.QUICK_CASES[0], "cpu", 0.0)
    seconds = {row.form: row.seconds for row in rows}
    parts = ("margins, moments", "solve", "test", "all between")
    assert all(seconds[part] > 0 for part in parts)
    assert seconds["beyond the forward"] < 0.2 * seconds["forward pass"]


def test_results_are_named_by_the_processor() -> None:
    text = (
        "processor : 0\nvendor_id : AuthenticAMD\ncpu family : 25\nmodel : 17\n"
        "model name : AMD EPYC\n\nprocessor : 1\nmodel : 99\n"
    )
    fields = machine.read_cpuinfo(text)
    assert machine.architecture_of(fields) == "zen4"
    described = machine.Machine("AMD EPYC", "zen4", "avx512", "cpu", 2, "2", "0", "v4", "3")
    assert described.slug == "amd-epyc-zen4-avx512-2-threads"
    intel = machine.Machine(
        "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "", "avx512", "cpu", 8, "2", "0", "v4", "3"
    )
    assert intel.slug == "intel-xeon-platinum-8481c-avx512-8-threads"
    assert machine.architecture_of(machine.read_cpuinfo("vendor_id : GenuineIntel\n")) == ""


def test_a_run_writes_its_table_and_json(tmp_path: Path) -> None:
    file = tmp_path / "results.json"
    command = [
        sys.executable, str(BENCHMARKS / "run.py"), "minimal_perturbation",
        "--only", "10 x", "--quick", "--budget", "0.001", "--json", str(file),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "10 x 128 random" in done.stdout
    report = json.loads(file.read_text())
    assert report["machine"]["threads"] >= 1
    assert {row["case"] for row in report["rows"]} == {"10 x 128 random"}
    assert report["rows"][0]["form"] == "tacext"
