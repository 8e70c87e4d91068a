# The commands that a person or continuous integration runs. They install the packages that requirements.lock pins into
# .venv, and nothing anywhere else. They call .venv/bin/python and no script in .venv/bin, so that the checkout can be moved.

PYTHON ?= python3
RUN := .venv/bin/python

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-all lint docs torture figures report verify gpu-check bench lock clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

setup: .venv/.installed ## make .venv from requirements.lock

demo: .venv/.installed ## grow a small network on real images and draw its curves: experiment=quickstart
	$(RUN) train.py experiment=quickstart

check: lint ## lint, and the tests of the limits of the code: under a minute
	$(RUN) -m pytest tests/test_house.py

test: lint ## lint and the quick tests: under three minutes on two cores
	WANDB_MODE=disabled $(RUN) -m pytest

test-all: lint ## lint and all tests
	WANDB_MODE=disabled $(RUN) -m pytest -m ""

lint: .venv/.installed ## style, format, imports between packages, and types
	$(RUN) -m ruff check
	$(RUN) -m ruff format --check
	$(RUN) .venv/bin/lint-imports --no-logo
	$(RUN) -m basedpyright net2net experiments scripts train.py

docs: .venv/.installed ## build the documentation in docs/_build; a warning is an error
	$(RUN) -m sphinx -W --keep-going -q -b html docs docs/_build

torture: .venv/.installed ## kill runs at 200 random moments, and compare what becomes of them
	$(RUN) -m tests.torture --kills 200

figures: .venv/.installed ## draw the figures and the table from results/curves
	$(RUN) scripts/figures.py

report: .venv/.installed ## write results/report.html: all results on one page that needs no network
	$(RUN) scripts/report.py

verify: .venv/.installed ## check every committed curve against its manifest and the history
	$(RUN) scripts/verify.py

gpu-check: .venv/.installed ## measure how fast this GPU trains, against a bare loop: two minutes
	$(RUN) scripts/bench.py gpu

bench: .venv/.installed ## measure speed; PHOTOS=FOLDER for the loader, too
	$(RUN) scripts/bench.py $(if $(PHOTOS),--photos "$(PHOTOS)")

# Pins that still satisfy pyproject.toml stay as they are. LOCK_FLAGS=--upgrade takes the newest versions.
lock: .venv/bin/uv ## bring requirements.lock in step with pyproject.toml
	$(RUN) -m uv pip compile -q pyproject.toml --extra dev --universal --python-version 3.11 --fork-strategy fewest \
		--generate-hashes --custom-compile-command "make lock" $(LOCK_FLAGS) -o requirements.lock

clean: ## remove the environment, builds and caches; runs and results stay
	rm -rf .venv build dist docs/_build net2net.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# uv itself is pinned in the lock, with hashes.
.venv/bin/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "net2net needs Python 3.11 or newer: name one with make PYTHON=/path/to/python3." >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	sed -n '/^uv==/,/[^\\]$$/p' requirements.lock > .venv/uv.txt
	$(RUN) -m pip install -qq --require-hashes -r .venv/uv.txt

# uv does not read pip's settings, so it is given the folders of wheels that pip knows (uv fails on a folder that does not
# exist). Compiling takes 10 s. It saves 5 s at the first import, and at every import where Python may not write bytecode.
# If uv cannot reach the package index, pip installs the same pins with the settings of this machine. --python keeps uv out
# of an activated environment. setuptools is pinned, so our package is built without isolation.
.venv/.installed: requirements.lock pyproject.toml | .venv/bin/uv
	@set --; \
	for folder in $${PIP_FIND_LINKS:-$$($(RUN) -m pip config get global.find-links 2>/dev/null)}; do \
		if [ -d "$$folder" ]; then set -- "$$@" --find-links "$$folder"; fi; \
	done; \
	echo "installing requirements.lock into .venv"; \
	$(RUN) -m uv pip sync -q --python $(RUN) --require-hashes --compile-bytecode \
		"$$@" requirements.lock || \
		{ echo "uv failed; trying pip" >&2; $(RUN) -m pip install -qq --require-hashes -r requirements.lock; }
	$(RUN) -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $@
