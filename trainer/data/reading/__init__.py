"""One reader per format: the rows of a file as they are, or one line that says why not, without a value of any row."""
