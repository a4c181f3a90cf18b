"""GPT-2: learned positions, LayerNorm, a feed-forward layer without a gate (Radford et al. 2019)."""

from typing import Any

from configs.schema.pretrain import ModelSettings


def model_config(settings: ModelSettings, vocab_size: int, dropout: float = 0.0) -> Any:
    """The transformers configuration; embeddings and head are not tied, so that the head can have an adapter."""
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=vocab_size,
        n_embd=settings.hidden_size,
        n_layer=settings.layers,
        n_head=settings.heads,
        n_inner=settings.intermediate_size,
        n_positions=settings.context_length,
        tie_word_embeddings=False,
        use_cache=False,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        summary_first_dropout=dropout,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
