"""Tokenizers with the chat templates that people meet, made small."""

import torch
from tokenizers import AddedToken
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.data.embedded import python_docs
from trainer.data.tokenizer import load_tokenizer, train_tokenizer

CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
INSTRUCTIONS = (  # trimmed words, spaces before the end of an answer, turns that must alternate, no system
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('turns must alternate: ' + m['content']) }}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
DATED = "{{ strftime_now('%d %b %Y') + '\n' }}" + CHATML
VOCABULARY = 320


def tokenizer_of(folder, template=CHATML, *, special=True):
    """A byte-level tokenizer with the tokens of turns, which are called special ones or not."""
    made = train_tokenizer((row["text"] for row, _ in zip(python_docs(), range(20), strict=False)), 300, folder)
    turns = [AddedToken(text, special=special) for text in ("<|im_start|>", "<|im_end|>")]
    made.add_tokens(turns, special_tokens=special)
    made.chat_template = template
    made.save_pretrained(folder)
    return load_tokenizer(folder)


def small_decoder():
    """A Llama of random weights, the same each time, for such a tokenizer."""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)
