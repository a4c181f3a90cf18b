"""Questions about a text: windows, places of answers, what is chosen and counted, and what is refused."""

import json
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_bert import CONTEXT, published, word_pieces

from configs.errors import InputError
from configs.load import load
from configs.schema.silo import SiloDataSettings
from configs.schema.tasks import TaskSpec
from federated.silo.units import rows_of
from federated.simulation.simulated_places import simulated_silo
from trainer.data.tokenizer import train_tokenizer
from trainer.models.adapters import Adaptation, adapted, trainable
from trainer.models.load import load_model
from trainer.scoring.score import score
from trainer.tasks.fields import Answers, with_texts
from trainer.tasks.qa import AnswersTask

SPEC = TaskSpec(name="qa")
CONTEXT_TEXT = (
    "The Broncos beat the Panthers in Santa Clara. " * 6 + "The game was played on February 7, 2016, in Denver."
)
QUESTION = "When was it played?"


@pytest.fixture(scope="module")
def task():
    return AnswersTask(word_pieces([CONTEXT_TEXT, QUESTION], 120), CONTEXT, SPEC)


@pytest.fixture(scope="module")
def byte_task(tmp_path_factory):
    """With a tokenizer that puts nothing around question and context."""
    return AnswersTask(train_tokenizer([CONTEXT_TEXT] * 2, 500, tmp_path_factory.mktemp("bytes")), CONTEXT, SPEC)


def row(answer, start=-1, context=CONTEXT_TEXT, question=QUESTION):
    return {"context": context, "question": question, "answer": Answers((answer,), (start,))}


def said(window, context=CONTEXT_TEXT):
    """The answer that a window's target points at; None where it points at the first token."""
    first, last = (place - window.first for place in window.target)
    return None if window.target == (0, 0) else context[window.spans[first][0] : window.spans[last][1]]


@pytest.mark.parametrize("kind", ["task", "byte_task"])
@pytest.mark.parametrize("answer", ["February 7, 2016", "Denver", "The Broncos", "Santa Clara"])
def test_windows_cover_the_context_and_point_at_the_answer(kind, answer, request):
    task = request.getfixturevalue(kind)
    windows = task.examples([row(answer)])
    assert len(windows) > 3
    found = {said(window) for window in windows}
    assert found == {answer, None}
    seen = {character for window in windows for start, end in window.spans for character in range(start, end)}
    assert seen >= {place for place, character in enumerate(CONTEXT_TEXT) if not character.isspace()}
    for before, after in pairwise(windows):
        assert after.spans[0][0] < before.spans[-1][1]  # they overlap
    assert all(len(window.ids) <= CONTEXT and not window.truncated for window in windows)


def test_the_place_that_is_named_is_the_one_that_is_learnt(task):
    second = CONTEXT_TEXT.index("Panthers", 40)
    by_place = [
        window.spans[window.target[0] - window.first][0]
        for window in task.examples([row("Panthers", second)])
        if said(window)
    ]
    assert set(by_place) == {second}
    assert {
        window.spans[window.target[0] - window.first][0] for window in task.examples([row("Panthers")]) if said(window)
    } == {CONTEXT_TEXT.index("Panthers")}


def test_question_and_context_are_told_apart(task):
    window = task.examples([row("Denver")])[0]
    assert window.types == tuple(int(place >= window.first) for place in range(len(window.ids)))
    batch = task.collate([window])
    assert batch["candidates"][0].tolist()[: window.first + 1] == [1] + [0] * (window.first - 1) + [1]
    assert batch["candidates"][0, -1] == 0  # [SEP]


@pytest.mark.parametrize("train", ["lora", "head"])
def test_a_model_that_is_trained_sees_question_and_context_apart_as_the_merged_one_does(task, tmp_path, train):
    """peft's class for question answering takes the types of tokens and drops them."""
    published(tmp_path, [CONTEXT_TEXT, QUESTION])
    model = adapted(load_model(tmp_path, head=task.head), Adaptation(2, 4.0, train, head=task.head), seed=0).eval()
    with torch.no_grad():
        for name, value in trainable(model).items():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(len(name))))
    batch = task.collate(task.examples([row("Denver")]))
    losses = task.record_losses(model, batch)
    bare = model.merge_and_unload() if train == "lora" else model
    assert torch.allclose(task.record_losses(bare, batch), losses, atol=1e-5)
    without = {**batch, "token_type_ids": torch.zeros_like(batch["token_type_ids"])}
    assert not torch.allclose(task.record_losses(bare, without), losses, atol=1e-5)


