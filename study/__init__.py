"""The ablations of the paper on the embedded world: ablate.py runs them, study.py tabulates them."""
