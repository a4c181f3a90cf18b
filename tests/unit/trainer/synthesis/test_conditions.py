"""Which fields of a record are given, how the model reads them, and the record that comes of what it writes."""

import pytest

from configs.errors import InputError
from configs.schema.data import RecordSettings
from configs.schema.tasks import TaskSpec
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.synthesis.conditions import Form
from trainer.tasks.fields import FieldReader
from trainer.tasks.likelihood import LikelihoodTask
from trainer.tasks.task import kind_of

DOCUMENTS = [f"the {name} ship sails to island number {number}" for number in range(40) for name in ("red", "old")]
PLAIN = RecordSettings(source="x")
LABELLED = TaskSpec(name="chat", template="{label}: {text}")
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(DOCUMENTS, 300, folder)
    found = load_tokenizer(folder)
    found.chat_template = CHATML
    return found


def form(tokenizer, spec, data=PLAIN):
    return Form(kind_of(spec.name)(tokenizer, 64, spec), spec, data)


def test_every_value_of_a_field_is_a_condition_that_the_model_reads_as_in_training(tokenizer):
    made = form(tokenizer, LABELLED)
    conditions = made.conditions(["label=old", "label=red", "label=old"])
    assert [condition.given for condition in conditions] == [{"label": "old"}, {"label": "red"}]
    task = kind_of("chat")(tokenizer, 64, LABELLED)
    (example,) = task.examples([{"label": "red", "text": "the red ship"}])
    read = len(conditions[1].opening.ids)
    assert example.ids[:read] == conditions[1].opening.ids
    assert set(example.target[:read]) == {-100}
    assert -100 not in example.target[read:]


def test_a_record_can_be_trained_on_by_the_runs_own_settings(tokenizer):
    data = RecordSettings(source="x", text="note", columns={"label": "verdict"})
    spec = TaskSpec(name="chat", template="{label}: {text} ###")
    made = form(tokenizer, spec, data)
    (condition,) = made.conditions(["label=old"])
    record = made.record(condition, " the old ship ###")
    assert record == {"verdict": "old", "note": "the old ship"}
    assert made.columns == ["verdict", "note"]
    from trainer.data.reading.counts import ReadCounts

    assert FieldReader(data, spec).read(record, "here", ReadCounts()) == {"label": "old", "text": "the old ship"}


def test_fields_of_a_template_are_combined(tokenizer):
    made = form(tokenizer, TaskSpec(name="chat", template="{age} {sex}: {note}"))
    found = made.conditions(["sex=f", "age=3", "sex=m", "age=7"])
    assert [tuple(one.given.values()) for one in found] == [("3", "f"), ("3", "m"), ("7", "f"), ("7", "m")]


def test_a_text_starts_as_it_is_told_or_anyhow(tokenizer):
    made = form(tokenizer, TaskSpec(name="causal"), RecordSettings(source="x", text="note"))
    (anyhow,) = made.conditions([])
    assert made.record(anyhow, "the old ship ") == {"note": "the old ship"}
    (told,) = made.conditions(["text=Once "])
    assert made.record(told, "upon a time") == {"note": "Once upon a time"}


def test_a_dialogue_is_asked_for_by_what_a_person_says(tokenizer):
    made = form(tokenizer, TaskSpec(name="chat"))
    (condition,) = made.conditions(["messages=which ship?"])
    turns = [{"role": "user", "content": "which ship?"}, {"role": "assistant", "content": "the old one"}]
    assert made.record(condition, " the old one ") == {"messages": turns}
    assert condition.opening == kind_of("chat")(tokenizer, 64, TaskSpec(name="chat")).opening("which ship?")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "the model reads 'label' before it writes; give --given label=VALUE"),
        (["label"], "--given 'label': give FIELD=VALUE; the fields are label"),
        (["text=a"], "--given 'text=a': give FIELD=VALUE; the fields are label"),
        ([f"label={n}" for n in range(10_001)], "the values make 10,001 combinations; give 10,000 at most"),
    ],
)
def test_what_does_not_fit_the_template_is_refused(tokenizer, given, message):
    with pytest.raises(InputError, match=message):
        form(tokenizer, LABELLED).conditions(given)


def test_a_model_that_has_learnt_labels_writes_no_records(tokenizer):
    spec = TaskSpec(name="classification", labels=("old", "red"), pooling="likelihood")
    with pytest.raises(InputError, match=r"federated\.task is 'classification': its model has learnt answers"):
        Form(LikelihoodTask(tokenizer, 64, spec), spec, PLAIN)
