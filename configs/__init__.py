"""The settings of a run, and what all packages share: errors, names of files, storage, events."""
