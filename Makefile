# Everything a newcomer needs: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
STUDIO := .venv-studio
BIN := $(VENV)/bin
LOCKS := requirements/firstrow.txt requirements/studio.txt

.PHONY: demo test lint serve lock clean

demo: $(VENV)/installed $(STUDIO)/installed  ## the whole loop; DATA=folder, ARGS=--exit
	$(BIN)/firstrow demo $(if $(DATA),--data "$(DATA)") $(ARGS)

test: lint $(STUDIO)/installed  ## what CI runs
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check backend model tests
	$(BIN)/ruff format --check backend model tests
	$(BIN)/mypy

serve: $(VENV)/installed
	$(BIN)/firstrow serve

$(VENV)/installed: requirements/firstrow.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --require-hashes -r requirements/firstrow.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(STUDIO)/installed: requirements/studio.txt
	test -x $(STUDIO)/bin/python || $(PYTHON) -m venv $(STUDIO)
	$(STUDIO)/bin/python -m pip install --disable-pip-version-check --no-deps --require-hashes -r requirements/studio.txt
	touch $@

# Plain lists of name==version --hash, for Python 3.11 to 3.13. label-studio-ml's pins are lifted in pyproject.toml.
lock:
	$(PYTHON) -m venv .venv-lock && .venv-lock/bin/pip install --disable-pip-version-check -q uv
	.venv-lock/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	  --extra dev --constraints requirements/constraints.txt -o requirements/firstrow.txt pyproject.toml
	.venv-lock/bin/uv pip compile -q --universal --python-version 3.11 --generate-hashes --no-header --no-annotate \
	  -o requirements/studio.txt requirements/studio.in

clean:
	rm -rf $(VENV) $(STUDIO) .venv-lock .demo
