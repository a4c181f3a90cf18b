"""From a finished classifier to how its answers are read: what is fitted, who goes by it, and on whose records."""

import asyncio
import json
import math

import pytest
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


def a_merged_run(folder, base, task):
    run, _, _ = a_labelling_run(folder, base, task, LABELS)
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
    done, path = calibrate(found, records)
    assert path == run / CALIBRATION
    written = json.loads(path.read_text())
    assert (written["model"], written["fitted"], written["measured"]) == (found.digest, 30, 30)
    assert written["read"] == "the file"
    assert {"loss", "expected_calibration_error"} <= written["before"].keys() == written["after"].keys()
    assert len(done.thresholds) == (2 if found.task.name == "multilabel" else 0)
    task, digest = calibrated(found.task, found.made, found.digest)
    assert len(digest) == 64
    plain, rows = asked(found, found.task)
    read, _ = asked(found, task)
    for before, after in zip(plain, read, strict=True):
        if done.thresholds:
            logits = [math.log(one / (1 - one)) / done.temperature for one in before.probabilities]
            expected = [1 / (1 + math.exp(-one)) for one in logits]
            chosen = zip(LABELS, expected, done.thresholds, strict=True)
            assert after.answer == tuple(label for label, value, least in chosen if value > least)
        else:
            powers = [one ** (1 / done.temperature) for one in before.probabilities]
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
        calibrate(found, private)
    assert "secret" not in str(refused.value)
    with pytest.raises(InputError, match="the run has no public records to calibrate on; give some by --records FILE"):
        calibrate(found, None)
    few = tmp_path / "few.jsonl"
    few.write_text('{"text": "a ship", "label": "bad"}\n')
    with pytest.raises(InputError, match="1 records are too few to calibrate on; give 40 or more"):
        calibrate(found, few)
    assert not (run / CALIBRATION).exists()
