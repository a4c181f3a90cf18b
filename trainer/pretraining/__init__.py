"""The training loop of one rank, and all that it needs of DeepSpeed."""