def test_a_long_question_leaves_half_of_the_room(task):
    windows = task.examples([row("Denver", question="played " * 100)])
    assert all(window.truncated for window in windows)
    assert {said(window) for window in windows} == {"Denver", None}


@given(st.text(min_size=1, max_size=80), st.text(min_size=1, max_size=60), st.data())
def test_any_text_makes_windows_that_fit(task, context, question, data):
    start = data.draw(st.integers(0, len(context) - 1))
    answer = context[start : data.draw(st.integers(start + 1, len(context)))]
    if not answer.strip():
        return
    windows = task.examples([row(answer, start, context, question)])
    for window in windows:
        assert 1 <= len(window.ids) <= CONTEXT
        assert 0 <= window.target[0] <= window.target[1] < len(window.ids)
        assert window.candidates[window.target[0]] == window.candidates[window.target[1]] == 1
    scores = task.record_scores(Points({}), task.scored([row(answer, start, context, question)]))
    assert ((scores >= 0) & (scores <= 1)).all()


class Points:
    """A model that is sure of a window's target, as far as it is told."""

    config = SimpleNamespace(type_vocab_size=2)

    def __init__(self, targets, sure=5.0):
        self.targets, self.sure = targets, sure

    def __call__(self, input_ids, attention_mask, token_type_ids):
        ends = torch.zeros(2, *input_ids.shape)
        for number, ids in enumerate(input_ids.tolist()):
            places = self.targets.get(tuple(ids[: int(attention_mask[number].sum())]), (0, 0))
            for side, place in enumerate(places):
                ends[side, number, place] = self.sure
        return SimpleNamespace(start_logits=ends[0], end_logits=ends[1])


