# Every target works from a bare checkout: it makes .venv first, with Python >= 3.11, make and gcc on the machine.
VENV := .venv
STAMP := $(VENV)/.setup-done
PYTHON ?=

CODE := megavlm kernels tools tests setup.py
HOUSE_TESTS := $(wildcard tests/unit/test_house*.py)
# Two files at a time: half of the tests start ranks of their own, and the others leave a core idle.
TWO_FILES := -n 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help setup test test-full checks bench quickstart clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

setup: $(STAMP)  ## create .venv and install everything (PYTHON=... chooses the interpreter)

$(STAMP): pyproject.toml setup.py constraints.txt tools/setup_env.sh
	@PYTHON="$(PYTHON)" tools/setup_env.sh
	@touch $@

test: $(STAMP)  ## the tests of CI, no GPU needed
	$(VENV)/bin/pytest $(TWO_FILES) -m "not full"

test-full: $(STAMP)  ## every combination of layouts and cases
	$(VENV)/bin/pytest $(TWO_FILES)

checks: $(STAMP)  ## format, lint, types, spelling, import rules, size budget
	$(VENV)/bin/ruff format --check --quiet $(CODE)
	$(VENV)/bin/ruff check --quiet $(CODE)
	$(VENV)/bin/mypy
	$(VENV)/bin/codespell
	$(VENV)/bin/pytest $(HOUSE_TESTS)

bench: $(STAMP)  ## measure this machine, as one table
	PYTHONWARNINGS=ignore $(VENV)/bin/megavlm bench

quickstart: $(STAMP)  ## train the toy model, end to end (FAMILY=aquila-vl: the other one)
	PYTHONWARNINGS=ignore $(VENV)/bin/python tools/quickstart.py $(if $(FAMILY),--family $(FAMILY))

clean:  ## remove .venv and all caches
	rm -rf $(VENV) *.egg-info .pytest_cache .mypy_cache .ruff_cache
