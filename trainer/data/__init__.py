"""From sources to packed token files: reading, cleaning, de-identification, tokenizer, packing, order."""
