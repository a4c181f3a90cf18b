"""The adapter: as bytes, as LoRA factors, on the warm base model."""
