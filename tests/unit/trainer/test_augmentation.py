"""What a step reads with some of its words changed: whose they are, how many, and that nothing that is learnt moves."""

import numpy as np
import pytest
from chat_templates import CHATML, INSTRUCTIONS, tokenizer_of
from pydantic import ValidationError
from tiny_bert import word_pieces

from configs.errors import InputError
from configs.schema.federated import FederatedSettings
from configs.schema.tasks import AugmentationSettings, TaskSpec
from trainer.augmentation import augmentation
from trainer.tasks.chat import ROLES, ChatTask
from trainer.tasks.classification import ClassificationTask
from trainer.tasks.entities import EntitiesTask
from trainer.tasks.qa import AnswersTask
from trainer.tasks.task import IGNORED, Encoded
from trainer.tasks.text import CausalTask
from trainer.tasks.text_to_text import TranslationTask

CONTEXT, LABELS = 64, ("calm", "urgent")
WORDS = "the ward was calm and nobody came to see who had asked for it"
SPEC = TaskSpec(name="translation")
ROWS = {
    "classification": {"text": f"{WORDS} [SEP] [MASK]", "label": 1},
    "translation": {"source": WORDS, "target": "niemand"},
    "chat": {"messages": ((0, "Be kind."), (1, WORDS), (2, "Nobody."), (1, "Sure?"), (2, "Yes."))},
}


@pytest.fixture(scope="module")
def bert():
    return word_pieces([WORDS] * 3)


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    return lambda template: tokenizer_of(tmp_path_factory.mktemp("t"), template)


@pytest.fixture(scope="module")
def gpt(make):
    return make(CHATML)


@pytest.fixture(params=["classification", "decoder", "encoder-decoder", "chat"])
def case(request, bert, gpt):
    """A task with an example of it."""
    if request.param == "classification":
        task = ClassificationTask(bert, CONTEXT, TaskSpec(name="classification", labels=LABELS))
    elif request.param == "chat":
        task = ChatTask(gpt, 4 * CONTEXT, TaskSpec(name="chat"))
    else:
        kind = TranslationTask if request.param == "decoder" else TranslationTask.with_encoder
        task = kind(gpt, 4 * CONTEXT, SPEC)
    name = request.param if request.param in ROWS else "translation"
    (example,) = task.examples([ROWS[name]])
    return task, example


def changed(task, example, number=200, **shares):
    augment = augmentation(task, AugmentationSettings(**shares))
    return [augment(example, np.random.default_rng(seed)) for seed in range(number)]


def read(example, words):
    """The tokens of an example that are words, or those that are none."""
    return [token for token, word in zip(example.ids, example.words, strict=True) if bool(word) == words]


def learnt(example):
    return [token for token in example.target if token != IGNORED]


def test_what_is_learnt_and_what_stands_around_the_words_stays(case):
    task, example = case
    frame = read(example, words=False)
    for found in changed(task, example, dropout=0.4, swap=0.4):
        assert learnt(found) == learnt(example)
        if len(example.target) == len(example.ids):  # beside the tokens
            assert all(want in (IGNORED, token) for want, token in zip(found.target, found.ids, strict=True))
        rest = iter(found.ids)
        assert all(token in rest for token in frame)  # all of it, in its order
        assert len(found.ids) > len(frame)
    assert any(found.ids != example.ids for found in changed(task, example, dropout=0.4))


def test_special_tokens_are_no_words_and_words_that_spell_them_are(case):
    task, example = case
    tokenizer = task._tokenizer
    added = tokenizer.added_tokens_decoder.items()
    special = {number for number, token in added if token.special} - {tokenizer.unk_token_id}
    assert special & set(read(example, words=False))
    assert not special & set(read(example, words=True))


@pytest.mark.parametrize(("template", "number"), [(CHATML, 3), (INSTRUCTIONS, 2)])
def test_of_a_dialogue_what_is_said_may_change_and_the_template_may_not(make, template, number):
    tokenizer = make(template)
    task = ChatTask(tokenizer, 200, TaskSpec(name="chat"))
    dialogue = ROWS["chat"]["messages"][3 - number :]
    (example,) = task.examples([{"messages": dialogue}])
    said = tokenizer.decode(read(example, words=True))
    asked = [text for role, text in dialogue if ROLES[role] != "assistant"]
    assert "".join(said.split()) == "".join("".join(asked).split())
    frame = tokenizer.decode(read(example, words=False))
    assert all(name in frame for name in (("system", "user", "assistant") if template == CHATML else ("[INST]",)))


