"""Tags of words: how they stand at pieces, what is counted of whole entities, and what is refused."""

import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_bert import CONTEXT, word_pieces
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from configs.errors import InputError
from configs.parse import parse
from configs.schema.federated import FederatedSettings
from configs.schema.silo import SiloDataSettings
from configs.schema.tasks import TaskSpec
from federated.silo.units import rows_of
from trainer.data.tokenizer import train_tokenizer
from trainer.metrics import entities as by_seqeval
from trainer.scoring.score import score
from trainer.tasks.entities import EntitiesTask, entities
from trainer.tasks.task import IGNORED

TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
SPEC = TaskSpec(name="entities", labels=TAGS)
WORDS = ("Ada", "Lovelace", "lived", "in", "Ockham", ",", "unbelievably", "near")


@pytest.fixture(scope="module")
def task():
    return EntitiesTask(word_pieces(["ada love lace lived in ockham near un believ ably"] * 3, 60), CONTEXT, SPEC)


def row(words=WORDS, tags=(1, 2, 0, 0, 3, 0, 0, 0)):
    return {"tokens": tuple(words), "tags": tuple(tags)}


def pieces(task, example):
    return task._tokenizer.convert_ids_to_tokens(list(example.ids))


def test_the_first_piece_of_a_word_carries_its_tag(task):
    (example,) = task.examples([row()])
    carried = [(piece, tag) for piece, tag in zip(pieces(task, example), example.target, strict=True) if tag != IGNORED]
    assert [tag for _, tag in carried] == [1, 2, 0, 0, 3, 0, 0, 0]
    assert not any(piece.startswith("##") for piece, _ in carried)
    assert any(piece.startswith("##") for piece in pieces(task, example))
    assert example.target[0] == example.target[-1] == IGNORED  # [CLS] and [SEP]
    assert not example.truncated


@pytest.mark.parametrize("prefix", [False, True])
def test_pieces_that_begin_with_a_blank_are_their_words(tmp_path, prefix):
    tokenizer = train_tokenizer(["Ada Lovelace lived in Ockham, unbelievably near"] * 3, 300, tmp_path)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    (example,) = EntitiesTask(tokenizer, CONTEXT, SPEC).examples([row()])
    assert [tag for tag in example.target if tag != IGNORED] == list(row()["tags"])


def test_words_beyond_the_context_are_cut(task):
    long = row(["n"] * 100, [3] + [4] * 99)
    (example,) = task.examples([long])
    assert (len(example.ids), example.truncated) == (CONTEXT, True)
    assert [tag for tag in example.target if tag != IGNORED] == [3] + [4] * (CONTEXT - 3)


@given(st.lists(st.text(max_size=12), min_size=1, max_size=12))
def test_any_words_keep_their_order_and_need_no_piece(task, words):
    tags = [number % 5 for number in range(len(words))]
    for example in task.examples([row(words, tags)]):
        kept = iter(tags)
        assert all(tag in kept for tag in example.target if tag != IGNORED)  # a subsequence
        assert len(example.ids) <= CONTEXT


def test_a_row_whose_words_the_tokenizer_drops_is_no_example(task):
    assert task.examples([row(["\u200b"], [0])]) == ()


def test_special_tokens_in_a_word_are_text(task):
    (example,) = task.examples([row(["[SEP]", "[PAD]"], [0, 0])])
    assert example.ids.count(3) == 1
    assert 0 not in example.ids


class Says:
    """A model that answers with given tags at the places of words."""

    config = SimpleNamespace()

    def __init__(self, answers):
        self.answers = answers  # by the ids of an example

    def __call__(self, input_ids, attention_mask):
        logits = torch.zeros(*input_ids.shape, len(TAGS))
        for number, ids in enumerate(input_ids.tolist()):
            target, tags = self.answers[tuple(ids[: int(attention_mask[number].sum())])]
            places = [place for place, tag in enumerate(target) if tag != IGNORED]
            for place, tag in zip(places, tags, strict=True):
                logits[number, place, tag] = 1.0
        return SimpleNamespace(logits=logits)


valid = st.sampled_from([(0, 0, 0, 1, 2, 2, 0), (3, 0, 1, 3, 4, 0, 0), (0,) * 7, (1, 1, 2, 3, 4, 4, 4)])
anything = st.tuples(*[st.integers(0, 4)] * 7)


