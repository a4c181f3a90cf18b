"""What trains and travels: as bytes, as LoRA factors, on the warm base model, and merged into it."""
