"""A search over settings: its parameters, its trials under Ray Tune, its plot."""
