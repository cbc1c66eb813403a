#!/usr/bin/env bash
# Fresh machine -> environment -> the whole test suite. Two CPU cores are enough.
#   bash test.sh                 under 15 minutes
#   NIGHTLY=1 bash test.sh       200 kills in place of 10, 10,000 random cases a test: hours
set -euo pipefail
cd "$(dirname "$0")"
PY=.venv/bin/python
[ -x $PY ] || python3 -m venv .venv
$PY -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
# Plain `pytest` skips what it has no oracle for; here the oracles must be there.
$PY -c "import transformers, peft, trl.trainer.grpo_trainer, hypothesis, jinja2, matplotlib,\
  pyarrow, rasterio, tifffile"
.venv/bin/ruff check .
# The models are tiny: threads would only wait for each other.
export OMP_NUM_THREADS=1 NIGHTLY="${NIGHTLY:-}"
# A worker a core; a file stays with one worker, for its fixtures train models.
exec $PY -m pytest -q -rs -n 2 --dist loadfile --durations 15 "$@"
