"""Llama: a new model from the settings, and how large it is."""

from typing import Any

import torch

from configs.schema.pretrain import ModelSettings


def model_config(settings: ModelSettings, vocab_size: int, dropout: float = 0.0) -> Any:
    """The transformers configuration of a Llama-style decoder; embeddings and head are not tied.

    Dropout belongs to pretraining, not to the model: what is exported, and then trained under DP, has none.
    """
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


def new_model(settings: ModelSettings, vocab_size: int, seed: int, dropout: float = 0.0) -> Any:
    """A model with random float32 weights that depend on the seed alone."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(
            model_config(settings, vocab_size, dropout), dtype=torch.float32, attn_implementation=attention()
        )


def attention() -> str:
    """Attention kernel: on a CPU, at these sizes, plain matrix products beat torch's fused kernel."""
    return "sdpa" if torch.cuda.is_available() else "eager"


def empty_model(settings: ModelSettings, vocab_size: int) -> Any:
    """A model whose parameters have shapes and no values, on torch's device ``meta``."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config(settings, vocab_size))


def parameter_sizes(settings: ModelSettings, vocab_size: int) -> list[int]:
    """Number of values of each parameter, without allocating them."""
    return [parameter.numel() for parameter in empty_model(settings, vocab_size).parameters()]
