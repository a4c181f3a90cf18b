"""Checks before or beside a run: the machine, the cost, the exact resume, the privacy audit."""
