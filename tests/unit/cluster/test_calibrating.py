"""From a finished classifier to how its answers are read: what is fitted, who goes by it, and on whose records."""

import asyncio
import json
import math
from itertools import product

import pytest
import torch
from sacrebleu import sentence_chrf
from served_models import a_labelling_run, a_model

from cluster.calibrating import calibrate
from cluster.finished import calibrated, finished_model
from cluster.serving.models import find, load
from configs.errors import InputError, PolicyRefusal
from configs.storage.layout import CALIBRATION
from federated.adapters.merged import merge
from trainer.inference.asking import Asking

LABELS = ("bad", "good")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return a_model(tmp_path_factory.mktemp("base") / "model")


def a_merged_run(folder, base, task, labels=LABELS):
    run, _, _ = a_labelling_run(folder, base, task, labels)
    return merge(run, None, None)[0]


@pytest.fixture(params=["classification", "multilabel"])
def run(request, base, tmp_path):
    return a_merged_run(tmp_path / "run", base, request.param)


@pytest.fixture
def records(tmp_path, run):
    several = "multilabel" in (run.parent / "config.toml").read_text()
    lines = []
    for number in range(60):
        word = ("red", "old")[number % 2]
        label = LABELS[number % 3 % 2]
        answer = {"labels": [label]} if several else {"label": label}
        lines.append(json.dumps({"text": f"the {word} ship sails to island number {number}", **answer}) + "\n")
    path = tmp_path / "records.jsonl"
    path.write_text("".join(lines))
    return path


def asked(found, task):
    spec = found.config.federated.task_spec
    asking = Asking(found.model, found.tokenizer, task, spec, found.config.data.private, 1)
    rows = [{"text": f"the red ship sails to island number {number}"} for number in range(5)]
    return asking.answers([asking.example(row, "here") for row in rows]), rows


def test_answers_are_read_as_calibrated_by_predict_and_serve(run, records):
    found = finished_model(run)
    done, path = calibrate(found, records, 6)
    assert path == run / CALIBRATION
    written = json.loads(path.read_text())
    assert (written["model"], written["fitted"], written["measured"]) == (found.digest, 30, 30)
    assert written["read"] == "the file"
    assert {"loss", "expected_calibration_error"} <= written["before"].keys() == written["after"].keys()
    assert len(done.found["thresholds"]) == (2 if found.task.name == "multilabel" else 0)
    task, digest = calibrated(found.task, found.made, found.digest)
    assert len(digest) == 64
    plain, rows = asked(found, found.task)
    read, _ = asked(found, task)
    for before, after in zip(plain, read, strict=True):
        if done.found["thresholds"]:
            logits = [math.log(one / (1 - one)) / done.found["temperature"] for one in before.probabilities]
            expected = [1 / (1 + math.exp(-one)) for one in logits]
            chosen = zip(LABELS, expected, done.found["thresholds"], strict=True)
            assert after.answer == tuple(label for label, value, least in chosen if value > least)
        else:
            powers = [one ** (1 / done.found["temperature"]) for one in before.probabilities]
            expected = [one / sum(powers) for one in powers]
            assert after.answer == before.answer
        assert after.probabilities == pytest.approx(expected, abs=1e-5)
    served = load([find(f"it={run}", None)], None)["it"]
    answers = asyncio.run(served.answer(rows))["predictions"]
    for one, other in zip(answers, read, strict=True):
        assert list(one["probabilities"].values()) == pytest.approx(other.probabilities, abs=1e-5)


def test_without_a_calibration_nothing_changes(run):
    found = finished_model(run)
    task, digest = calibrated(found.task, found.made, found.digest)
    assert (task is found.task, digest) == (True, "")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "0" * 64}, "is of another model; run `siloweave calibrate` again, or delete it"),
        ({"temperature": 0.0}, "damaged, or not of this version"),
        ({"temperature": float("nan")}, "damaged, or not of this version"),
        ({"temperature": "1"}, "damaged, or not of this version"),
        ({"thresholds": [0.5]}, "damaged, or not of this version"),
        ({"thresholds": None}, "damaged, or not of this version"),
    ],
)
def test_a_file_that_is_not_this_models_is_refused(change, message, base, tmp_path):
    run = a_merged_run(tmp_path / "run", base, "multilabel")
    found = finished_model(run)
    whole = {"model": found.digest, "temperature": 1.5, "thresholds": [0.5, 0.5]}
    (run / CALIBRATION).write_text(json.dumps({**whole, **change}))
    with pytest.raises(InputError, match=message) as refused:
        calibrated(found.task, found.made, found.digest)
    assert "\n" not in str(refused.value)


