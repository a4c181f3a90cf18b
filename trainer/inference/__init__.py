"""What models write and predict, for commands and services."""
