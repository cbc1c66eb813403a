"""The ablations: ablate.sh runs them, study.py tells them. See README.md."""