def test_records_that_are_not_public_are_refused(base, tmp_path):
    run = a_merged_run(tmp_path / "run", base, "classification")
    private = tmp_path / "private.jsonl"
    private.write_text('{"text": "a secret", "label": "bad"}\n')
    config = run.parent / "config.toml"
    text = config.read_text().replace("embedded:plays", str(private)).replace("without_dp = true", "without_dp = false")
    config.write_text(text.replace("public = true", "public = false"))
    found = finished_model(run)
    with pytest.raises(PolicyRefusal, match=r"--records is .*, where the silos' records are") as refused:
        calibrate(found, private, 6)
    assert "secret" not in str(refused.value)
    with pytest.raises(InputError, match="the run has no public records to calibrate on; give some by --records FILE"):
        calibrate(found, None, 6)
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "a ship", "label": "bad"}\n')
    with pytest.raises(InputError, match="1 records are too few to calibrate on; give 40 or more"):
        calibrate(found, few, 6)
    assert not (run / CALIBRATION).exists()


@pytest.fixture(scope="module")
def writing(base, tmp_path_factory):
    return a_merged_run(tmp_path_factory.mktemp("writing"), base, "summarisation", ())


@pytest.fixture(scope="module")
def texts(writing):
    path = writing.parent / "records.jsonl"
    rows = [
        {"document": f"the old ship sails to island number {number}", "summary": f"an island, number {number}"}
        for number in range(24)
    ]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path, rows


def common(found, rows, beams, penalty):
    """What answers have in common with the right ones, by transformers itself and sacrebleu's measure."""
    written = []
    for row in rows:
        opening = found.task.opened(row)
        read = torch.tensor([opening.ids])
        given = {"max_new_tokens": 6, "eos_token_id": list(opening.ends), "pad_token_id": 0, "do_sample": False}
        (ids,) = found.model.generate(read, num_beams=beams, repetition_penalty=penalty, **given)
        written.append(found.tokenizer.decode(ids[read.shape[1] :], skip_special_tokens=True).strip())
    figures = [sentence_chrf(one, [row["summary"]]).score / 100 for one, row in zip(written, rows, strict=True)]
    return sum(figures) / len(figures), written


def test_answers_are_written_in_the_best_of_all_ways(writing, texts):
    path, rows = texts
    found, told = finished_model(writing), []
    _, kept = calibrate(found, path, 6, lambda done, of: told.append((done, of)))
    document = json.loads(kept.read_text())
    try:
        by_hand = {way: common(found, rows[::2], *way)[0] for way in product((1, 2, 4), (1.0, 1.1, 1.3))}
        chosen = document["decoding"]["beams"], document["decoding"]["repetition_penalty"]
        assert by_hand[chosen] == pytest.approx(max(by_hand.values()), abs=1e-9)
        assert len({round(value, 9) for value in by_hand.values()}) > 3
        for name, way in (("before", (1, 1.0)), ("after", chosen)):
            assert document[name]["chrf"] == pytest.approx(common(found, rows[1::2], *way)[0], abs=1e-9)
        assert (document["fitted"], document["measured"], told[-1]) == (12, 12, (9 * 12 + 2 * 12,) * 2)
        task, digest = calibrated(found.task, found.made, found.digest)
        assert len(digest) == 64
        spec, data = found.config.federated.task_spec, found.config.data.private
        asking = Asking(found.model, found.tokenizer, task, spec, data, 6)
        answers = asking.answers([asking.example(row, "here") for row in rows[:4]])
        assert [one.answer for one in answers] == common(found, rows[:4], *chosen)[1]
        # A private evaluation's answers stay as its plan says.
        examples = found.task.scored(rows[:4])
        assert task.overlaps(found.model, examples, 6) == found.task.overlaps(found.model, examples, 6)
    finally:
        kept.unlink()


@pytest.mark.parametrize(
    "way", [{}, {"beams": "2", "repetition_penalty": 1.0}, {"beams": 2, "repetition_penalty": 0.0}]
)
def test_a_way_that_is_none_is_refused(writing, way):
    found = finished_model(writing)
    path = writing / CALIBRATION
    path.write_text(json.dumps({"model": found.digest, "decoding": way}))
    try:
        with pytest.raises(InputError, match=r"damaged, or not of this version|repetition_penalty is 0.0") as refused:
            calibrated(found.task, found.made, found.digest)
        assert "\n" not in str(refused.value)
    finally:
        path.unlink()


def test_a_way_to_write_is_nothing_to_labels_and_few_records_are_too_few(base, writing, texts, tmp_path):
    run = a_merged_run(tmp_path / "run", base, "classification")
    found = finished_model(run)
    (run / CALIBRATION).write_text(
        json.dumps({"model": found.digest, "decoding": {"beams": 2, "repetition_penalty": 1.0}})
    )
    with pytest.raises(InputError, match="damaged, or not of this version"):
        calibrated(found.task, found.made, found.digest)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(texts[0].read_text().splitlines(keepends=True)[:19]))
    with pytest.raises(InputError, match="19 records are too few to compare answers on; give 20 or more"):
        calibrate(finished_model(writing), few, 6)
