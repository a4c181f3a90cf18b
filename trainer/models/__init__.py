"""One file a family; load; LoRA adapters."""
