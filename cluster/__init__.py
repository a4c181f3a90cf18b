"""Ray, and the pipeline that strings the stages together."""
