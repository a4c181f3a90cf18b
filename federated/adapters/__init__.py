"""LoRA adapters: as bytes, as factors, and on the warm base model."""
