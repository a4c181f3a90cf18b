"""Checks that a relay's user can read, change and stop nothing of a silo's."""
