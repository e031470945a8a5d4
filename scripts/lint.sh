#!/usr/bin/env bash
# Checks format, lint and types; with --fix it formats and mends what it can first.
set -euo pipefail
cd "$(dirname "$0")/.."
mapfile -t native < <(git ls-files 'cpp/*.cpp' 'cpp/*.h' 'cpp/*.inl' 'cuda/*' 'tests/cpp/*.c*' 'tests/cpp/*.h' 'examples/*.c*' | grep -E '\.(c|cpp|h|inl|cu|cuh)$')

if [ "${1:-}" = "--fix" ]; then
  python scripts/make_stub.py
  ruff format .
  ruff check --fix .
  clang-format -i "${native[@]}"
fi
ruff format --check .
ruff check .
mypy
clang-format --dry-run --Werror "${native[@]}"
python scripts/make_stub.py --check # of the module as it is built
if git grep -n '@@[A-Z_]*@@' -- '*.md'; then
  echo "lint: a placeholder is left in the text" && exit 1
fi
echo "lint: all good"
