#!/usr/bin/env bash
# The study of one table, hours on two cores; the same command resumes. See study/ablate.py.
#   bash study/ablate.sh start|reward|weight|stability|map
cd "$(dirname "$0")/.."
exec ${PY:-.venv/bin/python} study/ablate.py "$@"
