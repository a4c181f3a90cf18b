"""Model families (one file each), their loading, and LoRA adapters."""
