"""The claim of a run, and its offline check."""
