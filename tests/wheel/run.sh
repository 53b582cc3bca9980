#!/usr/bin/env bash
# Installs the wheel of dist with one version of torch into a new environment, and tests it there, outside the checkout:
# no compiler and no nvcc on PATH, no Triton. Usage: run.sh PYTHON TORCH TEST...
set -euo pipefail
python=$1 torch=$2
shift 2
cd "$(dirname "$0")/../.."
ls dist/*.whl >/dev/null # else: make wheel
env=$PWD/build/wheel-env-$("$python" -c 'import sys; print(sys.implementation.cache_tag)')-${torch//[^a-z0-9.]/-}
outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT

[ -x "$env/bin/python" ] || "$python" -m venv "$env" || { rm -rf "$env"; exit 1; }
"$env/bin/python" -m pip install --quiet --upgrade "$torch" numpy pytest pytest-xdist hypothesis rich psutil
"$env/bin/python" -m pip uninstall --quiet --yes selfsup-kernels
"$env/bin/python" -m pip install --quiet --no-index dist/*.whl # torch is all that it may ask for
"$env/bin/python" -m pip uninstall --quiet --yes triton        # which CUDA builds of torch bring

cp -r tests pyproject.toml "$outside"
compiled=$outside/libcuda.so.1 # the stub driver, on which the machine code of the wheel is loaded
include=$("$python" -c 'import triton; print(triton.__path__[0])')/backends/nvidia/include
"${CC:-gcc}" -shared -fPIC -Wl,-soname,libcuda.so.1 -I"$include" tests/gpu/stub_driver/driver.c -o "$compiled"

cd "$outside"
bare() { env -i HOME="$outside" PATH="$env/bin" OMP_NUM_THREADS=1 "$@"; }
bare selfsup-kernels info
bare python tests/wheel/installed.py "$outside"
# One test compiles C++, another needs a benchmark of the checkout.
bare python -m pytest -n 2 --dist worksteal "$@" -k "not inductor and not bytes_received"
