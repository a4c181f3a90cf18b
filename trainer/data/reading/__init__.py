"""Reading of sources: which files, their encodings, and the rows of each format."""
