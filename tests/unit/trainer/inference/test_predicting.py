"""A file's records with a model's answers: what each task answers, in order, whole, and the same after a kill."""

import csv
import json
import random
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from configs.errors import InputError
from configs.load import load
from configs.schema.data import RecordSettings
from configs.schema.tasks import TaskSpec
from trainer.data.reading.counts import ReadCounts
from trainer.data.tokenizer import load_tokenizer, train_tokenizer
from trainer.inference import predicting
from trainer.inference.asking import Asking, with_columns
from trainer.inference.predicting import predict
from trainer.models.families import new_model
from trainer.models.load import load_model
from trainer.tasks.fields import FieldReader
from trainer.tasks.task import kind_of

DOCUMENTS = [f"the {name} ship sails to island number {number}" for number in range(40) for name in ("red", "old")]
TAGS = ("O", "B-PER", "I-PER")
SPECS = {
    "classification": TaskSpec(name="classification", labels=("bad", "good")),
    "multilabel": TaskSpec(name="multilabel", labels=("red", "old", "sails")),
    "entities": TaskSpec(name="entities", labels=TAGS),
    "qa": TaskSpec(name="qa"),
    "chat": TaskSpec(name="chat", template="Q: {question}\nA: {answer}"),
    "translation": TaskSpec(name="translation"),
    "summarisation": TaskSpec(name="summarisation"),
}
ROWS = {
    "classification": {"text": "the old ship", "label": "good"},
    "multilabel": {"text": "the old ship", "labels": ["old"]},
    "entities": {"tokens": ["the", "old", "ship"], "tags": ["O", "B-PER", "I-PER"]},
    "qa": {"context": "  the old ship sails to island 7", "question": "which ship?", "answer": "the old ship"},
    "chat": {"question": "which ship?", "answer": "the old one"},
    "translation": {"source": "the old ship", "target": "the red ship"},
    "summarisation": {"document": "the old ship sails", "summary": "sails"},
}
ANSWERS = ("label", "labels", "tags", "answer", "target", "summary")
NOTHING = RecordSettings(source="x")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    train_tokenizer(DOCUMENTS, 300, folder)
    config = load("tiny", ["tokenizer.vocab_size=300"])
    new_model(config.model, len(load_tokenizer(folder)), 0).save_pretrained(folder)
    return folder


def asking_for(base, name, data=NOTHING):
    spec, tokenizer = SPECS.get(name, TaskSpec(name=name)), load_tokenizer(base)
    task = kind_of(name)(tokenizer, 64, spec)
    model = load_model(base, head=getattr(task, "head", None))
    with torch.no_grad():  # a new head of zeros would answer the same to all
        for key, value in model.named_parameters():
            if key.startswith(("score", "qa_outputs", "classifier")):
                value.normal_(generator=torch.Generator().manual_seed(1))
    return Asking(model, tokenizer, task, spec, data, 8), task, model, spec


@pytest.mark.parametrize("name", SPECS)
def test_the_answer_is_the_one_that_an_evaluation_sees_though_the_row_has_none(name, base):
    asking, task, model, spec = asking_for(base, name)
    whole = FieldReader(NOTHING, spec).read(ROWS[name], "here", ReadCounts())
    with torch.no_grad():
        expected = task.predictions(model, task.scored([whole]), 8)
    asked = {field: value for field, value in ROWS[name].items() if field not in ANSWERS}
    assert asking.answers([asking.example(asked, "here")]) == expected


@pytest.mark.parametrize("name", ["classification", "multilabel", "entities", "qa"])
def test_what_is_asked_together_changes_no_answer(name, base):
    """Padding is unseen: probabilities are the same up to float32's rounding, and nothing else of an answer differs."""
    asking, *_ = asking_for(base, name)
    text = {"classification": "text", "multilabel": "text", "entities": "tokens", "qa": "context"}[name]
    given = []
    for number in range(20):
        words = ["the", "old", "ship", "sails", "to", "island", "7"] * (1 + number * 7 % 5)
        said = words[: 3 + number * 5 % 17]
        given.append({text: said if name == "entities" else " ".join(said), "question": "which ship?"})
    rows = [{field: row[field] for field in asking.columns} for row in given]
    examples = [asking.example(row, "here") for row in rows]
    together, alone = asking.answers(examples), [asking.answers([one])[0] for one in examples]
    assert [one.answer for one in together] == [one.answer for one in alone]
    for mine, other in zip(together, alone, strict=True):
        assert mine.probabilities == pytest.approx(other.probabilities, abs=1e-6)
    assert len({str(one) for one in alone}) > 1


def test_of_a_text_the_model_writes_what_follows(base):
    asking, task, model, _ = asking_for(base, "causal")
    ids = list(task.opening("the old ship").ids)
    found = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, pad_token_id=0)[0].tolist()
    expected = load_tokenizer(base).decode(found[len(ids) :], skip_special_tokens=True)
    (answer,) = asking.answers([asking.example({"text": "the old ship"}, "here")])
    assert answer.answer == expected.rstrip("\N{REPLACEMENT CHARACTER}")


def rows(count):
    chance = random.Random(0)
    return [{"id": number, "text": "the old ship " * chance.randrange(1, 9) + str(number)} for number in range(count)]


