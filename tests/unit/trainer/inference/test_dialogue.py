"""A dialogue: what a model reads of it, what is forgotten, and that what is said is text."""

import pytest

from configs.errors import InputError
from configs.load import load
from configs.schema.tasks import TaskSpec
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.inference.decoding import Decoding
from trainer.inference.dialogue import Dialogue
from trainer.models.families import new_model
from trainer.tasks.classification import ClassificationTask
from trainer.tasks.text import CausalTask

DOCUMENTS = [f"the {name} ship sails to island number {number}" for number in range(40) for name in ("red", "old")]
TEMPLATE = (
    "{% for message in messages %}<|endoftext|>{{ message.role }}\n{{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|endoftext|>assistant\n{% endif %}"
)


@pytest.fixture
def parts(tmp_path):
    train_tokenizer(DOCUMENTS, 300, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    model = new_model(load("tiny", ["tokenizer.vocab_size=300"]).model, len(tokenizer), 1).eval()
    return model, tokenizer, CausalTask(tokenizer, 96)


@pytest.fixture
def read(parts):
    """What the model has read, prompt by prompt."""
    seen = []
    generate = parts[0].generate
    parts[0].generate = lambda **given: (seen.append(given["input_ids"][0].tolist()), generate(**given))[1]
    return seen


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_model_reads_all_that_was_said_until_it_is_reset(template, parts, read):
    tokenizer = parts[1]
    tokenizer.chat_template = template
    dialogue, first, decoding = Dialogue(*parts), [], Decoding(6)
    assert dialogue.plain == (template is None)
    dialogue.answer("the old ship <|endoftext|>", decoding, first.append)
    dialogue.answer("which?", decoding, lambda _: None)
    text = tokenizer.decode(read[1])
    answer = "".join(first).strip()
    assert answer
    if template is None:
        assert text.endswith(f"User: the old ship <|endoftext|>\nAssistant: {answer}\nUser: which?\nAssistant:")
    else:
        assert f"user\nthe old ship <|endoftext|>\n<|endoftext|>assistant\n{answer}\n<|endoftext|>user" in text
    ends = read[1].count(tokenizer.eos_token_id)
    assert ends == (1 if template is None else 4)  # none of them is what was said
    dialogue.reset()
    dialogue.answer("which?", decoding, lambda _: None)
    assert "old ship" not in tokenizer.decode(read[2])


def test_the_oldest_turns_are_forgotten_and_a_line_too_long_is_refused(parts, read):
    dialogue = Dialogue(*parts)
    for number in range(8):
        dialogue.answer(f"the ship {number}", Decoding(6), lambda _: None)
    last = parts[1].decode(read[-1])
    assert "the ship 7" in last
    assert "the ship 0" not in last
    assert all(len(ids) <= 90 for ids in read)
    with pytest.raises(InputError, match="the model's context is 96; give a shorter one"):
        dialogue.answer("the ship " * 96, Decoding(6), lambda _: None)
    dialogue.answer("the ship 8", Decoding(6), lambda _: None)
    assert "the ship 7" in parts[1].decode(read[-1])


def test_an_interrupted_answer_is_kept_as_far_as_it_was_shown(parts, read):
    dialogue, shown = Dialogue(*parts), []

    def interrupted(text):
        shown.append(text)
        if len(shown) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dialogue.answer("the ship", Decoding(12), interrupted)
    dialogue.answer("and then?", Decoding(6), lambda _: None)
    assert f"Assistant: {''.join(shown).strip()}\nUser: and then?" in parts[1].decode(read[-1])


def test_a_model_that_writes_nothing_is_refused(parts):
    model, tokenizer, _ = parts
    spec = TaskSpec(name="classification", labels=("no", "yes"))
    with pytest.raises(InputError, match="trained for 'classification' and writes no text"):
        Dialogue(model, tokenizer, ClassificationTask(tokenizer, 64, spec))
