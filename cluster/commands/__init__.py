"""The command line of a run: one file per family of commands."""
