"""One file for each data set: (root, split) -> Records."""
