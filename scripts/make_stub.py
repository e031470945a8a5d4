"""Writes python/tacext/_core.pyi from the built module; with --check it only tells whether that is due."""

from __future__ import annotations

import argparse
import ast
import enum
import subprocess
import sys
import tempfile
from pathlib import Path

try:
    import tacext  # noqa: F401  (with torch, in whose libraries the native one finds its symbols)
    from tacext import _core
except ImportError as error:
    raise SystemExit(
        f"make_stub.py: {error}; build first: pip install -e . --no-build-isolation"
    ) from error

STUB = Path(__file__).resolve().parents[1] / "python" / "tacext" / "_core.pyi"

# What copy and pickle call, and what enum.Enum brings along, concerns nobody who reads types.
_LEFT_OUT = {"__getstate__", "__setstate__", "__new__", "__format__"}
# pybind11 takes what converts, and says so in words that change from version to version. Types are
# to say what is meant: no 1.5 iterations.
_MEANT = {"SupportsFloat": "float", "SupportsInt": "int"}


class _Tidy(ast.NodeTransformer):
    """Leaves out what tells nothing, and what differs from build to build."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef | None:
        if node.name in _LEFT_OUT:
            return None
        for argument in (*node.args.args, *node.args.kwonlyargs):
            known = "" if argument.annotation is None else ast.unparse(argument.annotation)
            for converted, meant in _MEANT.items():
                if converted in known:
                    argument.annotation = ast.Name(meant)
        if node.name == "__eq__":  # other types are no error, but unequal
            node.args.args[1] = ast.arg("other", ast.Name("object"))
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AnnAssign | None:
        if ast.unparse(node.target) == "__all__":  # stubgen's own: the module has none
            return None
        if ast.unparse(node.target) == "torch_version":
            node.value = None
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.ClassDef:
        native = getattr(_core, node.name)
        if issubclass(native, enum.Enum):  # members, and what they are worth
            members = [ast.parse(f"{m.name} = {m.value!r}").body[0] for m in native]
            node.body = [*node.body[:1], *members]
            return node
        self.generic_visit(node)
        return node


def generated() -> str:
    """The stub as it should be."""
    with tempfile.TemporaryDirectory() as folder:
        stubgen = [sys.executable, "-m", "pybind11_stubgen", "tacext._core", "--output-dir", folder]
        done = subprocess.run(stubgen, check=False, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"pybind11-stubgen: {done.stderr}")
        text = (Path(folder) / "tacext" / "_core.pyi").read_text(encoding="utf-8")
    text = ast.unparse(_Tidy().visit(ast.parse(text)))
    for command in (
        ["check", "--fix", "--unsafe-fixes", "--quiet", "--exit-zero"],
        ["format", "--quiet"],
    ):
        text = subprocess.run(
            ["ruff", *command, "--stdin-filename", str(STUB), "-"],
            input=text,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    return text


def main() -> int:
    """Zero where the stub is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    text = generated()
    if not check:
        STUB.write_text(text, encoding="utf-8")
    elif STUB.read_text(encoding="utf-8") != text:
        print(f"{STUB}: not what the module has; run python scripts/make_stub.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
