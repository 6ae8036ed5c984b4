# All targets set everything up themselves, into .venv; Python 3.11 or newer, pip and make must be there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test bench clean

run: .venv/ready
	$(BIN)/fedcustom compare recipes/docstrings.toml --methods full,lora,prefix --baselines centralised --jobs 2 --out runs/docstrings

test: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --dist loadgroup

# CASES="a e", REPEAT=3, THREADS=1 and TREC=folder choose what is measured; the peers are installed into build/peers.
bench: .venv/ready
	$(BIN)/python -m benchmarks $(CASES) $(if $(REPEAT),--repeat $(REPEAT)) $(if $(THREADS),--threads $(THREADS)) $(if $(TREC),--trec $(TREC))

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf .venv build dist runs .mypy_cache .ruff_cache .pytest_cache