def test_the_answer_is_chosen_among_all_windows_and_compared_by_squads_rules(task):
    rows = [row("February 7, 2016"), row("Denver"), row("the Panthers")]
    (first, second, third) = questions = task.scored(rows)
    assert (len(questions), first.context) == (3, CONTEXT_TEXT)
    right = {window.ids: window.target for window in first.windows}
    assert task.answer(Points(right), first) == "February 7, 2016"
    assert task.record_scores(Points(right), [first]).tolist() == [[1.0, 1.0, 1.0]]
    # The last window again, where "on February 7, 2016" is said: 6 of 7 words without an article.
    longer = {ids: (start - 1, end) if start else (0, 0) for ids, (start, end) in right.items()}
    assert task.answer(Points(longer), first) == "on February 7, 2016"
    assert task.record_scores(Points(longer), [first])[0].tolist() == pytest.approx([2 * 3 / 7, 0.0, 1.0])
    windows = {window.ids: window.target for one in (second, third) for window in one.windows}
    assert task.answer(Points(windows), second) == task.answer(Points(windows), third)
    figures = score(Points(right), task, questions, 2).figures
    assert figures["exact_match"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_model_that_has_diverged_gives_some_answer(task, bad):
    (question,) = task.scored([row("Denver")])
    scores = task.record_scores(Points({window.ids: window.target for window in question.windows}, bad), [question])
    assert ((scores >= 0) & (scores <= 1)).all()


def test_of_several_right_answers_the_nearest_counts(task):
    given = row("Denver") | {"answer": Answers(("February 7, 2016", "2016"), (-1, -1))}
    (question,) = task.scored([given])
    year = [w for w in task.examples([row("2016")]) if said(w)]
    assert task.record_scores(Points({w.ids: w.target for w in year}), [question])[0, 1] == 1.0


@pytest.mark.parametrize(("language", "f1"), [("zh", 2 * 2 / 5), ("zh-Hant", 2 * 2 / 5), ("en", 0)])
def test_answers_are_compared_by_the_rules_of_the_silos_language(byte_task, tmp_path, language, f1):
    """Two characters of three; by SQuAD's rule two words that differ. The language is the silo's, and in no request."""
    silo = simulated_silo(load("tiny", ['federated.task="qa"', f"data.private.language={language}"]), "north", tmp_path)
    assert (silo.data.language, silo.policy.task_spec.language) == (language, "en")
    task = AnswersTask(byte_task._tokenizer, 64, silo.task_spec)
    near, (right,) = (
        f([row(answer, context="送来热茶。")]) for f, answer in ((task.examples, "来热茶"), (task.scored, "热茶"))
    )
    scores = task.record_scores(Points({window.ids: window.target for window in near}), [right])
    assert scores[0].tolist() == pytest.approx([f1, 0, 1])


@pytest.mark.parametrize("language", ["", "chinese", "z", "zh_CN", "zh\n", "../zh"])
def test_what_is_no_language_is_refused_by_name(language):
    with pytest.raises(InputError, match=r"data\.private\.language"):
        load("tiny", [f"data.private.language={json.dumps(language)}"])


def test_deidentified_rows_keep_their_answer_or_are_none():
    def treat(text):
        return text.replace("Santa Clara", "<LOCATION>")

    treated = with_texts(row("Santa Clara", CONTEXT_TEXT.index("Santa")), treat)
    assert treated["answer"] == Answers(("<LOCATION>",), (-1,))
    assert AnswersTask.misfit(treated) == ""
    torn = with_texts(row("Clara", CONTEXT_TEXT.index("Clara")), treat)
    assert "not in its context" in AnswersTask.misfit(torn)


# Reading


def read(tmp_path, *rows, name="data.jsonl", **columns):
    path = tmp_path / name
    path.write_text("".join(one if isinstance(one, str) else json.dumps(one) + "\n" for one in rows))
    return [record for _, record in rows_of(SiloDataSettings(source=str(path), columns=columns), SPEC).by_silo[""]]


def test_texts_and_squads_answers_are_read(tmp_path):
    fields = {"context": "In Denver.", "question": "Where?"}
    expected = [{**fields, "answer": Answers(("Denver",), (-1,))}]
    assert read(tmp_path, {**fields, "answer": "Denver"}) == expected
    assert read(tmp_path, "context,question,answer\nIn Denver.,Where?,Denver\n", name="data.csv") == expected
    squad = {**fields, "answers": {"text": ["Denver", "In Denver"], "answer_start": [3, 0]}}
    assert read(tmp_path, squad, answer="answers")[0]["answer"] == Answers(("Denver", "In Denver"), (3, 0))
    listed = {**fields, "answers": [{"text": "Denver", "answer_start": 3}, {"text": "In Denver", "start": 0}]}
    assert read(tmp_path, listed, answer="answers")[0]["answer"] == Answers(("Denver", "In Denver"), (3, 0))


SECRET = "Zaphod"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"answer": "Ford"}, "data.jsonl, line 1: its answer is not in its context; give one that is"),
        ({"answer": {"text": [SECRET], "answer_start": [1]}}, "its answer does not begin at answer_start"),
        ({"answer": {"text": [SECRET], "answer_start": []}}, ""),
        ({"answer": {"text": [], "answer_start": []}}, "column 'answer' holds no answer"),
        ({"answer": {"text": [SECRET], "answer_start": [0, 3]}}, "column 'answer' holds no answer, or one without"),
        ({"answer": {"text": [SECRET], "answer_start": ["0"]}}, "column 'answer' holds no answer, or one without"),
        ({"answer": [SECRET]}, "column 'answer' holds no answer"),
        ({"answer": []}, "column 'answer' holds no answer"),
        ({"answer": [{"start": 0}]}, "column 'answer' holds no answer"),
        ({"answer": None}, "column 'answer' holds no answer"),
        ({"answer": " "}, "column 'answer' holds no answer"),
        ({"context": " "}, "column 'context' is empty; give a text, or take the record out"),
        ({"question": ""}, "column 'question' is empty"),
        ({"context": [SECRET]}, "the text column 'context' holds a list"),
    ],
)
def test_records_that_do_not_fit_are_refused_in_one_line(tmp_path, changes, message):
    record = {"context": f"{SECRET} was here.", "question": "Who?", "answer": SECRET, **changes}
    if not message:
        assert len(read(tmp_path, record)) == 1
        return
    with pytest.raises(InputError) as refused:
        read(tmp_path, record)
    assert message in str(refused.value)
    assert SECRET not in str(refused.value)
    assert "\n" not in str(refused.value)
