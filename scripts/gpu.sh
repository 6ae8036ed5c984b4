#!/usr/bin/env bash
# What needs a GPU, in under eight minutes: the tests marked gpu, and benchmark case (f).
#   scripts/gpu.sh [FOLDER]        results in FOLDER (build/gpu): tests.txt, f.json
#   scripts/gpu.sh FOLDER --dry-run   tiny models on a CPU; the tests skip
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-build/gpu}
python=${PYTHON:-.venv/bin/python}
mkdir -p "$out"
"$python" -m pytest -q -m gpu -n 0 tests/methods/tuning/test_gpu.py 2>&1 | tee "$out/tests.txt" || true   # the figures are wanted in any case
"$python" -m benchmarks.cases.gpu "${MODELS:-$out/models}" --seconds 270 "${@:2}" | tee "$out/f.json"
