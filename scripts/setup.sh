#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes .venv: the packages of requirements.lock, this project, a tritonserver if the machine has none, and FlashInfer if
# it has an NVIDIA driver.
# Nothing outside .venv is changed. A second run with the same inputs returns at once. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTRITON=nvidia-pytriton==0.7.0
FLASHINFER=flashinfer-python==0.6.14
DRIVER=/proc/driver/nvidia/version
TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { echo "setup: $*" >&2; }
fail() { say "$*"; exit 1; }

stamp=.venv/.setup-$( (pwd && cat requirements.lock pyproject.toml "$0") | sha256sum | cut -c1-16)
[[ ! -e $stamp ]] || exit 0

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.10}; do
    # Tried and not only looked up: a version manager's shim may exist and not run.
    if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  fail "needs CPython 3.10, 3.11 or 3.12 (numpy 1.26, which this Triton's Python backend wants, has no newer one);" \
    "set PYTHON to its path"
}

# Unpacks the first of the Debian or Ubuntu packages that exists, without root and into .venv only.
from_debian() {
  local state=$PWD/.venv/debian package
  local apt=(apt-get -qq -o "Dir::State::lists=$state/lists" -o "Dir::Cache=$state/cache" -o APT::Sandbox::User=)
  command -v apt-get >/dev/null || fail "please install the equivalent of Debian's $1, and try again"
  mkdir -p "$state/lists/partial" "$state/cache/archives/partial" "$state/root"
  [[ -e $state/updated ]] || { "${apt[@]}" update >&2 && touch "$state/updated"; } || fail "apt-get cannot be reached"
  for package in "$@"; do
    if (cd "$state/cache" && "${apt[@]}" download "$package" 2>/dev/null); then
      dpkg-deb -x "$state/cache/$package"_*.deb "$state/root"
      return
    fi
  done
  fail "no package of $* can be downloaded; install one of them and try again"
}

make_environment() {
  say "creating .venv with $("$python" --version)"
  rm -rf .venv
  # Debian splits pip off into python3-venv, which a fresh machine lacks.
  if "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv .venv
  else
    "$python" -m venv --without-pip .venv
    from_debian python3-pip-whl
    local wheel
    wheel=$(echo .venv/debian/root/usr/share/python-wheels/pip-*.whl)
    .venv/bin/python "$wheel/pip" install --quiet pip
  fi
}

environment_works() {
  [[ $(.venv/bin/python -c 'import pip, sys; print(sys.prefix)' 2>/dev/null) == "$PWD/.venv" ]]
}

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@" --quiet; }

install_packages() {
  local torch=(torch -c requirements.lock)
  # PyPI's torch brings gigabytes of CUDA. Without an NVIDIA driver, the CPU build of the same version will do.
  if [[ ! -e $DRIVER ]] && .venv/bin/python - "$TORCH_CPU_INDEX" <<'PYTHON' 2>/dev/null; then
import sys, urllib.request
urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=3)
PYTHON
    torch+=(--extra-index-url "$TORCH_CPU_INDEX")
  fi
  pip install "$(grep '^pip==' requirements.lock)"
  say "installing torch"
  pip install "${torch[@]}"
  say "installing the other packages of requirements.lock"
  # The lock is complete; --no-deps keeps anything else out.
  pip install --no-deps -r requirements.lock
  PYTHONWARNINGS=ignore pip install --no-deps --no-build-isolation --editable .
}

install_flashinfer() {
  [[ -e $DRIVER ]] || return 0
  say "installing $FLASHINFER, since this machine has an NVIDIA driver"
  # Not in the lock: it brings libraries that only a GPU needs, and the lock holds back whatever both use.
  pip install -c requirements.lock "$FLASHINFER"
  command -v nvcc >/dev/null || [[ -x ${CUDA_HOME:-/usr/local/cuda}/bin/nvcc ]] ||
    say "no nvcc on PATH or in CUDA_HOME: FlashInfer will not be able to compile its kernels"
}

install_tritonserver() {
  if [[ -n ${TRITON_HOME:-} ]] || command -v tritonserver >/dev/null || [[ -x /opt/tritonserver/bin/tritonserver ]]; then
    say "using this machine's own tritonserver"
    return
  fi
  say "installing tritonserver from $PYTRITON"
  pip install --no-deps "$PYTRITON"
  # Its Python stub links libpython, which Debian packages apart from python3.
  if ! .venv/bin/python -c 'import sys; from multilora_backend import tritonserver as t; sys.exit(not t.libpython())'; then
    local minor
    minor=$(.venv/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    from_debian "libpython$minor" "libpython${minor}t64"
    mkdir -p .venv/triton/lib
    cp -P .venv/debian/root/usr/lib/*/libpython"$minor".so.* .venv/triton/lib/
  fi
}

start=$SECONDS
python=$(find_python)
environment_works || make_environment
install_packages
install_flashinfer
install_tritonserver
rm -f .venv/.setup-*
touch "$stamp"
say "done in $((SECONDS - start)) s"
