"""Attacks on what was released, on public or made-up records only."""
