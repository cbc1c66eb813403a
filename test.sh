#!/usr/bin/env bash
# Fresh machine -> environment -> the whole test suite. Two CPU cores are enough.
set -euo pipefail
cd "$(dirname "$0")"
PY=.venv/bin/python
[ -x $PY ] || python3 -m venv .venv
$PY -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
# Plain `pytest` skips what it has no oracle for; here the oracles must be there.
$PY -c "import transformers, peft, trl.trainer.grpo_trainer, hypothesis, jinja2, pyarrow, tifffile"
.venv/bin/ruff check .
# The models are tiny: threads would only wait for each other.
export OMP_NUM_THREADS=1
exec $PY -m pytest -q -rs --durations 10 "$@"
