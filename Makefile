# Each target does its own set-up: .venv with the versions of constraints.txt, and the native libraries.
# ARGS= goes to the program that the target runs.

PYTHON ?= python3

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

ENVIRONMENT := $(VENV)/environment.stamp
BUILD := $(VENV)/build.stamp
NATIVE_SOURCES := setup.py $(shell find ops -type f)
CXX_SOURCES := $(filter %.h %.cpp %.cuh,$(NATIVE_SOURCES))

CUOBJDUMP := $(VENV)/bin/cuobjdump
NVRTC := build/nvrtc/fetched.stamp
UNPACKED := tools/unpacked.txt

# A process for each core, each with one thread; ARGS="-n0 -s" shows what tests print.
PYTEST := $(PY) -m pytest --numprocesses=logical --maxprocesses=8

OPTIMIZER ?= AdEMAMix
COMPARE ?=
STEPS ?=
SIZE ?=
OUT ?= out/demo
SECONDS ?= 600

.PHONY: demo test test-fast test-torch fuzz lint format docs bench convergence drift memory gpu-check gpu-training cuda-load-check aarch64-check wheel wheel-check support build clean

demo: $(BUILD)  ## train a byte-level GPT: COMPARE=1 (AdamW too), OPTIMIZER=, STEPS=, SIZE=, OUT=, ARGS=
	$(PY) examples/train_gpt.py --optimizer $(OPTIMIZER) --out $(OUT) \
	    $(if $(COMPARE),--compare) $(if $(STEPS),--steps $(STEPS)) $(if $(SIZE),--size $(SIZE)) $(ARGS)

test: $(BUILD) $(CUOBJDUMP) $(NVRTC)  ## all tests
	$(PYTEST) $(ARGS)

test-fast: $(BUILD) $(CUOBJDUMP) $(NVRTC)  ## all but those marked `nightly`, in a quarter of the time
	$(PYTEST) -m "not nightly" $(ARGS)

# A round takes some minutes, so the last one ends somewhat later than it is told.
fuzz: $(BUILD)  ## the tests with drawn arguments, others in each round: SECONDS=
	@end=$$(($$(date +%s) + $(SECONDS))); \
	while seed=$$(date +%s); [ $$seed -lt $$end ]; do \
	    echo "FUZZ_SEED=$$seed"; \
	    FUZZ_SEED=$$seed $(PYTEST) -m fuzz -q --hypothesis-seed=$$seed $(ARGS) || exit 1; \
	done

lint: $(ENVIRONMENT)  ## ruff, mypy, clang-format
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_SOURCES)

format: $(ENVIRONMENT)  ## rewrite the sources as `make lint` wants them
	$(PY) -m ruff check --fix
	$(PY) -m ruff format
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

docs: $(BUILD)  ## build/docs/index.html; a warning is an error
	$(PY) -m sphinx -W --keep-going -q -b html docs build/docs $(ARGS)
	@echo "wrote build/docs/index.html"

bench: $(BUILD)  ## speed on the CPU, beside other optimizers: benchmarks/results/cpu; ARGS=--quick
	$(PY) -m benchmarks.cpu $(ARGS)

convergence: $(BUILD)  ## loss in training, beside AdamW's, each at its best: benchmarks/results/convergence; ARGS=--short
	$(PY) -m benchmarks.convergence $(ARGS)

drift: $(BUILD)  ## how far quantized state is from the truth after 20,000 steps; ARGS=--write puts it into docs/choosing.md
	$(PY) -m benchmarks.drift $(ARGS)

memory: $(BUILD)  ## bytes of weights, gradients and state by optimizer; ARGS=--write puts them into docs/choosing.md
	$(PY) -m benchmarks.memory $(ARGS)

gpu-check:  ## on a machine with an NVIDIA GPU, with its own Python: build, tests, benchmarks; FOLDER=
	$(PYTHON) -m benchmarks.gpu_check $(FOLDER)

gpu-training:  ## the same, after it: training steps eager, compiled and captured, beside other optimizers; FOLDER=
	$(PYTHON) -m benchmarks.gpu_training $(if $(FOLDER),--out $(FOLDER)) $(ARGS)

# Environments with another torch, next to .venv: build/torch-2.15.0, or build/torch-2.15.0-python3.12 for the python3.12
# on PATH. Each takes several GB if that torch has CUDA.
OTHER_TORCH := build/torch-
OTHER_PIP = $(@D)/bin/python -m pip --disable-pip-version-check install --quiet --constraint $(@D)/constraints.txt
$(OTHER_TORCH)%/environment.stamp: constraints.txt
	$(or $(word 2,$(subst -, ,$*)),$(PYTHON)) -m venv $(@D)
	grep -v '^torch==' constraints.txt > $(@D)/constraints.txt
	$(OTHER_PIP) torch==$(firstword $(subst -, ,$*)) setuptools ninja pybind11 pytest pytest-xdist expecttest hypothesis numpy
	touch $@

$(OTHER_TORCH)%/dev.stamp: $(OTHER_TORCH)%/environment.stamp pyproject.toml
	TORCH_ADEMAMIX_NATIVE=0 $(OTHER_PIP) --no-build-isolation --editable '.[dev]'
	touch $@

