#!/usr/bin/env bash
# repair_wheel.sh WHEEL FOLDER: tags a wheel with the platforms that it runs on and puts it into FOLDER.
# torch's libraries and its OpenMP stay where torch has them.
set -euo pipefail
auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --exclude libgomp.so.1 --wheel-dir "$2" "$1"
