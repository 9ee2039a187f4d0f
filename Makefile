# Everything runs in .venv, made from python3 (3.11 or newer): `make PYTHON=python3.12 setup` for another one.
PYTHON ?= python3
BIN := .venv/bin
# Python compiles what it imports. To compile all of torch and transformers takes as long as to install them.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt

.PHONY: setup quickstart test lint gpu docs notebooks wheel ci-matrix bench integrations clean

quickstart: .venv/.train  ## fine-tune the embedded base model on word problems and show what came of it
	$(BIN)/python quickstart/run.py

test: .venv/.dev  ## the whole test suite, offline, on CPU
	$(BIN)/python -m pytest --numprocesses auto -W error

lint: .venv/.dev  ## style, types, and who may import whom
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/pyright

wheel: .venv/.dev  ## wheel and sdist in dist/, and tests with the installed wheel while the source tree is out of the way
	$(INSTALL) --editable ".[release]"
	$(BIN)/python .ci/wheel.py

ci-matrix:  ## the tests on every Python that is here, and with the oldest and newest versions: hours; `make ci-matrix JOBS=py3.12-pinned`
	$(PYTHON) .ci/matrix.py $(JOBS)

bench: .venv/.dev  ## step time of every method against full fine-tuning, side by side; writes benchmarks/results
	$(INSTALL) --editable ".[peers]"
	$(BIN)/python benchmarks/step_time.py

gpu: .venv/.dev  ## on a machine with a GPU: its tests, the copies of Offload(), step time and memory, a real model
	$(BIN)/python benchmarks/gpu.py $(if $(STAGES),--stages $(STAGES))

docs: .venv/.docs  ## the documentation site, strictly and offline, in build/docs/site
	$(BIN)/python docs/site/build.py

notebooks: .venv/.docs  ## run the notebooks, offline; what they show is saved in them
	$(BIN)/python docs/site/run_notebooks.py

FRAMEWORKS := $(patsubst integrations/%/install.sh,%,$(wildcard integrations/*/install.sh))

integrations: $(FRAMEWORKS:%=integrations-%)  ## the plug-ins inside the frameworks themselves, each in its own environment

integrations-%: integrations/%/install.sh
	test -x .venv-integrations/$*/bin/python || $(PYTHON) -m venv .venv-integrations/$*
	bash integrations/$*/install.sh .venv-integrations/$*/bin/python
	.venv-integrations/$*/bin/python -m pip install --quiet --no-deps --editable .
	.venv-integrations/$*/bin/python -m pytest integrations/$*

setup: .venv/.dev  ## install for development

.venv/.train: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(INSTALL) --editable ".[train]"
	touch $@

.venv/.dev: .venv/.train
	$(INSTALL) --editable ".[train,dev]"
	touch $@

.venv/.docs: .venv/.dev
	$(INSTALL) --editable ".[train,dev,docs]"
	touch $@

clean:
	rm -rf .venv build dist runs quickstart/out
