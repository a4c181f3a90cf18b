"""Commands that fit how a finished model's answers are read."""
