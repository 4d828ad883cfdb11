# `make demo` and `make test` install what they need, then run. PYTHON=python3.12 chooses another Python.
PYTHON ?= python3
VENV := .venv
STUDIO := .venv-studio
BIN := $(VENV)/bin
PIP := -m pip --disable-pip-version-check install --no-deps
UV := .venv-lock/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate
SUPPORTED := import sys; (3, 11) <= sys.version_info < (3, 14) or sys.exit("needs Python 3.11 to 3.13: make PYTHON=...")

.PHONY: install demo test lint serve lock clean

install: $(VENV)/installed  # the `firstrow` command alone, in .venv/bin

demo: $(VENV)/installed $(STUDIO)/installed  # the whole loop; DATA=folder, ARGS=--exit
	$(BIN)/firstrow demo $(if $(DATA),--data "$(DATA)") $(ARGS)

# Threads that wait for the next piece of work must not spin: three processes share the cores.
test: lint $(STUDIO)/installed  # what CI runs; ARGS="-k store"
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check backend model tests
	$(BIN)/ruff format --check backend model tests
	$(BIN)/mypy

serve: $(VENV)/installed
	$(BIN)/firstrow serve $(ARGS)

$(VENV)/installed: requirements/firstrow.txt pyproject.toml
	@test -x $(BIN)/pip || $(PYTHON) -c '$(SUPPORTED)'
	test -x $(BIN)/pip || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python $(PIP) --require-hashes -r requirements/firstrow.txt
	$(BIN)/python $(PIP) --no-build-isolation -e .
	touch $@

$(STUDIO)/installed: requirements/studio.txt
	@test -x $(STUDIO)/bin/pip || $(PYTHON) -c '$(SUPPORTED)'
	test -x $(STUDIO)/bin/pip || $(PYTHON) -m venv --clear $(STUDIO)
	$(STUDIO)/bin/python $(PIP) --require-hashes -r requirements/studio.txt
	touch $@

# Lists of name==version and hashes for Python 3.11 to 3.13. label-studio-ml's old pins are lifted in pyproject.toml.
lock:
	$(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip --disable-pip-version-check install -q uv
	$(UV) --extra dev --constraints requirements/constraints.txt -o requirements/firstrow.txt pyproject.toml
	$(UV) -o requirements/studio.txt requirements/studio.in

clean:
	rm -rf $(VENV) $(STUDIO) .venv-lock .demo
