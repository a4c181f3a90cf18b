"""Metrics as bounded, noised sums: one vector that both ends must read alike."""
