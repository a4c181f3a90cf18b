"""Commits of a run's sharded state: written in the background, found again, read by other numbers of ranks."""
