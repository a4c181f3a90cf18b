"""T5: an encoder and a decoder, with positions relative to each other (Raffel et al. 2020)."""

from typing import Any

from configs.schema.pretrain import ModelSettings


def model_config(settings: ModelSettings, vocab_size: int, dropout: float = 0.0) -> Any:
    """The transformers configuration, with the gated layers of version 1.1; embeddings and head are tied."""
    from transformers import T5Config

    return T5Config(
        vocab_size=vocab_size,
        d_model=settings.hidden_size,
        d_kv=settings.hidden_size // settings.heads,
        d_ff=settings.intermediate_size,
        num_layers=settings.layers,
        num_heads=settings.heads,
        feed_forward_proj="gated-gelu",
        use_cache=False,
        dropout_rate=dropout,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        decoder_start_token_id=0,
    )
