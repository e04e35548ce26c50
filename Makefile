# Two commands do all their own set-up: `make serve` and `make test`.
VENV ?= .venv
PY := $(VENV)/bin/python
JAX ?=
BACKEND ?=
EXTRAS := test,bench,notebooks

# The first python that starts and is 3.12 or newer: a name on the PATH may be a shim that fails.
FIND_PYTHON := for p in python3 python3.13 python3.12; do \
	if $$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; then echo $$p; break; fi; done

.PHONY: which-python serve test test-slow triton compiled interpreted bench smoke lint format notebooks clean
.DELETE_ON_ERROR:

which-python:
	@$(FIND_PYTHON)

serve: $(VENV)/.installed
	$(PY) -m bench.serve $(if $(BACKEND),--backend $(BACKEND))

test: $(VENV)/.installed
	$(PY) -m pytest -n 2 --dist worksteal --cov --cov-report=term-missing:skip-covered --cov-fail-under=90 $(PYTEST)

# The whole matrix of cells and configurations of the kernels, lowered for a GPU that need not be there.
test-slow: $(VENV)/.installed
	$(PY) -m pytest -n 2 --dist worksteal -m slow $(PYTEST)

# The Triton kernels, compiled for every generation of GPUs and run by Triton's interpreter, in a venv with triton: no
# GPU needed.
triton:
	$(MAKE) VENV=.venv-triton EXTRAS=test,triton compiled interpreted

compiled: $(VENV)/.installed
	$(PY) -m pytest -n 2 tests/test_triton*.py $(PYTEST)

interpreted: $(VENV)/.installed
	TRITON_INTERPRET=1 $(PY) -m pytest -n 2 -k interpreted tests/test_triton*.py $(PYTEST)

# The smaller pass for another jax: import, reference, goldens and conformance of the portable backend.
smoke: $(VENV)/.installed
	$(PY) -m pytest -n 2 tests/test_structure.py tests/test_golden.py tests/test_quantize.py tests/test_conformance.py $(PYTEST)

bench: $(VENV)/.installed
	$(PY) -m bench run $(BENCH)

lint: $(VENV)/.linters
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

format: $(VENV)/.linters
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

notebooks: $(VENV)/.installed
	$(PY) -m jupytext --quiet --update --to ipynb notebooks/*.py
	$(PY) -m pytest -o addopts= -W default --nbmake --nbmake-timeout=60 notebooks

$(VENV)/.installed: pyproject.toml
	@python=$$($(FIND_PYTHON)); \
	if [ -z "$$python" ]; then echo "pallas_attn needs Python 3.12 or newer: none of python3, python3.13, python3.12 is one" >&2; exit 1; fi; \
	echo "setting up $(VENV) with $$python"; $$python -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check $(if $(JAX),"jax$(JAX)" "jaxlib$(JAX)") -e ".[$(EXTRAS)]"
	@touch $@

$(VENV)/.linters: $(VENV)/.installed
	$(PY) -m pip install --quiet --disable-pip-version-check "pip>=25.1"
	$(PY) -m pip install --quiet --group dev
	@touch $@

clean:
	rm -rf $(VENV) .venv-triton bench/out .pytest_cache .ruff_cache .hypothesis
