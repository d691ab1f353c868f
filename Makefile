# make help: what there is to do here. Every target sets up .venv by itself, once.

PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python3.14; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1 && echo $$p && break; done)
BIN := .venv/bin
WORKERS ?= 2
PYTEST_ARGS ?=

# A path, not an import hook: a hook loses to the directory `tritium` that a script beside the clone finds first.
COMPAT := --config-settings editable_mode=compat

PROBLEM := Mia has 14 apples. She buys 3 bags with 6 apples each and gives 9 apples to Tom. How many apples does Mia have now?

.PHONY: help demo test check lint types layers size soak fuzz gpu clean
.DEFAULT_GOAL := help

help:
	@echo "make demo    ask the embedded model a word problem: its thinking, the answer, the speed"
	@echo "make test    everything: make check, then the tests (WORKERS=$(WORKERS), PYTEST_ARGS=...)"
	@echo "make check   lint, types, layers, size"
	@echo "make soak    ten minutes of every kind of client at a server whose engine is killed now and then, and at a full disk"
	@echo "make fuzz    2,000 and more requests made from the server's OpenAPI document"
	@echo "make identities  8,500 requests in all combinations of cache, drafts, batching and loop (minutes)"
	@echo "make schemas all JSON schemas through the embedded model (minutes)"
	@echo "make agents  200 tool-calling loops of the official clients with the embedded model (a minute or two)"
	@echo "make matrix  every kernel as the family launches it, compiled for all eight targets (minutes, no GPU)"
	@echo "make gpu     the tests that need a GPU"
	@echo "make clean   remove .venv and the caches"

demo: .venv/.run
	$(BIN)/tritium generate --chat --stats --temperature 0 "$(PROBLEM)"

test: check
	$(BIN)/pytest -n $(WORKERS) --dist worksteal --durations 10 $(PYTEST_ARGS)

check: lint types layers size

lint: .venv/.dev
	$(BIN)/ruff check --output-format concise

types: .venv/.dev
	$(BIN)/mypy

layers: .venv/.dev
	$(BIN)/lint-imports

size: .venv/.dev
	$(BIN)/pytest tests/test_house.py -k "size"

soak: .venv/.dev
	$(BIN)/python tests/chaos.py --seconds 600

fuzz: .venv/.dev
	$(BIN)/python tests/openapi_fuzz.py --cases 2000

.PHONY: schemas
schemas: .venv/.dev
	$(BIN)/pytest -m slow tests/test_structured.py $(PYTEST_ARGS)

.PHONY: identities
identities: .venv/.dev
	$(BIN)/pytest -m slow -n $(WORKERS) --dist worksteal -rP tests/test_traffic.py $(PYTEST_ARGS)

.PHONY: agents
agents: .venv/.dev
	$(BIN)/pytest -s -m slow tests/test_agents.py $(PYTEST_ARGS)

.PHONY: matrix
matrix: .venv/.dev
	$(BIN)/tritium doctor --compile all --quiet

gpu: .venv/.dev
	@$(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available() and "error: torch sees no GPU here")'
	$(BIN)/pytest -m gpu $(PYTEST_ARGS)

# The stamps are newer than pyproject.toml when what it asks for is installed.
.venv/.run: pyproject.toml | $(BIN)/pip
	@echo "--- installing Tritium into .venv (a minute or so; the largest part is torch)"
	$(BIN)/pip install -e . $(COMPAT)
	@touch $@

.venv/.dev: pyproject.toml | $(BIN)/pip
	@echo "--- installing Tritium and its tools into .venv (a minute or so; the largest part is torch)"
	$(BIN)/pip install -e '.[dev]' $(COMPAT)
	@touch .venv/.run $@

$(BIN)/pip:
ifeq ($(PYTHON),)
	@echo "error: Tritium needs Python 3.11 to 3.14, and none was found on the PATH" >&2
	@echo "hint: install one, or name it: make PYTHON=/path/to/python3.12" >&2
	@exit 1
else
	@echo "--- creating .venv with $(PYTHON): $$($(PYTHON) --version)"
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "error: $(PYTHON) cannot create a virtual environment (on Debian: apt install python3-venv)" >&2; exit 1; }
endif

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
