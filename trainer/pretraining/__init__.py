"""One rank's loop and all that it needs of DeepSpeed."""
