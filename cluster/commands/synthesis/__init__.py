"""The command that writes records of a model's own."""
