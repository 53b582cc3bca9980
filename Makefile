# Every target works on its own on a fresh machine: it makes .venv and builds the extension if they are missing or
# stale. `make help` lists the targets. ARGUMENTS="..." is passed on to the target's command.
#
# PYTHON on the command line (make test PYTHON=python3) uses that interpreter as it is: it needs torch and the tools
# listed in pyproject.toml, and only the extension is built, in place.

TORCH ?= torch==2.13.0
TRITON ?= triton==3.7.1
COMPAT_TORCH ?= torch==2.11.0
COMPAT_TRITON ?= triton==3.6.0

ifeq ($(origin PYTHON),command line)
PY := $(PYTHON)
ENVIRONMENT :=
DEPENDENCIES :=
else
PYTHON ?= python3
PY := .venv/bin/python
ENVIRONMENT := .venv/.environment
DEPENDENCIES := .venv/.dependencies
endif

# Written by setup.py at the end of a build.
BUILT := selfsup_kernels/_build_info.json
SOURCES := setup.py selfsup_kernels/core/build.py selfsup_kernels/version.py $(wildcard csrc/common/* csrc/cpu/* csrc/launch/*) \
  selfsup_kernels/core/record.py selfsup_kernels/info_nce/call.py selfsup_kernels/info_nce/objectives.py \
  selfsup_kernels/siglip/call.py
# A build for a CUDA build of torch, which PYTHON on the command line may have, includes the CUDA library. For the
# CPU-only torch of .venv the library is a separate target.
CUDA_LIBRARY := selfsup_kernels/_CUDA.so
CUDA_SOURCES := selfsup_kernels/core/build_cuda.py $(wildcard csrc/cuda/*)
ifeq ($(ENVIRONMENT),)
SOURCES += $(CUDA_SOURCES)
endif
NVCC := $(firstword $(wildcard $(addsuffix /bin/nvcc,$(CUDA_HOME) $(CUDA_PATH))) $(shell command -v nvcc) \
  $(wildcard /usr/local/cuda/bin/nvcc))
EXECUTABLE = $(shell $(PY) -c 'import sys; print(sys.executable)')
# The tests that depend on the library and on torch; not those of the build, the demo and the commands.
OP_TESTS := tests/test_ops.py tests/test_info_nce.py tests/test_info_nce_parts.py tests/test_distributed.py tests/test_info_nce_precision.py tests/test_byol.py \
  tests/test_ema.py tests/test_optim.py tests/test_ema_memory.py tests/test_ema_rounding.py tests/test_memory_layout.py tests/test_properties.py tests/test_compile.py tests/test_bad_input.py

.PHONY: help setup wheel wheel-check demo bench bench-compare bench-results profile docs test fuzz lint asan interop-setup interop interop-bench compat cuda cuda-static kernels gpu-static gpu-check gpu-counters clean

setup: $(BUILT) $(DEPENDENCIES)  ## the environment, and the package with its C++ extension

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.* ## \(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | \
	  while IFS='|' read -r target does; do printf '  make %-15s %s\n' "$$target" "$$does"; done

# The requirements are listed in pyproject.toml only: those of the build, and of the extras that are named, or of all.
# Python 3.10 has no TOML reader, so pip's is used.
REQUIREMENTS = import sys; from pip._vendor import tomli; \
  project = tomli.load(open("pyproject.toml", "rb")); extras = project["project"]["optional-dependencies"]; \
  names = [name for extra in sys.argv[1:] or extras for name in extras[extra]]; \
  print(*sorted({*project["build-system"]["requires"], *names}), sep="\n")

# Enough to build the package and to run the demo.
.venv/.environment: pyproject.toml Makefile
	test -x .venv/bin/python || $(PYTHON) -m venv .venv || { rm -rf .venv; exit 1; }
	@echo "Installing torch, the build tools and the demo's packages in .venv: 1.2 GB with a CPU build of torch, several GB with a CUDA build."
	$(PY) -c '$(REQUIREMENTS)' demo > .venv/requirements.txt
	$(PY) -m pip install "$(TORCH)" -r .venv/requirements.txt
	touch $@

.venv/.dependencies: .venv/.environment
	@echo "Installing what tests, documentation and checks need in .venv: another 1 GB."
	$(PY) -c '$(REQUIREMENTS)' > .venv/requirements.txt
	$(PY) -m pip install "$(TORCH)" "$(TRITON)" -r .venv/requirements.txt
	touch $@

$(BUILT): $(ENVIRONMENT) $(SOURCES)
	@echo "Compiling the C++ extension: about 2 minutes on 2 cores."
ifeq ($(ENVIRONMENT),)
	$(PY) setup.py build_ext --inplace
else
	$(PY) -m pip install --no-build-isolation --no-deps -e .
endif

# Needs nvcc, no GPU. Honours TORCH_CUDA_ARCH_LIST and MAX_JOBS.
cuda: $(CUDA_LIBRARY)  ## the CUDA library (needs nvcc, no GPU)
	$(PY) benchmarks/cuda_static.py --contents

$(CUDA_LIBRARY): $(DEPENDENCIES) $(BUILT) $(CUDA_SOURCES)
	$(PY) setup.py build_cuda
	touch $@

demo: $(BUILT)  ## train with eager losses and with ours, report in out/demo: QUICK=1
	$(PY) -m selfsup_kernels demo --out out/demo $(if $(QUICK),--quick) $(ARGUMENTS)

bench: setup  ## the speed of every op
	$(PY) -m pytest benchmarks --benchmark-columns=min,median,iqr,rounds --benchmark-group-by=group

# Measures this version and another in one run; fails if something is slower beyond the noise of that run. BASE defaults
# to the parent of the checked-out commit, or to that commit if files of the package have been changed.
bench-compare: setup  ## this version against another one: BASE=COMMIT
	$(PY) -m selfsup_kernels bench --base "$(or $(BASE),auto)" $(ARGUMENTS)

# Measures our losses and those of the libraries of `make interop` on this machine, for benchmarks/results.
bench-results: interop-setup  ## our losses and other libraries' on this machine: RESULTS=DIR
	PYTHONPATH=. .venv-interop/bin/python -m selfsup_kernels bench --vs all --views 2,4 --dtype float32,bf16 \
	  --model ResNet-50,ViT-B --seconds 4 --results "$(or $(RESULTS),benchmarks/results)" $(ARGUMENTS)

# Real training steps, part by part. ARGUMENTS="--method byol --batch 256,1024" and the like.
profile: setup  ## where the time of training steps goes, in out/profile
	$(PY) -m selfsup_kernels profile --out out/profile $(ARGUMENTS)

# Tables and pictures from benchmarks/results, then the site, in build/docs. A warning is an error.
docs: setup  ## the site, in build/docs
	$(PY) benchmarks/tables.py
	$(PY) -m sphinx -W --keep-going -q -E -d build/doctrees docs build/docs
	@echo "the site: $(CURDIR)/build/docs/index.html"

# The second run simulates the GPU kernels on the CPU: Triton's in its interpreter, CUDA's in our emulator. Its
# processes have one thread each, since Python takes most of the time. It runs even if the first run fails. Failures
# are printed after make has ended, since make's own last line only names the target.
SIMULATED := OMP_NUM_THREADS=1 TRITON_INTERPRET=1 SELFSUP_KERNELS_CUDA_EMULATOR=$$emulator
SHARED_OUT := -n logical --maxprocesses 8 --dist worksteal
test: export SELFSUP_KERNELS_FAILED_TESTS := $(CURDIR)/build/failed-tests
test: setup  ## all tests, the GPU kernels simulated
	@mkdir -p build && rm -f "$$SELFSUP_KERNELS_FAILED_TESTS"
	status=0; \
	$(PY) -m pytest tests --ignore=tests/gpu $(SHARED_OUT) -rsfE --durations=10 || status=$$?; \
	{ emulator=$$($(PY) tests/emulator/build.py) && \
	  $(SIMULATED) $(PY) -m pytest tests/gpu $(SHARED_OUT) -rsfE --durations=5; } || status=$$?; \
	if [ -s "$$SELFSUP_KERNELS_FAILED_TESTS" ]; then \
	  { while kill -0 $$PPID 2>/dev/null; do sleep 0.1; done; echo; cat "$$SELFSUP_KERNELS_FAILED_TESTS"; } & \
	fi; exit $$status

# Random calls of every public function against the dense equations in float64. CASES=N SEED=S; CASE=K runs only case K
# of SEED, which a failure names. IMPL=reference runs only that implementation; DEVICE=cuda IMPL=triton runs on a GPU.
CASES ?= 2000
SEED ?= 0
FUZZ = PYTHONPATH=. $(PY) tests/fuzz --cases $(CASES) --seed $(SEED) $(if $(CASE),--case $(CASE)) $(if $(IMPL),--impl $(IMPL))
fuzz: setup  ## random calls against float64: CASES=N SEED=S, CASE=K, IMPL=cpu, DEVICE=cuda
ifneq ($(DEVICE),)
	$(FUZZ) --device $(DEVICE) $(ARGUMENTS)
else
	emulator=$$($(PY) tests/emulator/build.py) && SELFSUP_KERNELS_CUDA_EMULATOR=$$emulator $(FUZZ) $(ARGUMENTS)
endif

lint: $(DEPENDENCIES)  ## ruff and clang-format, without changing files
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -c 'from clang_format import clang_format; clang_format()' --dry-run -Werror $(wildcard csrc/*/*) \
	  $(wildcard tests/emulator/*.h tests/emulator/*.cpp tests/emulator/*.cu tests/emulator/include/*/* tests/gpu/stub_driver/*.c)

# Builds a copy of the tree with AddressSanitizer and UBSan, and runs the tests marked `sanitize`.
asan: $(DEPENDENCIES)  ## tests under AddressSanitizer and UBSan
	bash tests/sanitizer/run.sh "$(EXECUTABLE)"

# Tests the libraries built against $(TORCH), without a rebuild, under $(COMPAT_TORCH), and the GPU kernels under
# $(COMPAT_TRITON), whose interpreter does not support the newest numpy. If there is an nvcc, the CUDA library has to
# load in that CUDA build of torch and register its ops, which needs no GPU. Last, builds the extension against the
# headers of $(COMPAT_TORCH).
compat: setup $(if $(NVCC),$(CUDA_LIBRARY)) .venv-compat/.dependencies  ## tests with the oldest torch and Triton
	.venv-compat/bin/python -m selfsup_kernels info
	.venv-compat/bin/python -m pytest $(OP_TESTS)
	$(if $(NVCC),.venv-compat/bin/python -m pytest tests/test_build_cuda.py -k "registers")
	emulator=$$($(PY) tests/emulator/build.py) && \
	  $(SIMULATED) .venv-compat/bin/python -m pytest tests/gpu $(SHARED_OUT)
	.venv-compat/bin/python benchmarks/gpu_static.py --brief --arch 80 86 90 120
	SELFSUP_KERNELS_SKIP_CUDA_BUILD=1 .venv-compat/bin/python setup.py build_ext --build-lib build/compat --build-temp build/compat

.venv-compat/.dependencies: pyproject.toml Makefile
	test -x .venv-compat/bin/python || $(PYTHON) -m venv .venv-compat
	.venv-compat/bin/python -m pip install "$(COMPAT_TORCH)" "$(COMPAT_TRITON)" pytest pytest-xdist hypothesis "numpy<2.4" \
	  rich psutil pybind11 ninja "setuptools>=77" wheel
	touch $@

# Tests drop-ins, methods and examples with the libraries that they replace or use, in an environment that has them.
interop-setup: setup .venv-interop/.dependencies  ## install the libraries that there are drop-ins for

interop: interop-setup  ## drop-ins, methods and examples with those libraries
	.venv-interop/bin/python -m pytest tests/interop $(SHARED_OUT) --durations=5

# The speed of each drop-in and of its original. ARGUMENTS="--json FILE" and the like.
interop-bench: interop-setup  ## the speed of each drop-in and its original
	PYTHONPATH=. .venv-interop/bin/python benchmarks/compat.py $(ARGUMENTS)

.venv-interop/.dependencies: tests/interop/requirements.txt Makefile
	test -x .venv-interop/bin/python || $(PYTHON) -m venv .venv-interop
	.venv-interop/bin/python -m pip install --quiet -r tests/interop/requirements.txt
	.venv-interop/bin/python -m pip install --quiet --no-deps solo-learn==1.0.2
	touch $@

# Machine code of the Triton kernels for common calls, so that users' first calls wait for no compiler. Needs no GPU.
# ARCH="80 86 90 100 120" selects the GPUs by compute capability. Kernels that Triton has in its cache come from there.
ARCH ?= 90
kernels: setup  ## the Triton kernels compiled ahead of time: ARCH="80 86 90 100 120"
	$(PY) -m selfsup_kernels.lab.ahead --arch $(ARCH)

# A source distribution and the wheel that is built from it, in dist: CPU kernels, CUDA library and Triton kernels for
# all these GPUs. Needs nvcc. WHEEL_ARCH="9.0a" builds for fewer. The wheel is for the Python of $(PY), and for the glibc
# of this machine and later (auditwheel finds the tag); it contains nothing of PyTorch.
WHEEL_ARCH ?= 8.0+PTX 8.6 9.0a 10.0 12.0
wheel: $(DEPENDENCIES)  ## a wheel for machines without compiler, CUDA toolkit and Triton, in dist (needs nvcc)
	$(if $(NVCC),,$(error make wheel needs nvcc, on PATH or in CUDA_HOME))
	rm -rf build/wheel dist
	TORCH_CUDA_ARCH_LIST="$(WHEEL_ARCH)" FORCE_CUDA=1 $(PY) -m build --no-isolation --outdir build/wheel
	PATH="$(dir $(EXECUTABLE)):$$PATH" $(PY) -m auditwheel repair --strip --exclude 'libtorch*.so' --exclude 'libc10*.so' -w dist build/wheel/*.whl
	cp build/wheel/*.tar.gz dist
	$(PY) tests/wheel/contents.py dist --architectures "$(WHEEL_ARCH)"

# Installs the wheel of dist into a new environment that has only torch, and runs the tests of the ops there.
WHEEL_TESTS ?= $(foreach name,bad_input byol compile distributed ema info_nce info_nce_pairs optim siglip,tests/test_$(name).py)
WHEEL_TORCH ?= torch==2.11.0 $(TORCH)
wheel-check: $(DEPENDENCIES)  ## install the wheel of dist without compiler, toolkit and Triton, and test it: WHEEL_TORCH=
	for torch in $(foreach t,$(WHEEL_TORCH),"$(t)"); do \
	  bash tests/wheel/run.sh "$(EXECUTABLE)" "$$torch" $(WHEEL_TESTS) || exit 1; done

# Compiles every configuration of the GPU kernels without a GPU. ARGUMENTS="--arch 90 --json FILE" and the like.
gpu-static: $(DEPENDENCIES)  ## every GPU kernel compiled, without a GPU
	$(PY) benchmarks/gpu_static.py $(ARGUMENTS)

# Checks the machine code of the CUDA library. ARGUMENTS="--json FILE" and the like.
cuda-static: $(CUDA_LIBRARY)  ## checks of the CUDA library's machine code
	$(PY) benchmarks/cuda_static.py $(ARGUMENTS)

# Needs a GPU and a Python with a CUDA build of torch: make gpu-check PYTHON=python3 [RESULTS=DIR]
# ARGUMENTS="--skip build" and "--only racecheck" and the like.
gpu-check: $(DEPENDENCIES)  ## all tests and measurements on a GPU: PYTHON=python3
	$(PY) benchmarks/gpu_check.py $(if $(RESULTS),--out "$(RESULTS)") $(ARGUMENTS)

# What bounds each GPU kernel, by the hardware's counters. Run gpu-check first, which builds the libraries.
# ARGUMENTS="--only TEXT" and the like.
gpu-counters: $(DEPENDENCIES)  ## what bounds each GPU kernel
	$(PY) benchmarks/gpu_counters.py $(if $(RESULTS),--out "$(RESULTS)") $(ARGUMENTS)

clean:  ## remove everything that was built
	rm -rf build dist out .venv .venv-compat .venv-interop *.egg-info .pytest_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(BUILT) selfsup_kernels/*.so selfsup_kernels/_kernels.zip
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
