"""Byte-level BPE (Hugging Face tokenizers), trained on public text only."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from configs.imports import import_large
from configs.schema.pretrain import Objective

END_OF_TEXT, MASK = "<|endoftext|>", "<|mask|>"
NOISE_SHARE, MEAN_SPAN = 0.15, 3  # of span corruption (Raffel et al. 2020, section 3.3.4)


def special_tokens(objective: Objective, context_length: int) -> list[str]:
    """The special tokens of an objective, which have the first ids, in this order."""
    if objective in ("masked", "next_sentence"):
        return [END_OF_TEXT, MASK]
    if objective == "span_corruption":
        return [END_OF_TEXT, *(f"<extra_id_{number}>" for number in range(num_spans(context_length)))]
    return [END_OF_TEXT]


def num_spans(length: int) -> int:
    """Spans that are cut out of so many tokens; each needs a sentinel of its own."""
    return max(1, round(num_noise(length) / MEAN_SPAN))


def num_noise(length: int) -> int:
    """Tokens that are cut out of so many."""
    return max(1, round(length * NOISE_SHARE))


def train_tokenizer(
    documents: Iterable[str],
    vocab_size: int,
    directory: Path,
    objective: Objective = "causal",
    context_length: int = 0,
) -> Any:
    """Trains a tokenizer and saves it as a Hugging Face directory.

    Args:
        documents: PUBLIC texts; a vocabulary learnt from private text would publish its words.
        vocab_size: tokens, the special ones included; end-of-text has id 0.
        directory: where to save.
        objective: decides the special tokens, and which of them stand around a text where transformers adds them.
        context_length: the longest sequence.

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
        special_tokens=special_tokens(objective, context_length),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    further = _roles(tokenizer, objective, context_length)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT, **further
    )
    wrapped.save_pretrained(directory)
    return wrapped


def _roles(tokenizer: Any, objective: Objective, context_length: int) -> dict[str, Any]:
    """Names what the special tokens are for, and sets what stands around a text, as BERT and T5 have it."""
    from tokenizers.processors import TemplateProcessing

    end, known = END_OF_TEXT, [(END_OF_TEXT, 0)]
    if objective in ("masked", "next_sentence"):
        pair = f"{end} $A {end} $B:1 {end}:1"
        tokenizer.post_processor = TemplateProcessing(single=f"{end} $A {end}", pair=pair, special_tokens=known)
        names = ["input_ids", "token_type_ids", "attention_mask"]
        return {"cls_token": end, "sep_token": end, "mask_token": MASK, "model_input_names": names}
    if objective == "span_corruption":
        tokenizer.post_processor = TemplateProcessing(
            single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=known
        )
        return {"extra_special_tokens": special_tokens(objective, context_length)[1:]}
    return {}


def first_token(tokenizer: Any) -> int:
    """The token before a text's first one: what the tokenizer itself puts there, or else end-of-text."""
    added = tokenizer.backend_tokenizer.encode("", add_special_tokens=True).ids
    return int(added[0] if added else tokenizer.eos_token_id)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer of a tokenizer or model directory."""
    import_large("transformers")
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)
