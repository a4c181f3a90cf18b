"""The coordinator's side of secure aggregation: a round's sum in five exchanges, and what is kept of it on disk."""
