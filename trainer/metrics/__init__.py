"""Measures of a model on records: one file per metric."""
