"""The paper's ablations on the embedded world: ablate.py runs them, study.py tabulates them."""
