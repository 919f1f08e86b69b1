# Two commands for a newcomer: `make demo` and `make test`. Each makes its own environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test check fmt bench clean

demo: $(VENV)/.demo
	$(BIN)/qnext generate

test: $(VENV)/.test
	$(BIN)/python -m pytest

check: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

fmt: $(VENV)/.test
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.test
	$(BIN)/qnext bench --against transformers

clean:
	rm -rf $(VENV)

$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and alone, so that the pinned build is the one everything else sees.
$(VENV)/.demo: $(VENV)/.venv pyproject.toml constraints.txt
	$(PIP) torch
	$(PIP) -e '.[cpu]'
	# Compiles the loops for prompts and decoding, once per machine (about half a minute).
	$(BIN)/qnext generate --max-tokens 4 > /dev/null
	touch $@

$(VENV)/.test: $(VENV)/.demo
	$(PIP) -e '.[test,check]'
	$(PIP) --no-deps --upgrade --target $(VENV)/hf4 transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2
	touch $@
