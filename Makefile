# `make demo` and `make test` do all their set-up: Python >= 3.10 with its venv module is all they need.
.PHONY: setup demo test test-slow fuzz lint format bench-env bench sbi-peers arviz1-env clean
.DELETE_ON_ERROR:

PY := .venv/bin/python
stamp = $(1)/.stamp-$(shell cat $(2) 2>/dev/null | cksum | cut -d' ' -f1)
SETUP := $(call stamp,.venv,constraints.txt pyproject.toml)
BENCH := $(call stamp,.venv-bench,constraints-bench.txt)
ARVIZ1 := $(call stamp,.venv-arviz1,constraints-arviz1.txt)

# The first of these that runs (a shim may be there and not run) and is a supported Python with venv.
CANDIDATES := python3.11 python3.12 python3.13 python3.10 python3 python
RUNS = import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info < (3, 14))
FIND = $$(for p in $(CANDIDATES); do $$p -c '$(RUNS)' >/dev/null 2>&1 && { echo $$p; break; }; done)
# The same for the one Python that ArviZ 1.x is tested on; pyenv keeps its versions beside each other.
FIND312 = $$(for p in python3.12 "$$(pyenv root 2>/dev/null)"/versions/3.12.*/bin/python3.12; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' >/dev/null 2>&1 && { echo $$p; break; }; done)

export OMP_NUM_THREADS ?= 1
# Where posteriordb's and sbibm's files lie beside this checkout, the tests on them run too. (Empty: they are not here.)
export PYRO_SB_POSTERIORDB ?= $(abspath $(wildcard ../shared/data/posteriordb))
export PYRO_SB_SBIBM ?= $(abspath $(wildcard ../shared/data/sbibm))
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1

setup: $(SETUP)

# torch first and by its pin, so that nothing later in the list brings another build of it.
$(SETUP):
	@python=$(FIND); test -n "$$python" || { echo "No python3 >= 3.10, < 3.14 with venv and ensurepip found (Debian: install python3-venv)."; exit 1; }; \
	test -x $(PY) || { echo "Making .venv with $$python"; $$python -m venv .venv; }
	$(PY) -m pip install -q torch -c constraints.txt
	$(PY) -m pip install -q -e '.[dev]' -c constraints.txt
	@rm -f .venv/.stamp-*
	@touch $@

demo: setup
	$(PY) -m demo

# Tests, doctests, and the notebooks in their short mode (tests/test_tutorials.py), in two processes.
PYTEST := CI=1 $(PY) -m pytest -q --durations=10 -n 2 --dist worksteal
test: setup arviz1-env
	$(PYTEST) -m "not slow" tests pyro_sb

# The long sampled tests.
test-slow: setup arviz1-env
	$(PYTEST) -m slow tests

# Every public call against values that are right, wrong and absurd, for about an hour: CASES=... and SEED=... for others.
fuzz: setup
	CI=1 $(PY) -m tests.fuzz --cases $(or $(CASES),10000) --seed $(or $(SEED),0)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

format: setup
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# NumPyro, BlackJAX, nutpie and sbi live apart: the package does not need them, the benchmarks compare with them. Of sbibm
# only the files are read.
bench-env: $(BENCH)

$(BENCH): constraints-bench.txt
	@python=$(FIND); test -n "$$python" || { echo "No python3 >= 3.10, < 3.14 with venv found."; exit 1; }; \
	test -x .venv-bench/bin/python || $$python -m venv .venv-bench
	.venv-bench/bin/python -m pip install -q torch -c constraints-bench.txt
	.venv-bench/bin/python -m pip install -q numpyro jax blackjax nutpie 'arviz<1' sbi pyro-ppl scikit-learn -c constraints-bench.txt
	.venv-bench/bin/python -m pip install -q --no-deps sbibm -c constraints-bench.txt
	@rm -f .venv-bench/.stamp-*
	@touch $@

# Every claim of benchmarks/claims.py, for hours; finished cells are not run again. `python -m benchmarks run NAME` is one of them.
bench: setup bench-env
	export PYRO_SB_SBIBM="$${PYRO_SB_SBIBM:-$$(echo $(CURDIR)/.venv-bench/lib/python3.*/site-packages/sbibm)}"; \
	$(PY) -m benchmarks run

# sbi's estimators alone: an hour and a half; finished cells are not run again.
sbi-peers: bench-env
	.venv-bench/bin/python -m benchmarks.amortised.sbi_peers
	.venv-bench/bin/python -m benchmarks.amortised.training_time

# ArviZ 1.x needs Python 3.12 and no torch: the tests run its half of the converter there, where a python3.12 is found.
arviz1-env:
	@if test ! -f constraints-arviz1.txt; then echo "constraints-arviz1.txt is not there: ArviZ 1.x is not set up."; \
	elif test ! -f $(ARVIZ1); then \
		python=$(FIND312); \
		if test -z "$$python"; then echo "No python3.12 found: ArviZ 1.x is not tested here."; \
		else test -x .venv-arviz1/bin/python || $$python -m venv .venv-arviz1; \
			.venv-arviz1/bin/python -m pip install -q -r constraints-arviz1.txt && rm -f .venv-arviz1/.stamp-* && touch $(ARVIZ1); fi; \
	fi

clean:
	rm -rf .venv .venv-bench .venv-arviz1 build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
