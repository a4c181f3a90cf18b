"""BERT: an encoder, in which every token sees all others (Devlin et al. 2019)."""

from typing import Any

from configs.schema.pretrain import ModelSettings


def model_config(settings: ModelSettings, vocab_size: int, dropout: float = 0.0) -> Any:
    """The transformers configuration; embeddings and head are tied, as BERT's are."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocab_size,
        hidden_size=settings.hidden_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        intermediate_size=settings.intermediate_size,
        max_position_embeddings=settings.context_length,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
