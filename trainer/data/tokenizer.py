"""Byte-level BPE (Hugging Face tokenizers), trained on public text only."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

END_OF_TEXT = "<|endoftext|>"


def train_tokenizer(documents: Iterable[str], vocab_size: int, directory: Path) -> Any:
    """Trains a tokenizer and saves it as a Hugging Face directory.

    Args:
        documents: PUBLIC texts; a vocabulary learnt from private text would publish its words.
        vocab_size: tokens, the end-of-text token (id 0) included.
        directory: where to save.

    Returns:
        A transformers ``PreTrainedTokenizerFast``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )
    wrapped.save_pretrained(directory)
    return wrapped


def first_token(tokenizer: Any) -> int:
    """The token before a text's first one: what the tokenizer itself puts there, or else end-of-text."""
    added = tokenizer.backend_tokenizer.encode("", add_special_tokens=True).ids
    return int(added[0] if added else tokenizer.eos_token_id)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a tokenizer or model directory."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)
