#!/usr/bin/env bash
# The study of one table, many hours on two cores; the same command resumes. See study/ablate.py.
#   bash study/ablate.sh settings|ladder|curve|weights
cd "$(dirname "$0")/.."
exec ${PY:-.venv/bin/python} study/ablate.py "$@"
