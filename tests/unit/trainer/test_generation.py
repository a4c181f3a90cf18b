"""Text of every family: tokens are those that the model makes likely, step by step, and an encoder writes none."""

import pytest
import torch

from configs.load import load
from trainer.data.tokenizer import load_tokenizer, special_tokens, train_tokenizer
from trainer.generation import generate
from trainer.models.families import new_model

DOCUMENTS = [f"the {name} ship sails to island number {number}" for number in range(40) for name in ("red", "old")]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    def tokenizer(objective):
        folder = tmp_path_factory.mktemp(objective)
        train_tokenizer(DOCUMENTS, 300, folder, objective, 64)
        return load_tokenizer(folder)

    return {objective: tokenizer(objective) for objective in ("causal", "masked", "span_corruption")}


def likeliest(model, ids, count):
    """The same without caches and without generate: the whole sequence again for every token."""
    start = [0] if model.config.is_encoder_decoder else ids
    written = list(start)
    for _ in range(count):
        given = {"input_ids": torch.tensor([ids if model.config.is_encoder_decoder else written])}
        if model.config.is_encoder_decoder:
            given["decoder_input_ids"] = torch.tensor([written])
        written.append(int(model(**given).logits[0, -1].argmax()))
        if written[-1] == 0:
            break
    return written[len(start) :]


@pytest.mark.parametrize("family", ["llama", "gpt2", "rnn", "lstm", "gru", "t5"])
def test_a_family_writes_what_its_logits_say(family, tokenizers):
    config = load("tiny", [f"model.family={family}", "tokenizer.vocab_size=300"])
    tokenizer = tokenizers[config.objective]
    model = new_model(config.model, len(tokenizer), 0, objective=config.objective).eval()
    pieces = []
    # As good as greedy, and so a function of the logits alone.
    text = generate(model, tokenizer, "the old ship", 12, 1e-6, 0, pieces.append)
    prompt = tokenizer.encode("the old ship", add_special_tokens=False)
    asked = [*prompt, tokenizer.get_vocab()["<extra_id_0>"], 0] if family == "t5" else [0, *prompt]
    with torch.no_grad():
        expected = tokenizer.decode(likeliest(model, asked, 12), skip_special_tokens=True)
    assert text == "".join(pieces)
    assert text.startswith("the old ship")
    assert text.removeprefix("the old ship") == expected


def test_an_encoder_says_that_it_writes_no_text(tokenizers):
    config = load("tiny", ["model.family=bert"])
    model = new_model(config.model, len(tokenizers["masked"]), 0, objective=config.objective)
    pieces = []
    text = generate(model, tokenizers["masked"], "the", 5, 1.0, 0, pieces.append)
    assert "encoder" in text
    assert "writes no text" in text
    assert pieces == [text]


def test_special_tokens_have_the_first_ids_and_are_told_from_text(tokenizers):
    for objective, tokenizer in tokenizers.items():
        names = special_tokens(objective, 64)
        assert tokenizer.convert_ids_to_tokens(range(len(names))) == names
        assert set(tokenizer.all_special_ids) == set(range(len(names)))
        assert len(tokenizer) <= 300
