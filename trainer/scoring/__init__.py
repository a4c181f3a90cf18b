"""A model's figures and losses on records, whatever their task."""
