"""Checks that a relay's user can neither read what a silo keeps nor change what it keeps or runs."""
