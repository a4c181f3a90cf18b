"""The command line of a run, one file a family of commands."""