def written(path, lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def classifier(base):
    asking, *_ = asking_for(base, "classification")

    def answer(source, output, **settings):
        return predict(asking, ("bad", "good"), source, output, {"model": "1", **settings})

    return answer


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(predicting, "CHUNK", 8)


def test_rows_keep_their_order_and_bad_ones_are_listed(classifier, small_chunks, tmp_path):
    whole = rows(30)
    bad = ["no json", "[1]", {"id": 1}, {"text": 5}, {"text": " "}, '{"a": 1, "a": 2}', {"text": "a", "prediction": 1}]
    lines = whole[:11] + bad + whole[11:]
    done = classifier(written(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl")
    found = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [{"id": row["id"], "text": row["text"]} for row in found] == whole
    assert all(row["prediction"] == max(row["probabilities"], key=row["probabilities"].get) for row in found)
    assert len({row["probabilities"]["bad"] for row in found}) > 20
    listed = [json.loads(line) for line in (tmp_path / "out.jsonl.bad.jsonl").read_text().splitlines()]
    assert [one["line"] for one in listed] == [*range(12, 19)]
    assert "no column 'text'" in listed[2]["error"]
    assert (done.records, done.bad, done.resumed) == (37, 7, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl", "out.jsonl.bad.jsonl"]


@pytest.mark.parametrize("cut", [0, 1, 40, 700, 2000, 4000, 10**6])
def test_what_was_interrupted_goes_on_to_the_same_bytes(cut, classifier, small_chunks, tmp_path, monkeypatch):
    source = written(tmp_path / "in.jsonl", [*rows(30), "bad", *rows(9)])
    classifier(source, tmp_path / "whole.jsonl")
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(predicting, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        classifier(source, tmp_path / "out.jsonl")
    part = tmp_path / "out.jsonl.part"
    part.write_bytes(part.read_bytes()[:cut])
    assert not (tmp_path / "out.jsonl").exists()
    done = classifier(source, tmp_path / "out.jsonl")
    assert (done.resumed > 0) == (cut >= 2000)
    for suffix in ("", ".bad.jsonl"):
        parts = (tmp_path / f"{name}.jsonl{suffix}" for name in ("whole", "out"))
        assert len({path.read_bytes() for path in parts}) == 1
    assert not part.exists()


def test_an_earlier_try_with_other_settings_is_not_gone_on_with(classifier, tmp_path, monkeypatch):
    source = written(tmp_path / "in.jsonl", rows(3))
    with monkeypatch.context() as broken, pytest.raises(KeyboardInterrupt):
        broken.setattr(predicting, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        classifier(source, tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="was begun with another input, model or settings; delete it"):
        classifier(source, tmp_path / "out.jsonl", model="2")
    written(source, rows(4))
    with pytest.raises(InputError, match="was begun with another input"):
        classifier(source, tmp_path / "out.jsonl")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_every_kind_is_read_and_written(kind, classifier, tmp_path):
    given = rows(20)
    source, output = tmp_path / f"in.{kind}", tmp_path / f"out.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(given), source)
    else:
        with source.open("w", newline="") as file:
            table = csv.DictWriter(file, ["id", "text"])
            table.writeheader()
            table.writerows(given)
            file.write("1,2,3\n")
    done = classifier(source, output)
    found = pq.read_table(output).to_pylist() if kind == "parquet" else [*csv.DictReader(output.open())]
    classifier(written(tmp_path / "in.jsonl", given), tmp_path / "out.jsonl")
    expected = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    if kind == "csv":
        expected = [
            {**row, "id": str(row["id"]), "probabilities": json.dumps(row["probabilities"])} for row in expected
        ]
    assert found == expected
    assert done.bad == (kind == "csv")


def test_bad_files_are_refused_in_one_line_and_leave_nothing(classifier, tmp_path):
    good = written(tmp_path / "in.jsonl", rows(2))
    for name, content in {
        "a.csv": "id,id\n1,2\n",
        "b.csv": "id,name\n1,2\n",
        "c.parquet": "PAR1",
        "d.txt": "x",
    }.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(InputError, match=name):
            classifier(tmp_path / name, tmp_path / "out.jsonl")
    pq.write_table(pa.table({"text": ["a"], "raw": [b"b"]}), tmp_path / "e.parquet")
    with pytest.raises(InputError, match="column 'raw' is of the type binary"):
        classifier(tmp_path / "e.parquet", tmp_path / "out.jsonl")
    pq.write_table(pa.table({"text": ["a"], "prediction": ["b"]}), tmp_path / "f.parquet")
    with pytest.raises(InputError, match="has a column 'prediction' already"):
        classifier(tmp_path / "f.parquet", tmp_path / "out.jsonl")
    with pytest.raises(InputError, match="exists; give a path where nothing is yet"):
        classifier(good, shutil.copy(good, tmp_path / "there.jsonl") and tmp_path / "there.jsonl")
    with pytest.raises(InputError, match=r"missing\.jsonl: no such file"):
        classifier(tmp_path / "missing.jsonl", tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("*out*"))


def test_columns_have_the_names_that_are_said():
    named = with_columns(NOTHING, ["text=review", "label=stars"])
    assert (named.column("text"), named.column("label")) == ("review", "stars")
    with pytest.raises(InputError, match="--column 'review': give FIELD=COLUMN"):
        with_columns(NOTHING, ["review"])
