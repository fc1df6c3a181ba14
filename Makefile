# Local verbs are CI's verbs. `make demo` and `make test` need nothing but Python 3.11+ and this folder.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# Many tests wait for processes and connections: one worker more than there are cores keeps these busy.
WORKERS := $(shell $(PYTHON) -c "import os; print(min(4, (os.cpu_count() or 1) + 1))")
SIDE_BY_SIDE := -n $(WORKERS) --dist worksteal
# The tests start hundreds of processes: without bytecode each of them compiles all modules anew.
unexport PYTHONDONTWRITEBYTECODE
# Side by side, threads of one process would wait for those of another; tests that want several ask for them.
test test-all check: export OMP_NUM_THREADS := 1

.PHONY: demo test test-all crash check clean
.DEFAULT_GOAL := test

$(VENV)/.installed-demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[digits]'
	@touch $@

$(VENV)/.installed-test: pyproject.toml $(VENV)/.installed-demo
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[digits,timm,test]'
	@touch $@

$(VENV)/.installed-check: pyproject.toml $(VENV)/.installed-test
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[digits,timm,test,check]'
	@touch $@

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

test-all: $(VENV)/.installed-test
	$(BIN)/python -m pytest $(SIDE_BY_SIDE) -m 'slow or not slow' --hypothesis-profile=explore

# Builds killed with SIGKILL: at least 200 times at random moments, and before every change of the file system.
crash: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m 'slow or not slow' -s tests/test_crash.py

check: $(VENV)/.installed-check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

clean:
	rm -rf runs build *.egg-info
