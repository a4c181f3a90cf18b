"""The pipeline, its estimate, the preflight and the report."""
