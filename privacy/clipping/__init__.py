"""Per-record gradients and their clipped sum, and the proof at start that they are right."""