CUDA_CHECK := build/cuda-load-check
cuda-load-check: $(OTHER_TORCH)2.11.0/environment.stamp  ## without a GPU: the CUDA library beside a torch with CUDA, and that one's NVRTC
	rm -rf $(CUDA_CHECK) && mkdir -p $(CUDA_CHECK)
	cp -r setup.py pyproject.toml README.md LICENSE conftest.py ops torch_ademamix tests compile_tests $(CUDA_CHECK)
	rm -f $(CUDA_CHECK)/torch_ademamix/*.so
	cd $(CUDA_CHECK) && $(abspath $(<D))/bin/python setup.py --quiet build_ext --inplace
	cd $(CUDA_CHECK) && ALL_VARIANTS=1 $(abspath $(<D))/bin/python -m pytest -q compile_tests/test_fake_cuda.py

aarch64-check: $(ENVIRONMENT)  ## without an ARM machine: the libraries compile for it, and compute the same bits in an emulator; ARGS=--record
	$(PY) -m tools.aarch64 $(ARGS)

wheel: $(ENVIRONMENT)  ## dist/: the source distribution, and a wheel for each Python at hand
	$(PY) -m tools.wheel

TORCH_VERSIONS ?= 2.11.0 2.13.0 2.14.1 2.15.0
wheel-check: $(ENVIRONMENT) $(TORCH_VERSIONS:%=$(OTHER_TORCH)%/environment.stamp)  ## the wheels, tested with TORCH_VERSIONS; ARGS=--record
	$(PY) -m tools.wheel --check $(TORCH_VERSIONS:%=$(OTHER_TORCH)%/bin/python) $(ARGS)

# With the native libraries of .venv: one build serves later versions of torch.
TORCH ?= 2.15.0
TIER ?= suite
test-torch: $(BUILD) $(CUOBJDUMP) $(NVRTC) $(OTHER_TORCH)$(TORCH)/dev.stamp  ## all tests with another torch, or TIER=fast: TORCH=; recorded
	status=0; \
	$(subst $(PY),$(OTHER_TORCH)$(TORCH)/bin/python,$(PYTEST)) $(if $(filter fast,$(TIER)),-m "not nightly") \
	    --junitxml=build/$(TIER).xml $(ARGS) || status=$$?; \
	$(if $(ARGS),,$(PY) -m tools.support --record $(TIER) $(OTHER_TORCH)$(TORCH)/bin/python build/$(TIER).xml;) exit $$status

support:  ## the support matrix in docs/limitations.md, from benchmarks/results/support
	$(PYTHON) -m tools.support

build: $(BUILD)

clean:
	rm -rf $(VENV) build dist *.egg-info torch_ademamix/*.so
	find . -name __pycache__ -type d -exec rm -rf {} +

$(ENVIRONMENT): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 10) or sys.exit("Python 3.10 or newer is needed: make PYTHON=...")'
	@echo "Setting up $(VENV) (the first time this takes minutes)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) setuptools wheel ninja pybind11
	TORCH_ADEMAMIX_NATIVE=0 $(PIP) --no-build-isolation --editable '.[dev]'
	@touch $@

# In place and by ninja, which compiles what has changed.
$(BUILD): $(ENVIRONMENT) $(NATIVE_SOURCES)
	@echo "Building the native libraries (log: build/log.txt)"
	@mkdir -p build
	@$(PY) setup.py build_ext --inplace > build/log.txt 2>&1 || { cat build/log.txt; exit 1; }
	@touch $@

# CUDA's disassembler; of the triton package nothing else is used.
$(CUOBJDUMP): $(ENVIRONMENT) $(UNPACKED)
	$(PY) -m pip --disable-pip-version-check download --quiet --no-deps --dest build/triton $(shell grep ^triton $(UNPACKED))
	cd build/triton && ../../$(PY) -c 'import glob, zipfile; \
	    wheel = zipfile.ZipFile(glob.glob("triton-*.whl")[0]); \
	    [wheel.extract(name) for name in wheel.namelist() if name.endswith(("/bin/cuobjdump", "/bin/nvdisasm"))]'
	install -m 755 build/triton/triton/backends/nvidia/bin/cuobjdump build/triton/triton/backends/nvidia/bin/nvdisasm $(VENV)/bin
	rm -r build/triton

# NVIDIA's compilers, of CUDA 12 and 13, without the rest of their packages.
$(NVRTC): $(ENVIRONMENT) $(UNPACKED)
	rm -rf $(@D) && mkdir -p $(@D)
	$(PY) -m pip --disable-pip-version-check download --quiet --no-deps --dest $(@D)/wheels $(shell grep ^nvidia-cuda-nvrtc $(UNPACKED))
	cd $(@D) && ../../$(PY) -c 'import glob, pathlib, zipfile; \
	    [pathlib.Path(pathlib.Path(name).name).write_bytes(wheel.read(name)) \
	     for wheel in map(zipfile.ZipFile, glob.glob("wheels/*.whl")) for name in wheel.namelist() if ".so." in name and ".alt." not in name]'
	rm -r $(@D)/wheels
	touch $@
