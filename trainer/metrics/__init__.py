"""Figures of a model on records; one file a kind."""
