"""Llama: a decoder with rotary positions and gated layers (Touvron et al. 2023)."""

from typing import Any

from configs.schema.pretrain import ModelSettings


def model_config(settings: ModelSettings, vocab_size: int, dropout: float = 0.0) -> Any:
    """The transformers configuration; embeddings and head are not tied, so that the head can have an adapter."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        intermediate_size=settings.intermediate_size,
        max_position_embeddings=settings.context_length,
        tie_word_embeddings=False,
        use_cache=False,
        attention_dropout=dropout,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
