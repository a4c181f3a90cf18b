"""Sources, cleaning, tokenizer and packed token files."""
