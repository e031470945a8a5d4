"""What may depend on what: the core knows no torch, the kernels know no torch, features know ops."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "python" / "tacext"
pytestmark = pytest.mark.skipif(not (ROOT / "cpp").is_dir(), reason="needs the source tree")
NATIVE_SUFFIXES = {".h", ".cpp", ".cu", ".cuh"}


def native_files(folder: str) -> list[Path]:
    files = sorted(p for p in (ROOT / folder).rglob("*") if p.suffix in NATIVE_SUFFIXES)
    assert files, f"no sources in {folder}: the test looks in the wrong place"
    return files


def included(file: Path) -> set[str]:
    return set(re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', file.read_text(), re.MULTILINE))


def matching(folder: str, pattern: str, exempt: str = "") -> list[str]:
    return [
        f"{file.relative_to(ROOT)} includes {header}"
        for file in native_files(folder)
        if file.name != exempt
        for header in sorted(included(file))
        if re.match(pattern, header)
    ]


TORCH = r"(torch|ATen|c10|caffe2)/"
PYTHON = r"(pybind11/|Python\.h|pyconfig\.h|numpy/)"


def test_the_core_knows_neither_torch_nor_python() -> None:
    assert matching("cpp/core", f"{TORCH}|{PYTHON}") == []


def test_the_glue_of_the_operators_knows_no_python() -> None:
    assert matching("cpp/torch", PYTHON, exempt="bindings.cpp") == []


def test_only_stable_headers_of_torch_are_used() -> None:
    unstable = r"torch/(?!csrc/stable/|headeronly/|csrc/inductor/aoti_torch/c/)|ATen/|c10/"
    assert matching("cpp/torch", unstable) == []


def test_the_kernels_know_neither_torch_nor_python() -> None:
    assert matching("cuda", f"{TORCH}|{PYTHON}") == []


def test_the_solver_loop_of_the_kernels_knows_no_cuda() -> None:
    for name in ("active_set_block.cuh", "certificate_block.cuh"):
        text = (ROOT / "cuda" / name).read_text()
        assert not re.search(r"cuda_runtime|__syncthreads|threadIdx|blockIdx|__shfl", text), name


# ---- Python ---------------------------------------------------------------------------------------


def module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def python_files() -> list[Path]:
    return sorted([*PACKAGE.rglob("*.py"), PACKAGE / "__init__.pyi"])  # names that load lazily


def imported(source: str, module: str, is_package: bool) -> Iterator[str]:
    """The modules of tacext that the source imports, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("tacext"))
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            if base.split(".")[0] != "tacext":
                continue
            for alias in node.names:  # `from . import ops` names a module, `from .ops import x` not
                inner = PACKAGE.parent.joinpath(*base.split("."), alias.name)
                is_module = inner.with_suffix(".py").exists() or inner.is_dir()
                yield f"{base}.{alias.name}" if is_module or alias.name == "_core" else base


def imports_of(file: Path) -> set[str]:
    source = file.read_text(encoding="utf-8")
    return set(imported(source, module_name(file), file.stem == "__init__"))


def importers() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for file in python_files():
        found.setdefault(module_name(file), set()).update(imports_of(file))
    return found


def is_cli(module: str) -> bool:
    return module.startswith("tacext.cli") or module == "tacext.__main__"


def test_only_ops_touches_the_native_library() -> None:
    users = {
        module
        for module, names in importers().items()
        if any(name == "tacext._core" or name.startswith("tacext._core.") for name in names)
    }
    assert users == {"tacext.ops"}


def test_no_file_reaches_the_operators_around_ops() -> None:
    around = [
        str(file.relative_to(ROOT))
        for file in python_files()
        if file != PACKAGE / "ops.py"
        and re.search(r"torch\.ops\.tacext", file.read_text(encoding="utf-8"))
    ]
    assert around == []


def test_ops_imports_nothing_but_the_native_library_and_errors() -> None:
    parts = {"tacext.tensor_checks", "tacext.fake_kernels"}
    assert imports_of(PACKAGE / "ops.py") <= {"tacext._core", "tacext.errors"} | parts
    for part in parts:
        file = PACKAGE / f"{part.removeprefix('tacext.')}.py"
        assert imports_of(file) <= {"tacext.errors", "tacext.tensor_checks"}


def test_errors_import_nothing_of_tacext() -> None:
    assert imports_of(PACKAGE / "errors.py") == set()


def test_only_the_command_line_imports_the_command_line() -> None:
    wrong = {
        module: sorted(names)
        for module, names in importers().items()
        if not is_cli(module) and any(is_cli(name) for name in names)
    }
    assert wrong == {}


@pytest.mark.parametrize(
    ("source", "module", "is_package", "found"),
    [
        ("from . import _core", "tacext.scanning", False, {"tacext._core"}),
        ("from ._core import Status", "tacext.ops", False, {"tacext._core"}),
        ("from .. import _core", "tacext.cli.scan", False, {"tacext._core"}),
        ("from tacext import _core", "tacext.ops", False, {"tacext._core"}),
        ("import tacext._core as c", "tacext.ops", False, {"tacext._core"}),
        ("from . import ops", "tacext", True, {"tacext.ops"}),
        ("def f():\n    from ..ops import build_info", "tacext.cli.x", False, {"tacext.ops"}),
        ("import torch\nfrom torch import nn", "tacext.ops", False, set()),
    ],
)
def test_the_import_reader_sees(
    source: str, module: str, is_package: bool, found: set[str]
) -> None:
    assert set(imported(source, module, is_package)) == found
