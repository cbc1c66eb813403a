#!/usr/bin/env bash
# Fresh machine -> environment -> the whole test suite. Two CPU cores are enough. Plain `pytest` skips what it has no oracle for; this does not.
set -euo pipefail
cd "$(dirname "$0")"
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
.venv/bin/python -c "import transformers, hypothesis, jinja2"          # the oracles must be there
.venv/bin/ruff check .
export OMP_NUM_THREADS=1                                             # the models are tiny: threads would only wait for each other
exec .venv/bin/python -m pytest -q -rs --durations 10 "$@"