@pytest.mark.parametrize("kind", ["dropout", "swap", "mask"])
def test_a_share_is_that_share_of_the_words(bert, kind):
    task = ClassificationTask(bert, CONTEXT, TaskSpec(name="classification", labels=LABELS))
    (example,) = task.examples([ROWS["classification"]])
    words, mask = sum(example.words), bert.mask_token_id
    counts = []
    for found in changed(task, example, 2000, **{kind: 0.2}):
        if kind == "dropout":
            counts.append(len(example.ids) - len(found.ids))
        elif kind == "mask":
            assert len(found.ids) == len(example.ids)
            counts.append(found.ids.count(mask) - example.ids.count(mask))
        else:
            assert sorted(found.ids) == sorted(example.ids)
            moved = [place for place, pair in enumerate(zip(found.ids, example.ids, strict=True)) if len({*pair}) > 1]
            counts.append(len(moved) / 2)
    expected = 0.2 * words
    # Of a run of neighbours that are all chosen every second one swaps: chance p / (1 + p), far from the text's end.
    expected = expected / 1.2 if kind == "swap" else expected
    slack = 0.7 if kind == "swap" else 6 * (0.16 * words / 2000) ** 0.5
    assert abs(np.mean(counts) - expected) < slack


def test_a_token_moves_by_one_place_and_past_no_special_token(bert):
    task = ClassificationTask(bert, CONTEXT, TaskSpec(name="classification", labels=LABELS))
    example = Encoded((2, 10, 11, 3, 12, 13, 3), 9, truncated=False, target=(0,), words=bytes([0, 1, 1, 0, 1, 1, 0]))
    found = {one.ids for one in changed(task, example, 100, swap=0.5)}
    assert found == {(2, *a, 3, *b, 3) for a in ((10, 11), (11, 10)) for b in ((12, 13), (13, 12))}


def test_a_text_never_loses_all_its_words(case):
    task, example = case
    words = sum(example.words)
    lengths = {len(found.ids) for found in changed(task, example, dropout=0.99)}
    assert len(example.ids) - words not in lengths
    assert len(example.ids) in lengths  # where all would have gone none has


def test_no_words_are_no_error(bert):
    task = ClassificationTask(bert, CONTEXT, TaskSpec(name="classification", labels=LABELS))
    (example,) = task.examples([{"text": "", "label": 0}])
    assert {found.ids for found in changed(task, example, 5, dropout=0.5, swap=0.5, mask=0.5)} == {example.ids}


def test_one_kind_of_change_draws_nothing_from_another_one(bert):
    task = ClassificationTask(bert, CONTEXT, TaskSpec(name="classification", labels=LABELS))
    (example,) = task.examples([ROWS["classification"]])
    dropped = changed(task, example, 50, dropout=0.3)
    both = changed(task, example, 50, dropout=0.3, mask=0.3)
    assert [len(found.ids) for found in dropped] == [len(found.ids) for found in both]


def test_off_is_nothing_at_all(case):
    assert augmentation(case[0], AugmentationSettings()) is None


def test_tasks_that_learn_what_they_read_have_none(bert, gpt):
    for task in (
        EntitiesTask(bert, CONTEXT, TaskSpec(name="entities", labels=("O", "B-X"))),
        AnswersTask(bert, CONTEXT, TaskSpec(name="qa")),
        CausalTask(gpt, CONTEXT),
    ):
        with pytest.raises(InputError, match="the task learns the tokens that it reads"):
            augmentation(task, AugmentationSettings(swap=0.1))


def test_a_model_without_a_mask_token_masks_nothing(gpt):
    with pytest.raises(InputError, match=r"federated\.augmentation\.mask is 0\.1: the model's tokenizer has no mask"):
        augmentation(TranslationTask(gpt, CONTEXT, SPEC), AugmentationSettings(mask=0.1))


def test_an_example_that_names_no_words_is_never_taken_for_one_without(bert):
    task = ClassificationTask(bert, CONTEXT, TaskSpec(name="classification", labels=LABELS))
    with pytest.raises(ValueError, match="which of its tokens may change"):
        changed(task, task.made_up(16, 1)[0], 1, dropout=0.1)


@pytest.mark.parametrize("task", ["causal", "entities", "qa"])
def test_the_settings_refuse_it_by_the_tasks_name(task):
    labels = {"labels": ["O", "B-X"]} if task == "entities" else {}
    with pytest.raises(ValidationError, match=rf"federated\.augmentation is 0\.1: the task '{task}' learns"):
        FederatedSettings(task=task, augmentation={"dropout": 0.1}, **labels)


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan"), float("inf"), "much"])
def test_a_share_is_one(share):
    with pytest.raises(ValidationError):
        AugmentationSettings(dropout=share)
