"""Fixtures of every test.

Tests that take `device` run on the CPU and, where the build has CUDA kernels and torch finds a GPU,
on it too. On a machine that must have one, set TACEXT_REQUIRE_CUDA=1: a GPU or a build that is
missing then fails these tests, where it would otherwise narrow them to the CPU without a word.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from command_line import ARCH, run
from digits import digit_case
from tacext import ops, save_weights

settings.register_profile("tacext", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("tacext")

# The models of the tests are so small that threads would mostly wait for one another; what must hold
# at any number of threads has tests that set it.
torch.set_num_threads(1)


# torch.compile keeps code between runs and does not tell apart what was compiled for vectors of
# another width, which then crashes.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"tacext-inductor-{torch.backends.cpu.get_cpu_capability()}"),
)


def pytest_configure(config: pytest.Config) -> None:
    """Before pytest-xdist starts its processes: one thread in each and in what the tests start.

    Two threads that wait for each other while another process has the core are slower by far.
    """
    if config.getoption("numprocesses", None):
        os.environ.setdefault("OMP_NUM_THREADS", "1")


HAS_CUDA = ops.build_info().cuda_kernels and torch.cuda.is_available()
REQUIRE_CUDA = os.environ.get("TACEXT_REQUIRE_CUDA") == "1"


@pytest.fixture(params=["cpu", "cuda"] if HAS_CUDA or REQUIRE_CUDA else ["cpu"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not HAS_CUDA:
        pytest.fail(
            "TACEXT_REQUIRE_CUDA=1, but "
            + ("torch finds no GPU" if ops.build_info().cuda_kernels else "no CUDA kernels built")
        )
    return str(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """No test may depend on the random numbers that another one drew."""
    torch.manual_seed(0)


@pytest.fixture
def restore_threads() -> Iterator[None]:
    """For tests that change torch's number of threads."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the backdoored and the clean digit model, and the defender's images."""
    folder = tmp_path_factory.mktemp("cli")
    case = digit_case()
    save_weights(case.backdoored, folder / "backdoored.safetensors")
    save_weights(case.clean, folder / "clean.safetensors")
    torch.save(case.backdoored.state_dict(), folder / "backdoored.pt")
    images, labels = case.data.defender
    test_images, test_labels = case.data.test
    np.savez(
        folder / "digits.npz",
        x=images.numpy(),
        y=labels.numpy(),
        x_test=test_images.numpy(),
        y_test=test_labels.numpy(),
    )
    return folder


@pytest.fixture
def scan_command(folder: Path) -> functools.partial[int]:
    return functools.partial(
        run, "scan", folder / "backdoored.safetensors", "--arch", ARCH, "--data",
        folder / "digits.npz",
    )  # fmt: skip
