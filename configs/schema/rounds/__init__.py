"""Rules about a federation's rounds, beside the file of their settings."""
