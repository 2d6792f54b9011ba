# make demo   set up, compile the digits example to W4A8, check it, draw digits.png
# make test   set up, run the tests
# make screenshots  compile the digits example, write the pictures of docs/images (needs Chromium)
# make check  set up, run the linters, the type checker and the tests
# make quick  set up, run the linters, the type checker and the tests that compile nothing
# make docs   set up, check the generated pages and all links, build the site into build/site
# make fuzz   set up, mutate .qmod files and inputs for two minutes
# make dist-check  build wheel and sdist, install the wheel into an empty environment and use it there
#
# Variables: PYTHON (the interpreter that makes the environment), VENV (its folder), PYTEST_FLAGS.
# To use an environment that is active already: make test VENV="$VIRTUAL_ENV" (the package is installed into it).

.POSIX:

PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?=
BIN = $(VENV)/bin
STAMP = $(VENV)/.edadm-installed
MODEL = examples/digits/model.pt

QUICK = tests/ir tests/quant tests/evaluate tests/calibration tests/test_config.py tests/test_layering.py tests/test_methods.py

.PHONY: help venv demo test lint check quick docs fuzz dist-check screenshots clean

help:
	@sed -n '1,/^$$/s/^# \{0,1\}//p' Makefile

venv: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev,docs]'
	touch $(STAMP)

demo: venv
	$(BIN)/edadm-compile $(MODEL) --w4a8 -o unet.qmod
	$(BIN)/edadm-compile inspect unet.qmod
	$(BIN)/edadm-compile verify unet.qmod --reference $(MODEL)
	$(BIN)/edadm-compile sample unet.qmod -n 40 --reference $(MODEL) -o digits.png

# One thread: the tests run thousands of tiny operators, which OpenMP only slows down.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python benchmarks/render.py --check

check: lint test

screenshots: venv
	$(BIN)/python -m pip install -c constraints.txt -e '.[browser]'
	$(BIN)/python benchmarks/docs/screenshots.py

quick: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PYTEST_FLAGS) $(QUICK)

# mkdocs advertises its successor unless told not to. No --quiet: it hides warnings from `strict`, which then fails for nothing.
docs: venv
	$(BIN)/python docs/tools/cli.py --check
	$(BIN)/python docs/tools/links.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	$(BIN)/python docs/tools/site.py build/site

fuzz: venv
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.robustness.fuzz_qmod --seconds 90
	OMP_NUM_THREADS=1 $(BIN)/python -W ignore -m benchmarks.robustness.fuzz_inputs --seconds 30

dist-check: venv
	PYTHON=$(BIN)/python .ci/dist

# Removes what the targets above made; VENV only when it is the default one.
clean:
	rm -rf .venv build dist edadm_compile.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	rm -f unet.qmod digits.png
	find edadm_compile tests examples -name __pycache__ -type d -prune -exec rm -rf {} +
