"""Tokenizers with the chat templates that people meet, made small."""

from tokenizers import AddedToken

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
