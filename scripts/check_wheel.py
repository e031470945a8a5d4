"""Checks what is in a wheel.

    check_wheel.py WHEEL

Its tag, size, files, the symbols that its libraries want from others, and where they look for them.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

LARGEST = 8 << 20  # bytes; with CUDA kernels, too
LIBRARIES = ("tacext/lib/libtacext.so", "tacext/lib/libtacext_core.so")
WANTED = (
    *LIBRARIES,
    "tacext/__init__.py",
    "tacext/__init__.pyi",  # read at import, which fails without it
    "tacext/py.typed",
    "tacext/_core.pyi",
    "tacext/calibration.json",
    "tacext/schemas/guard-1.json",
    "tacext/include/tacext/tacext.h",
    "tacext/include/tacext/guard.h",
    "tacext/lib/cmake/tacext/tacextConfig.cmake",
)
ALLOWED = (".py", ".pyi", ".json", ".so", ".h", ".cmake", "py.typed")
# torch's stable interface, and nothing else of torch.
TORCH = re.compile(r"^(aoti_torch_|torch_)")
SYSTEM = re.compile(
    r"@(GLIBC|GLIBCXX|CXXABI|GCC)_|^_ITM_|^__gmon_start__|^__cxa_finalize|^_ZNK?St|^_Py|^Py"
)


def run(*command: object) -> str:
    """Standard output of a command."""
    return subprocess.run(
        list(map(str, command)), check=True, capture_output=True, text=True
    ).stdout


def symbols(library: Path, *options: str) -> set[str]:
    """Names in the dynamic symbol table."""
    return {line.split()[-1] for line in run("nm", "-D", *options, library).splitlines() if line}


def problems(wheel: Path) -> list[str]:
    """What is wrong with it; nothing, if all is well."""
    found = []
    if "manylinux" not in wheel.name or not re.search(r"cp3\d+-cp3\d+", wheel.name):
        found.append(f"tag: {wheel.name}")
    if wheel.stat().st_size > LARGEST:
        found.append(f"size: {wheel.stat().st_size} bytes")
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory() as folder:
        names = archive.namelist()
        found += [f"missing: {name}" for name in WANTED if name not in names]
        inside = [n for n in names if ".dist-info/" not in n and not n.endswith("/")]
        found += [
            f"stray: {n}" for n in inside if not n.startswith("tacext/") or not n.endswith(ALLOWED)
        ]
        found += [] if any(n.endswith("/LICENSE") for n in names) else ["missing: LICENSE"]
        archive.extractall(folder)
        objects = [Path(folder) / n for n in names if n.endswith(".so")]
        own = set[str]().union(*(symbols(o, "--defined-only") for o in objects))
        own = {name.split("@")[0] for name in own}
        for library in objects:
            wanted = symbols(library, "--undefined-only")
            foreign = {s for s in wanted if not SYSTEM.search(s) and s.split("@")[0] not in own}
            allowed = {s for s in foreign if TORCH.match(s)}
            if library.name == "libtacext_core.so":
                allowed = set()
            found += [f"{library.name} wants {s}" for s in sorted(foreign - allowed)]
            path = re.findall(r"R(?:UN)?PATH.*\[(.*)\]", run("readelf", "-d", library))
            found += [f"{library.name} looks in {p}" for p in path if not p.startswith("$ORIGIN")]
    return found


def main() -> None:
    """Prints the problems, and exits with 1 where there are any."""
    wheel = Path(sys.argv[1])
    found = problems(wheel)
    print("\n".join(found) or f"{wheel.name}: {wheel.stat().st_size / 2**20:.2f} MiB, all is well")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
