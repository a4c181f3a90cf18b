"""What of a model's texts is no record."""

import pytest

from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.inference.generation import Drawn
from trainer.synthesis.filters import Filter


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer([f"the old ship sails to island number {number}" for number in range(40)], 300, folder)
    return load_tokenizer(folder)


def drawn(text, ids=None, ended=True):
    return Drawn(tuple(ids or range(10, 10 + len(text.split()))), text, ended)


@pytest.mark.parametrize(
    ("one", "fault"),
    [
        (drawn("the old ship sails away"), ""),
        (drawn("Das alte Schiff fährt nach Süden."), ""),
        (drawn("古い船は島へ行く", range(10, 18)), ""),
        (drawn("the old ship sails", ended=False), "no end"),
        (drawn("the ship"), "too short"),
        (drawn("  \n ", range(10, 20)), "too short"),
        (drawn("the ship the ship the ship the ship", [11, 12] * 8), "repeats itself"),
        (drawn("no no no no yes", [11, 11, 11, 11, 12]), "repeats itself"),
        (drawn("the old ship sails", [11, 0, 12, 13, 14]), "special tokens"),
        (drawn("the old <|endoftext|> ship", range(10, 16)), "special tokens"),
        (drawn("the old sh\N{REPLACEMENT CHARACTER}p sails"), "unreadable"),
        (drawn("the old \x1b[31m ship sails"), "unreadable"),
        (drawn("-- == !! ?? .. a"), "unreadable"),
    ],
)
def test_a_text_is_dropped_for_what_it_is(tokenizer, one, fault):
    assert Filter(tokenizer, full=False).fault(one) == fault


def test_where_the_context_ends_a_text_it_is_as_whole_as_training_records_are(tokenizer):
    one = drawn("the old ship sails", ended=False)
    assert Filter(tokenizer, full=True).fault(one) == ""
