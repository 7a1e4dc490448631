# Everything runs in .venv, which the first target that needs it creates (a few minutes) and later ones reuse.
#
#   make demo         build SmolLM2-135M-Instruct, print the before/after table and a sample of its text
#   make test         all tests but the slow ones and those that need other runtimes; TESTS= and PYTEST= narrow it
#   make test-all     every test: real models from PyPI, onnxruntime-genai, Node clients from npm
#   make lint types   ruff; mypy --strict
#   make wheel-check  build the wheel, install it elsewhere, import every subpackage
#   make docs         write docs/reference from the code, build the site into site/
#   make docs-check   build the site; a link or an anchor that leads nowhere is an error
#   make bench        times of exports, calibration, decoders and encoders, side by side with other tools

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/pip --disable-pip-version-check
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TESTS ?= tests
PYTEST ?= -m "not slow and not client"
DEMO_MODEL ?= smollm2-135m-instruct
MKDOCS := NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs

.PHONY: demo test test-all lint types wheel-check docs docs-check bench clean

demo: $(VENV)/.export
	$(VENV)/bin/onnxpress build $(DEMO_MODEL) -o demo/$(DEMO_MODEL)
	$(VENV)/bin/onnxpress run demo/$(DEMO_MODEL) "Write one sentence about the sea." --max-tokens 40

test: $(VENV)/.dev
	$(VENV)/bin/pytest $(TESTS) $(PYTEST)

test-all: $(VENV)/.dev $(VENV)/.clients
	$(VENV)/bin/pytest $(TESTS)

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

types: $(VENV)/.dev
	$(VENV)/bin/mypy

wheel-check: $(VENV)/.dev
	$(VENV)/bin/pytest tests/house/test_wheel.py

docs: $(VENV)/.docs
	$(VENV)/bin/python docs/generate.py
	$(MKDOCS) build

docs-check: $(VENV)/.docs
	$(MKDOCS) build --strict

bench: $(VENV)/.clients
	$(VENV)/bin/python -m benchmarks

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# torch comes first, from a CPU build, so that nothing after it pulls the CUDA packages: the plain index where it has one
# (a local wheel folder counts), then PyTorch's own CPU index, then whatever the platform's default is (macOS: a CPU build).
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt torch==2.13.0+cpu 2>/dev/null \
	  || $(PIP) install -q -c constraints.txt torch==2.13.0 --extra-index-url $(TORCH_INDEX)
	@touch $@

$(VENV)/.export: $(VENV)/.torch setup.cfg constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[export]'
	@touch $@

$(VENV)/.dev: $(VENV)/.export setup.cfg constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[test,lint,wheel]'
	@touch $@

$(VENV)/.clients: $(VENV)/.export setup.cfg constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[clients]'
	@touch $@

# Without torch: the reference is made of the passes, the profiles and the recipes alone.
$(VENV)/.docs: setup.cfg constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt -e '.[docs]'
	@touch $@

clean:
	rm -rf $(VENV) build dist demo site src/*.egg-info
