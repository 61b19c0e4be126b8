#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Puts Triton's perf_analyzer into .venv/perf and prints the command that runs it. Does nothing more the second time.
#
# The newest wheel whose perf_analyzer runs on glibc 2.36 (Debian 12) is that of tritonclient 2.51.0. It links libb64
# and the CUDA runtime; both lie, under other names, among the libraries of the nvidia-pytriton wheel.
set -euo pipefail
cd "$(dirname "$0")/.."
CLIENT=tritonclient==2.51.0
PYTRITON=nvidia-pytriton==0.7.0

say() { echo "setup_perf: $*" >&2; }
perf=$PWD/.venv/perf

if [[ ! -x $perf/run ]]; then
  [[ $(uname -m) == x86_64 ]] || { say "perf_analyzer exists for x86_64 only"; exit 1; }
  work=$(mktemp -d)
  trap 'rm -rf "$work"' EXIT
  fetch() {
    .venv/bin/python -m pip --disable-pip-version-check download --quiet --no-deps --dest "$work/wheels" "$1"
    .venv/bin/python -m zipfile -e "$work"/wheels/*.whl "$work/$2"
    rm -r "$work/wheels"
  }
  say "getting perf_analyzer from the wheel $CLIENT"
  fetch "$CLIENT" client
  mkdir -p "$work/perf/lib"
  cp "$work"/client/*.data/data/bin/perf_analyzer "$work/perf/"
  libraries=$(echo .venv/lib/python3*/site-packages/nvidia_pytriton.libs)
  if [[ ! -d $libraries ]]; then
    fetch "$PYTRITON" pytriton
    libraries=$work/pytriton/nvidia_pytriton.libs
  fi
  cp "$libraries"/libb64-*.so.0d "$work/perf/lib/libb64.so.0d"
  cp "$libraries"/libcudart-*.so.12.* "$work/perf/lib/libcudart.so.12"
  cat >"$work/perf/run" <<'RUN'
#!/usr/bin/env bash
here=$(dirname "$(readlink -f "$0")")
LD_LIBRARY_PATH=$here/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} exec "$here/perf_analyzer" "$@"
RUN
  chmod +x "$work/perf/run" "$work/perf/perf_analyzer"
  rm -rf "$perf"
  mv "$work/perf" "$perf"
  "$perf/run" --version >&2
fi
echo "$perf/run"
