from __future__ import annotations

import ast
import dataclasses
import enum
import importlib.metadata
import pickle
import re
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

import tacext
from tacext import DependencyError, ops
from tacext.ops import SolverSettings, Status


def test_fields() -> None:
    info = ops.build_info()
    assert info.version == tacext.__version__ == importlib.metadata.version("tacext")
    assert info.torch == torch.__version__
    # The binary was built against a torch of the range that it supports.
    assert re.match(r"2\.\d+\.\d+", info.built_with_torch)
    assert info.simd in ("x86-64-v4", "x86-64-v3", "baseline")
    assert isinstance(info.cuda_kernels, bool)
    assert info.cuda_devices >= 0
    if not info.cuda_kernels:
        assert info.cuda_devices == 0
    elif torch.cuda.is_available():
        assert info.cuda_devices == torch.cuda.device_count()
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.version = "0"  # type: ignore[misc]


def test_status_is_an_int_enum() -> None:
    assert issubclass(Status, enum.IntEnum)
    assert [(s.name, int(s)) for s in Status] == [
        ("OPTIMAL", 0),
        ("UNREACHABLE", 1),
        ("ITERATION_LIMIT", 2),
    ]


def test_solver_settings_compare_hash_and_pickle() -> None:
    settings = SolverSettings(tolerance=1e-7)
    assert settings == SolverSettings(tolerance=1e-7)
    assert settings != SolverSettings()
    assert settings != 3
    assert settings == mock.ANY  # the other type is asked, too
    assert settings is not None
    assert settings != None
    assert len({settings, SolverSettings(tolerance=1e-7), SolverSettings()}) == 2
    assert pickle.loads(pickle.dumps(settings)) == settings


def modules_after(code: str) -> set[str]:
    """What a fresh interpreter has imported after that."""
    code = f"import sys, torch, tacext; {code}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return set(found.stdout.split())


def test_nothing_is_imported_that_only_some_need() -> None:
    heavy = {"scipy.stats", "scipy.optimize", "matplotlib", "sklearn", "click", "onnx", "rich"}
    assert not heavy & modules_after("tacext.scan, tacext.repair, tacext.Guard, tacext.judge")
    own = {name for name in modules_after("0") if name.startswith("tacext.")}
    assert not own & {"tacext.scanning", "tacext.repairing", "tacext.guard", "tacext.attacks"}
    assert not {"tacext.repairing", "tacext.attacks"} & modules_after("tacext.Guard")


def test_every_public_name_is_found_where_the_stub_says() -> None:
    stub = ast.parse(Path(tacext.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    public = next(ast.literal_eval(n.value) for n in stub.body if isinstance(n, ast.Assign))
    assert sorted(public) == sorted(tacext.__all__)
    for name in public:
        assert getattr(tacext, name) is not None
    assert {"__doc__", "__file__", *public} <= set(dir(tacext))
    starred: dict[str, object] = {}
    exec("from tacext import *", starred)  # noqa: S102
    assert set(public) <= set(starred)
    with pytest.raises(AttributeError, match="scann"):
        _ = tacext.scann  # type: ignore[attr-defined]


def test_the_range_of_torch_is_said_once_and_again_alike() -> None:
    wanted = importlib.metadata.requires("tacext") or []
    [said] = [line.replace(" ", "") for line in wanted if re.match(r"torch\b", line)]
    oldest, newest = re.findall(r"\d+\.\d+", ops._SUPPORTED)
    assert sorted(said.removeprefix("torch").split(",")) == [f"<{newest}", f">={oldest}"]
    assert f"torch>={oldest},<{newest}" == ops._SUPPORTED
    assert ".".join(map(str, ops.OLDEST_TORCH)) == oldest
    backend = Path(__file__).parents[1] / "build_backend" / "tacext_build_backend.py"
    if backend.exists():  # in the source tree
        pair = tuple(tuple(map(int, version.split("."))) for version in (oldest, newest))
        assert f"SUPPORTED = {pair}" in backend.read_text(encoding="utf-8")


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cpu", "2.9.0a0+git123"])
def test_a_torch_that_is_too_old_is_refused_with_a_way_out(version: str) -> None:
    with pytest.raises(
        DependencyError, match=r"torch: expected version 2.11 or newer, got .*pip install"
    ):
        ops._check_torch(version)
    for good in ("2.11.0", "2.13.0+cpu", "2.14.1+cu130", "3.0"):
        ops._check_torch(good)
