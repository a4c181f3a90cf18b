"""Accounting: from the schedule of a run's releases to epsilon."""
