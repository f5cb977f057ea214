# `make demo` and `make test` do all the set-up on a fresh machine: Python 3.10+, g++ and make are enough.
PYTHON ?= python3
# Any torch from 2.11 on; TORCH="torch==2.13.0" chooses one.
TORCH ?= torch>=2.11
VENV := .venv
# Test processes: one a core, at most 8.
PROCESSES ?= auto --maxprocesses=8
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

.PHONY: help demo test test-all build lint bench cuda-report gpu clean
help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# Torch first: the package is compiled against it, not in an isolated environment.
$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	pip install --quiet --upgrade pip
	pip install --quiet "setuptools>=64" wheel ninja "numpy>=1.26" "$(TORCH)"
	touch $@

# A development build compiles the CUDA kernels for the card that is present; without one, only as far as PTX. The list of
# architectures in setup.py is for wheels.
$(VENV)/.built: $(VENV)/.torch setup.py pyproject.toml $(shell find csrc -type f)
	nvidia-smi --list-gpus >/dev/null 2>&1 || export PTX_ONLY=1; \
	pip install --quiet --no-build-isolation --editable ".[test,demo,bench]"
	touch $@

# Without a GPU the demo leaves out the CUDA kernels, a fifth of the time; `make build` adds them.
demo: $(VENV)/.torch ## set up, build, train a small language model with and without the package
	if [ -e $(VENV)/.built ] || nvidia-smi --list-gpus >/dev/null 2>&1; then $(MAKE) --no-print-directory $(VENV)/.built; \
	else LEAVE_OUT_CUDA_KERNELS=1 pip install --quiet --no-build-isolation --editable ".[test,demo,bench]"; fi
	python examples/train_language_model.py

test: $(VENV)/.built ## set up, build and test, about ten minutes on two cores
	python -m pytest -n $(PROCESSES) --dist worksteal

test-all: $(VENV)/.built ## every test: also sanitizers, planted bugs, every instruction-set level; 45 minutes
	python -m pytest -n $(PROCESSES) --dist worksteal -m ""

build: $(VENV)/.built ## set up and compile in place
	@python -c "import torch, torch_softmax_ext; o = torch.ops.torch_softmax_ext; \
	print('torch', torch.__version__, '- CUDA kernels:', o._has_cuda(), '- CPU level:', o._cpu_isa())"

lint: ## ruff and clang-format, as .pre-commit-config.yaml pins them; fixes what it can
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	pip install --quiet "pre-commit>=4"
	pre-commit run --all-files --show-diff-on-failure

bench: $(VENV)/.built ## measure this machine against eager, torch.compile and entmax; writes benchmarks/results/
	python -m benchmarks

cuda-report: $(VENV)/.built ## registers, spills, accesses and occupancy of the CUDA kernels, without a GPU
	python -m tools.cuda_report

gpu: ## with a GPU, nvcc and torch: build for the card, test, sanitize, measure; at most 8 minutes, offline
	$(PYTHON) -m tools.gpu

clean: ## remove the environment and all build outputs
	rm -rf $(VENV) build demo *.egg-info torch_softmax_ext/*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
