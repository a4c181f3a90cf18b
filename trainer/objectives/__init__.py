"""What pretraining minimises; one file an objective."""
