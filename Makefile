# `make train` and `make test` work as the first command in a fresh clone: whatever is missing is installed first.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
ARGS ?=
TRITON ?= 3.6.0

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# One compute thread a process: multi-rank runs would otherwise have ranks x cores threads on the same cores.
test test-apart test-hopper test-faults: export OMP_NUM_THREADS := 1
# Which containers set: each of the suite's some hundred processes would compile this project anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help install train train-diffusion serve-demo test test-apart test-hopper test-faults lint format bench bench-inference bench-gpu bench-kernels constraints clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-15s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@echo "Arguments are passed on with ARGS, e.g. make test ARGS='-k mesh'. Python: make PYTHON=python3.12 install"

install: $(INSTALLED) ## Set up .venv with everything that the other targets need (they do it by themselves)

train: $(INSTALLED) ## Train a small Llama on 8 ranks from raw text to a Hugging Face model
	@$(RUN) examples/demo.py $(ARGS)

train-diffusion: $(INSTALLED) ## Train a diffusion transformer on 8 ranks that draws digits
	@$(RUN) examples/demo_diffusion.py $(ARGS)

serve-demo: $(INSTALLED) ## Serve the model that `make train` exported, and stream one answer
	@$(RUN) examples/serve_demo.py $(ARGS)

test: $(INSTALLED) ## Run the test suite (on NCCL where there are several GPUs, else on gloo)
	@$(RUN) -m pytest -n auto --dist loadfile -m 'not alone' $(ARGS); many=$$?; \
	$(RUN) -m pytest -n auto --dist loadfile -m alone $(ARGS); few=$$?; \
	case "$$many $$few" in "0 0" | "0 5" | "5 0") ;; *) exit 1 ;; esac  # 5: ARGS chose none of these

test-apart: $(INSTALLED) ## The tests of ZeRO and of the engine with ranks that share no memory, as on hosts of their own
	@RANKS_APART=1 $(RUN) -m pytest tests/zero tests/engine -n auto --dist loadfile $(ARGS)

test-hopper: $(INSTALLED) ## Compile every kernel for an H100 with another Triton (TRITON=3.6.0, the one of torch 2.11)
	@test -d build/triton-$(TRITON) || $(RUN) -m pip install -q --no-deps --target build/triton-$(TRITON) triton==$(TRITON)
	@PYTHONPATH=build/triton-$(TRITON) $(RUN) -c 'import triton; assert triton.__version__ == "$(TRITON)", triton'
	@PYTHONPATH=build/triton-$(TRITON) $(RUN) -m pytest tests/kernels -k hopper -n auto $(ARGS)

test-faults: $(INSTALLED) ## Thousands of kills, damaged and malicious files and wrong settings (half an hour on two cores)
	@$(RUN) -m pytest tests/faults --faults full -n auto $(ARGS)

lint: $(INSTALLED) ## Check with ruff (lint and format) and mypy; say where torch has a newer release than the pin
	@$(RUN) -m ruff check
	@$(RUN) -m ruff format --check
	@$(RUN) -m mypy megatron_ds tools examples
	@$(RUN) tools/newest_releases.py

format: $(INSTALLED) ## Fix what ruff can fix and format every file
	@$(RUN) -m ruff check --fix
	@$(RUN) -m ruff format

bench: $(INSTALLED) ## Measure speed beside the peers on this machine's CPU and print the table
	@$(RUN) tools/benchmark/run.py $(ARGS)

bench-inference: $(INSTALLED) ## Measure generation beside transformers on this machine's CPU
	@$(RUN) tools/benchmark/inference.py $(ARGS)

bench-gpu: $(INSTALLED) ## Measure one GPU in nine minutes: products, attention, kernels, whole steps beside compiled torch
	@$(RUN) tools/benchmark/gpu.py $(ARGS)

bench-kernels: $(INSTALLED) ## Check and measure each Triton kernel on a GPU beside torch, torch.compile and FlexAttention
	@$(RUN) tools/benchmark/kernel_benchmark.py $(ARGS)

constraints: ## Renew constraints.txt with the newest releases that pyproject.toml admits (torch and triton keep theirs)
	@rm -rf build/fresh && $(PYTHON) -m venv build/fresh
	@grep -E '^(torch|triton)==' constraints.txt > build/torch.txt
	@build/fresh/bin/python -m pip install -qq -c build/torch.txt -e '.[dev,hf,serve]'
	@sed '/^[^#]/d' constraints.txt > build/constraints.txt
	@build/fresh/bin/python -m pip freeze --exclude-editable | sed 's/+[a-z0-9.]*$$//' >> build/constraints.txt
	@mv build/constraints.txt constraints.txt && rm -rf build/fresh build/torch.txt

clean: ## Remove caches and build products; runs/ and .venv stay
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
	@find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Done again when the requirements change. torch comes first, by its exact pin alone, so that no other package's
# range can choose another one. Byte code is made on all cores, which pip does on one, but for what nobody imports: it is
# not left to first use, since where PYTHONDONTWRITEBYTECODE is set every process would compile torch anew.
$(INSTALLED): pyproject.toml constraints.txt
	@command -v $(PYTHON) > /dev/null || { echo "error: no $(PYTHON) found; install Python 3.11 or newer" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 \
	or newer is needed, $(PYTHON) is " + v + "; give another one: make PYTHON=python3.12 install")'
	@echo "Installing into $(VENV), once: 2 to 10 minutes, mostly the download of torch ..."
	@$(RUN) -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@start=$$(date +%s) \
	&& $(RUN) -m pip install -qq --no-compile "$$(grep '^torch==' constraints.txt)" \
	&& $(RUN) -m pip install -qq --no-compile -c constraints.txt -e '.[dev,hf,serve]' \
	&& { $(RUN) -m compileall -qq -j 0 -x '/tests/|/transformers/models/(?!auto/)' $(VENV)/lib || true; } \
	&& echo "Installed in $$(( $$(date +%s) - start )) s."
	@touch $@
