#!/usr/bin/env bash
# Builds the extension, and the CUDA kernels for the emulator, with AddressSanitizer and UBSan in a copy of the tree
# (build/asan), checks that errors are reported, and runs the tests marked `sanitize` on the C++ kernels and the tests
# of the CUDA kernels. Usage: run.sh PYTHON
set -euo pipefail
python=$1
root=$(cd "$(dirname "$0")/../.." && pwd)
tree=$root/build/asan
cxx=${CXX:-g++}

# The copy keeps file times, so that only changed files are compiled again.
mkdir -p "$tree"
copied="csrc selfsup_kernels tests benchmarks docs examples" # pytest imports all tests, and they import these
(cd "$tree" && rm -rf $copied)
cd "$root"
tar -cf - --exclude='*.so' --exclude=_build_info.json --exclude=__pycache__ \
  setup.py pyproject.toml README.md CHANGELOG.md LICENSE Makefile $copied | tar -xf - -C "$tree"
cd "$tree"
export SELFSUP_KERNELS_SANITIZE=1
"$python" setup.py --quiet build_ext --inplace
emulator=$("$python" tests/emulator/build.py)

# Includes libstdc++: the sanitizer looks up __cxa_throw when it starts, before Python has loaded a C++ library.
preload=""
for library in libasan.so libubsan.so libstdc++.so.6; do
  preload+=" $("$cxx" -print-file-name=$library)"
done
export LD_PRELOAD="$preload" PYTHONMALLOC=malloc PYTHONPATH="$tree"
# Python and torch never free some memory; new and delete in torch's libraries are not instrumented.
export ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1

flags=$("$python" -c 'from selfsup_kernels.core import build; print(*build.SANITIZER_FLAGS)')
LD_PRELOAD="" "$cxx" $flags -shared -fPIC -w tests/sanitizer/broken.cpp -o broken.so
expect() {
  local report
  if report=$("$python" -c "import ctypes; ctypes.CDLL('./broken.so').$1($2)" 2>&1) || ! grep -q "$3" <<<"$report"; then
    echo "the sanitizers did not report $1: $report" >&2
    exit 1
  fi
}
expect read_past_the_end 4 "AddressSanitizer: heap-buffer-overflow"
expect overflow 1 "runtime error: signed integer overflow"
"$python" -c 'import ctypes; ctypes.CDLL("./broken.so").read_past_the_end(3)'

"$python" -c 'from selfsup_kernels.core import backends, build
assert build.record()["sanitized"] and str(build.PACKAGE).startswith("'"$tree"'"), build.PACKAGE
assert backends.unavailable("cpu") is None, backends.unavailable("cpu")'
# opcheck tests what is registered with PyTorch; gradcheck makes the same calls of the kernels.
chosen="not reference and not opcheck"
tests=$(grep -l "mark\.sanitize" tests/test_*.py) # the others are not even imported, which takes long here
shared_out="-n logical --maxprocesses 8 --dist worksteal" # as in the Makefile
# The widest instruction set runs all tests, narrower ones all except the slow random cases.
"$python" -m pytest $tests -m sanitize -k "$chosen" $shared_out --durations=5
for capability in avx2 default; do
  SELFSUP_KERNELS_CPU_CAPABILITY=$capability \
    "$python" -m pytest $tests -m sanitize -k "$chosen and not test_properties and not test_ops" $shared_out
done
# Leaves out the emulator's own tests, since some of their kernels write out of bounds on purpose.
export SELFSUP_KERNELS_CUDA_EMULATOR=$emulator
"$python" -m pytest tests/gpu/test_byol.py tests/gpu/test_ema.py tests/gpu/test_optim.py $shared_out --durations=5
