from __future__ import annotations

import ast
import dataclasses
import enum
import importlib.metadata
import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tacext
from tacext import DependencyError, _core, ops
from tacext.ops import SolverSettings, Status

STUB = Path(tacext.__file__).with_name("_core.pyi")


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


# ---- the stub against the module ----------------------------------------------------------------


def stub_nodes() -> list[ast.stmt]:
    return [n for n in ast.parse(STUB.read_text()).body if not isinstance(n, ast.Import)]


def node_name(node: ast.stmt) -> str:
    if isinstance(node, ast.AnnAssign):
        assert isinstance(node.target, ast.Name)
        return node.target.id
    assert isinstance(node, ast.FunctionDef | ast.ClassDef)
    return node.name


def stub_parameters(function: ast.FunctionDef) -> list[str]:
    """Names in order, keyword-only ones after "*", with their defaults."""
    positional = [a.arg for a in function.args.args if a.arg != "self"]
    keywords = [
        f"{a.arg}={ast.literal_eval(d)}" if d is not None else a.arg
        for a, d in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
    ]
    return [*positional, *(["*", *keywords] if keywords else [])]


def native_parameters(function: object) -> list[str]:
    """The same from the first line of pybind11's docstring."""
    line = (inspect.getdoc(function) or "").splitlines()[0]
    found = re.fullmatch(r"\w+\((.*)\) -> .+", line)
    assert found, line
    parameters = []
    for text in filter(None, found[1].split(", ")):
        name, _, default = (part.strip() for part in text.partition("="))
        name = name.partition(":")[0]
        if name != "self":
            parameters.append(f"{name}={ast.literal_eval(default)}" if default else name)
    return parameters


def test_the_stub_lists_what_the_module_has() -> None:
    public = {name for name in dir(_core) if not name.startswith("_")}
    assert {node_name(node) for node in stub_nodes()} == public


@pytest.mark.parametrize("node", stub_nodes(), ids=node_name)
def test_the_stub_matches(node: ast.stmt) -> None:
    native = getattr(_core, node_name(node))
    if isinstance(node, ast.AnnAssign):
        assert ast.unparse(node.annotation) == type(native).__name__
    elif isinstance(node, ast.FunctionDef):
        assert stub_parameters(node) == native_parameters(native)
    elif isinstance(node, ast.ClassDef) and issubclass(native, enum.Enum):
        members = {
            ast.unparse(n.targets[0]): ast.literal_eval(n.value)
            for n in node.body
            if isinstance(n, ast.Assign)
        }
        assert members == {member.name: member.value for member in native}
    else:
        assert isinstance(node, ast.ClassDef)
        methods = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
        public = {name for name in vars(native) if not name.startswith("_")}
        assert {name for name in methods if not name.startswith("_")} == public
        assert stub_parameters(methods["__init__"]) == native_parameters(native.__init__)
        for name in public:
            assert isinstance(vars(native)[name], property), name


def test_solver_settings_compare_hash_and_pickle() -> None:
    settings = SolverSettings(tolerance=1e-7)
    assert settings == SolverSettings(tolerance=1e-7)
    assert settings != SolverSettings()
    assert settings != 3
    assert settings is not None
    assert settings != None
    assert len({settings, SolverSettings(tolerance=1e-7), SolverSettings()}) == 2
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_the_import_waits_for_nothing_that_only_some_need() -> None:
    code = (
        "import sys, torch, tacext; "
        "heavy = {'scipy.stats', 'scipy.optimize', 'matplotlib', 'sklearn', 'click', 'onnx', 'rich'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("version", ["2.10.1", "1.13.0+cpu", "2.9.0a0+git123"])
def test_a_torch_that_is_too_old_is_refused_with_a_way_out(version: str) -> None:
    with pytest.raises(
        DependencyError, match=r"torch: expected version 2.11 or newer, got .*pip install"
    ):
        ops._check_torch(version)
    for good in ("2.11.0", "2.13.0+cpu", "2.14.1+cu130", "3.0"):
        ops._check_torch(good)
