# Needs only Python >= 3.11, git and make: every target makes its own virtual environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Two test processes with one thread each beat one process with two threads.
TEST_ENV := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 MPLBACKEND=Agg

.PHONY: demo dist benchmark-demo app docs test lint format install dev clean

install: $(VENV)/.installed
dev: $(VENV)/.installed-dev

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[dev]"
	touch $@ $(VENV)/.installed

$(VENV)/.installed-train: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[train]"
	touch $@ $(VENV)/.installed

# Three long prompts on the embedded model, stock to the best side by side, each object checked: outputs/demo.png
demo: $(VENV)/.installed-train
	$(BIN)/fixclip demo -o outputs/demo.png

$(VENV)/.installed-benchmark: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[train,judge]"
	touch $@ $(VENV)/.installed

# Scenes as a benchmark of questions, drawn by the embedded model, judged exactly and by a judge that errs:
# outputs/benchmark-demo/report.html
benchmark-demo: $(VENV)/.installed-benchmark
	$(BIN)/python pipelines/benchmark_demo/run.py -o outputs/benchmark-demo

$(VENV)/.installed-app: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[app]"
	touch $@ $(VENV)/.installed

# The web page, on http://127.0.0.1:7860; see docs/app.md for its options.
app: $(VENV)/.installed-app
	$(BIN)/fixclip-app

$(VENV)/.installed-docs: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -e ".[docs]"
	touch $@ $(VENV)/.installed

# The documentation site: build/site/index.html. A broken link or reference ends it. While you write: mkdocs serve.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 HF_HUB_OFFLINE=1 $(BIN)/mkdocs build --strict

# What a release is made of: dist/, looked at, installed in an environment of its own (build/wheel), and drawn with.
dist: $(VENV)/.installed-dev
	rm -rf dist build/wheel
	$(BIN)/python -W error::DeprecationWarning:setuptools -m build
	$(BIN)/twine check --strict dist/*
	test $$(stat -c %s dist/*.whl) -lt 45000000
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/pip install --quiet dist/*.whl
	cd build/wheel && bin/fixclip doctor && bin/fixclip demo --steps 5 -o demo.png

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(TEST_ENV) $(BIN)/pytest -n 2 --dist loadfile

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info outputs