@given(st.lists(st.tuples(valid, anything), min_size=1, max_size=4, unique_by=str))
def test_the_clear_figures_are_those_of_seqeval(task, pairs):
    texts = [[*"abcdefg", chr(104 + number)] for number in range(len(pairs))]
    truths, guesses = ([[*pair[side], 0] for pair in pairs] for side in (0, 1))
    examples = task.examples([row(words, tags) for words, tags in zip(texts, truths, strict=True)])
    said = {example.ids: (example.target, guess) for example, guess in zip(examples, guesses, strict=True)}
    found = score(Says(said), task, examples, micro_batch_size=2).figures
    names = [[[TAGS[tag] for tag in tags] for tags in side] for side in (guesses, truths)]
    expected = by_seqeval.scores(*names, ["PER", "LOC"])
    for name, value in (
        ("entity_f1", found["entity_f1"]),
        *((f"f1_{t}", found["f1_by_label"][t]["f1"]) for t in ("PER", "LOC")),
    ):
        wanted = expected["f1" if name == "entity_f1" else name]
        assert value == pytest.approx(wanted) if value is not None else wanted != wanted
    right = [
        one == other
        for mine, truth in zip(guesses, truths, strict=True)
        for one, other in zip(mine, truth, strict=True)
    ]
    assert found["accuracy"] == pytest.approx(sum(right) / len(right))


def test_an_inside_that_continues_nothing_is_no_entity():
    assert list(entities(["I-PER", "B-PER", "I-LOC", "I-PER", "B-LOC", "I-LOC", "B-LOC"])) == [
        ("PER", 1, 2), ("LOC", 4, 6), ("LOC", 6, 7),
    ]  # fmt: skip


def test_a_tokenizer_that_says_no_places_is_refused():
    found = Tokenizer(models.WordLevel({"x": 0, "[UNK]": 1}, unk_token="[UNK]"))
    found.normalizer = normalizers.Sequence([normalizers.Replace("o", ""), normalizers.Prepend("x")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=found, pad_token="x")
    task = EntitiesTask(tokenizer, CONTEXT, SPEC)
    backend = task.backend

    class Placeless:
        def encode(self, text):
            ids = backend.encode(text).ids
            return SimpleNamespace(ids=ids, offsets=[(0, 0)] * len(ids), overflowing=[])

    task.backend = Placeless()
    with pytest.raises(InputError, match="doesn't say which characters a token stands for"):
        task.examples([row()])


# Reading


def read(tmp_path, *rows, name="data.jsonl", labels=None):
    path = tmp_path / name
    path.write_text("".join(one if isinstance(one, str) else json.dumps(one) + "\n" for one in rows))
    data = SiloDataSettings(source=str(path), labels=labels or {}, columns={})
    return [record for _, record in rows_of(data, SPEC).by_silo[""]]


def test_lists_and_texts_with_blanks_are_read(tmp_path):
    listed = read(tmp_path, {"tokens": ["Ada", "is"], "tags": ["B-PER", "O"]})
    assert listed == [{"tokens": ("Ada", "is"), "tags": (1, 0)}]
    assert read(tmp_path, "tokens,tags\nAda  is,B-PER O\n", name="data.csv") == listed
    numbers = {"0": "O", "1": "B-PER"}
    assert read(tmp_path, {"tokens": ["Ada", "is"], "tags": [1, 0]}, labels=numbers) == listed


SECRET = "Zaphod"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"tokens": [SECRET, "is"], "tags": ["B-PER"]}, "data.jsonl, line 1: it has not as many tags as words"),
        ({"tokens": [SECRET], "tags": ["B-ORG"]}, "data.jsonl, line 1: column 'tags' holds 'B-ORG', which is none"),
        ({"tokens": [SECRET, 7], "tags": ["O", "O"]}, "column 'tokens' holds a list in which not all are texts"),
        ({"tokens": 7, "tags": ["O"]}, "column 'tokens' holds a value of the type int; give a list"),
        ({"tokens": [SECRET], "tags": [None]}, "the label column 'tags' holds nothing"),
        ({"tokens": [SECRET], "tags": ["I-PER"]}, "column 'tags' has an I- that continues no entity"),
        ({"tokens": [SECRET] * 2, "tags": ["B-LOC", "I-PER"]}, "column 'tags' has an I- that continues no entity"),
    ],
)
def test_records_that_do_not_fit_are_refused_in_one_line(tmp_path, record, message):
    with pytest.raises(InputError) as refused:
        read(tmp_path, record)
    assert message in str(refused.value)
    assert SECRET not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["B-PER", "I-PER"], "there is no 'O'"),
        (["O", "B-PER", "I-LOC"], "'I-LOC' has no 'B-LOC'"),
        (["O", "PER"], "'PER' is no tag"),
        (["O", "B-"], "'B-' is no tag"),
        ([], "needs the labels that it tells apart"),
    ],
)
def test_labels_that_are_no_tags_are_refused(labels, message):
    with pytest.raises(InputError, match=message):
        parse(FederatedSettings, {"task": "entities", "labels": labels}, "run.toml")
    with pytest.raises(InputError, match="has no use for a template"):
        parse(FederatedSettings, {"task": "entities", "labels": list(TAGS), "template": "{tokens}"}, "run.toml")
