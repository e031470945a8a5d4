#!/usr/bin/env bash
# Puts include/ and lib/ of ONNX Runtime into a folder, for examples/cpp/guard_onnx.cpp:
#
#   scripts/fetch_onnxruntime.sh FOLDER
#
# Its Python wheels carry no headers. Debian packages them since trixie; the library for x86-64, of a
# version that also speaks their interface, comes with the package for Node. Needs apt and npm.
set -euo pipefail
folder=$(realpath -m "$1")
mkdir -p "$folder/include" "$folder/lib" "$folder/work/lists/partial" "$folder/work/cache/archives/partial"
cd "$folder/work"

# The machine's own mirror and keys, but of the release that has the package.
for source in /etc/apt/sources.list /etc/apt/sources.list.d/debian.sources; do
  [ ! -f "$source" ] || sed 's/bookworm/trixie/g' "$source" >"$(basename "$source")"
done
touch sources.list
mkdir -p parts
[ ! -f debian.sources ] || mv debian.sources parts/
own=(-o "Dir::Etc::SourceList=$PWD/sources.list" -o "Dir::Etc::SourceParts=$PWD/parts"
  -o "Dir::State::lists=$PWD/lists" -o "Dir::Cache=$PWD/cache" -o "APT::Sandbox::User=root")
apt-get -qq "${own[@]}" update
apt-get -qq "${own[@]}" download libonnxruntime-dev
dpkg-deb -x libonnxruntime-dev_*.deb .
cp usr/include/onnxruntime/*.h "$folder/include/"

npm pack --silent --cache "$PWD/npm" onnxruntime-node@1.30.0 >/dev/null
tar -xzf onnxruntime-node-*.tgz --wildcards '*/linux/x64/libonnxruntime.so*'
find package -name 'libonnxruntime.so*' -exec cp {} "$folder/lib/" \;
cd "$folder"
rm -r work
[ -f include/onnxruntime_cxx_api.h ] && ls lib/libonnxruntime.so* >/dev/null
