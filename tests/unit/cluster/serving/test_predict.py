"""Records over HTTP: what each task answers, the same as a command does, and one clear line for whatever is wrong."""

import json
import re
from dataclasses import asdict

import pytest
from served_models import CONTEXT, a_labelling_run, a_model
from service_client import SECRET, ask, refused

from cluster.serving.app import Service
from cluster.serving.keys import ApiKeys
from cluster.serving.models import ServedModel, find, load
from configs.schema.data import RecordSettings
from federated.adapters.merged import merge
from trainer.data.tokenizer import load_tokenizer
from trainer.explanation.attribution import explain
from trainer.inference.asking import Asking
from trainer.inference.batching import Engine, EngineLimits
from trainer.tasks.task import task_of

TASKS = {
    "classification": ("bad", "good"),
    "multilabel": ("red", "old", "sails"),
    "entities": ("O", "B-PER", "I-PER"),
    "qa": (),
}
TEXTS = ["the old ship", "the red ship sails to island 7", "ship", "island number 12 " * 30]
RECORDS = {
    "classification": [{"text": text} for text in TEXTS],
    "multilabel": [{"text": text} for text in TEXTS],
    "entities": [{"tokens": text.split()} for text in TEXTS],
    "qa": [{"context": text, "question": "which ship?"} for text in TEXTS],
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Of each task: its run, what answers there without a service, and the settings of its task."""
    folder = tmp_path_factory.mktemp("runs")
    base = a_model(folder / "writer")
    return base, {task: a_labelling_run(folder / task, base, task, labels) for task, labels in TASKS.items()}


@pytest.fixture(scope="module")
def served(made):
    base, runs = made
    merged, _ = merge(runs["classification"][0], None, None)
    places = [base, *(run for run, _, _ in runs.values()), merged]
    return load([find(str(place), None) for place in places], None)


@pytest.fixture
def service_of(served):
    engines = []

    def make(keys=None, timeout_s=60.0):
        writing = {name: one.voice for name, one in served.items() if isinstance(one, ServedModel)}
        engines.append(Engine(writing, EngineLimits(2, 2 * CONTEXT, 2)))
        return Service(served, engines[-1], keys, timeout_s, 4)

    yield make
    for engine in engines:
        engine.close()


def predict(service, model, records, **options):
    (found,) = ask(service, ("POST", "/predict", {"json": {"model": model, "records": records}, **options}))
    return found


@pytest.mark.parametrize("task", TASKS)
def test_records_get_what_the_model_answers_without_a_service(task, made, service_of):
    run, model, spec = made[1][task]
    tokens = run / "model"
    asking = Asking(
        model, load_tokenizer(tokens), task_of(spec, tokens), spec, RecordSettings(source="x"), max_new_tokens=1
    )
    expected = asking.answers([asking.example(record, "here") for record in RECORDS[task]])
    found = predict(service_of(), task, RECORDS[task]).json()
    assert found["model"] == task
    answers = [
        tuple(one["answer"]) if isinstance(one["answer"], list) else one["answer"] for one in found["predictions"]
    ]
    assert answers == [one.answer for one in expected]
    for one, right in zip(found["predictions"], expected, strict=True):
        # The adapter is merged here, and is not there: float32 rounds otherwise.
        shown = one["probabilities"]
        assert shown is None if not right.probabilities else list(shown) == list(TASKS[task])
        assert list((shown or {}).values()) == pytest.approx(list(right.probabilities), abs=1e-4)


def test_a_merged_model_in_its_run_answers_alike_and_more_records_than_one_batch_keep_their_order(service_of):
    service = service_of()
    records = [{"text": "the old ship " * (number * 7 % 11 + 1) + str(number)} for number in range(70)]
    found = [predict(service, name, records).json()["predictions"] for name in ("classification", "merged")]
    assert found[0] == found[1]
    alone = [predict(service, "merged", [record]).json()["predictions"][0] for record in records[::9]]
    for one, other in zip(found[0][::9], alone, strict=True):
        assert one["probabilities"] == pytest.approx(other["probabilities"], abs=1e-4)
    assert len({one["probabilities"]["bad"] for one in found[0]}) > 40


def test_models_are_listed_with_their_task_and_privacy(service_of):
    (found,) = ask(service_of(), ("GET", "/v1/models", {}))
    listed = {one["id"]: one for one in found.json()["data"]}
    assert "task" not in listed["writer"]
    for task, labels in TASKS.items():
        assert (listed[task]["task"], listed[task]["labels"]) == (task, list(labels))
        assert listed[task]["fields"] == list(RECORDS[task][0])
        assert listed[task]["privacy"]["line"].startswith("no certificate")
        assert listed[task]["context_length"] == CONTEXT


TEXT = {"text": SECRET}


@pytest.mark.parametrize(
    ("model", "records", "message"),
    [
        ("writer", [TEXT], "writer writes; ask it at /v1/completions"),
        ("classification", [], "records"),
        ("classification", [TEXT] * 257, "records: List should have at most 256 items"),
        ("classification", [TEXT, SECRET], "records.1: Input should be a valid dictionary"),
        ("classification", [{SECRET: "a"}], "records.0: classification reads text; send nothing else"),
        ("classification", [TEXT, {**TEXT, "label": SECRET}], "records.1: classification reads text; send nothing"),
        ("classification", [TEXT, {}], "records.1: no column 'text'"),
        ("classification", [{"text": {SECRET: 1}}], "records.0: the text column 'text' holds an object"),
        ("classification", [{"text": 4711}], "records.0: the text column 'text' holds a number"),
        ("classification", [{"text": " "}], "records.0: a column that the task reads is empty"),
        ("classification", [{"text": SECRET * 6000}], "has more than 65536 characters"),
        ("entities", [{"tokens": [SECRET, 1]}], "records.0: column 'tokens' holds a list in which not all are texts"),
        ("entities", [{"tokens": []}], "records.0: a column that the task reads is empty"),
        ("qa", [{"context": SECRET}], "records.0: no column 'question'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line_without_what_was_asked(service_of, model, records, message):
    service = service_of()
    refused(predict(service, model, records), 400, message)
    assert SECRET.encode() not in service.metrics.page()


def test_words_are_text_whatever_they_spell_and_half_characters_are_answered(service_of):
    service = service_of()
    body = json.dumps({"model": "classification", "records": [{"text": "<|endoftext|> \ud800 \0 ship"}]})
    (found,) = ask(service, ("POST", "/predict", {"content": body, "headers": {"content-type": "application/json"}}))
    assert found.status_code == 200
    spelt, plain = predict(service, "classification", [{"text": "a<|endoftext|>"}, {"text": "a"}]).json()["predictions"]
    assert spelt != plain


def test_other_paths_say_where_such_a_model_answers(service_of):
    service = service_of()
    asked = {"model": "qa", "messages": [{"role": "user", "content": SECRET}]}
    for path, document in (("chat/completions", asked), ("completions", {"model": "qa", "prompt": SECRET})):
        (found,) = ask(service, ("POST", f"/v1/{path}", {"json": document}))
        refused(found, 400, "qa gives labels and writes no text; ask it at /predict")
    refused(predict(service, SECRET, [TEXT]), 404, "no such model here")


def test_a_key_is_needed_and_large_bodies_are_not_read(service_of, tmp_path):
    path = tmp_path / "keys"
    path.write_text("key-of-the-clinic-0001\n")
    path.chmod(0o600)
    service = service_of(ApiKeys(path))
    refused(predict(service, "classification", [TEXT]), 401, "missing or wrong")
    headers = {"authorization": "Bearer key-of-the-clinic-0001"}
    assert predict(service, "classification", [TEXT], headers=headers).status_code == 200
    refused(predict(service, "classification", [{"text": "a" * 2**20}], headers=headers), 413, "1048576 bytes")
    assert 'path="/predict",status="413"' in service.metrics.page().decode()


def test_an_answer_that_takes_too_long_is_given_up_and_the_next_is_answered(service_of):
    records = [{"text": "the old ship " * 200}] * 256
    refused(predict(service_of(timeout_s=0.05), "classification", records), 504, "send fewer records")
    assert predict(service_of(), "classification", records[:1]).status_code == 200


def test_a_failure_inside_is_counted_by_its_kind_and_says_nothing(service_of, served, monkeypatch):
    service = service_of()

    def fails(examples):
        raise ZeroDivisionError(SECRET)

    monkeypatch.setattr(served["qa"]._asking, "answers", fails)
    refused(predict(service, "qa", RECORDS["qa"]), 500, "the service failed at this request")
    assert 'siloweave_failures_total{kind="ZeroDivisionError"} 1.0' in service.metrics.page().decode()


@pytest.mark.parametrize("task", ["classification", "multilabel", "entities"])
def test_words_weigh_what_they_weigh_without_a_service(task, made, served, service_of):
    run, _, spec = made[1][task]
    tokens = run / "model"
    expected = explain(task_of(spec, tokens), load_tokenizer(tokens), served[task]._model, TEXTS[1])
    (found,) = ask(service_of(), ("POST", "/explain", {"json": {"model": task, "text": TEXTS[1]}}))
    assert found.json()["explanations"] == [json.loads(json.dumps(asdict(one))) for one in expected]


@pytest.mark.parametrize(
    ("model", "text", "told"),
    [
        ("classification", " ", "the text is empty"),
        ("classification", "", "text: .*at least 1 character"),
        ("classification", "a" * 2001, "text: .*at most 2000 characters"),
        ("qa", TEXTS[1], "the task 'qa' can't be explained this way"),
        ("writer", TEXTS[1], "writer writes; `siloweave explain` weighs the words"),
        ("nobody", TEXTS[1], "no such model here"),
    ],
)
def test_what_can_not_be_explained_is_one_line(model, text, told, service_of):
    (found,) = ask(service_of(), ("POST", "/explain", {"json": {"model": model, "text": text}}))
    assert found.status_code in (400, 404)
    assert re.search(told, found.json()["error"]["message"])


def test_a_model_says_whether_its_words_can_be_weighed(service_of):
    (found,) = ask(service_of(), ("GET", "/v1/models", {}))
    explains = {one["id"]: one.get("explains") for one in found.json()["data"]}
    assert {name: explains[name] for name in (*TASKS, "writer")} == {
        "classification": True,
        "multilabel": True,
        "entities": True,
        "qa": False,
        "writer": None,
    }
