"""Many silos on one machine, and what is allowed on public data alone: no noise, evaluation in the clear."""
