"""Commands that write a finished model for other programs."""
