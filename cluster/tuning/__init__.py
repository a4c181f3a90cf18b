"""A search over settings, from parameters to Ray Tune to the picture."""
