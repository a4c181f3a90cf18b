"""A base model before any fine-tuning: its prompts alone, and worked examples of training records before them."""

import json
from collections import Counter

import pytest
import torch
from chat_templates import small_decoder, tokenizer_of
from silo_requests import TRUSTED
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from configs.errors import InputError
from configs.load import load
from configs.storage.layout import RunFiles
from configs.storage.manifests import Manifest, commit_manifest
from federated.silo.silo import Silo
from federated.silo.units import rows_of, units_of
from federated.simulation.few_shot import drawn, score_base
from federated.simulation.simulation import simulated_silos
from siloweave import app
from trainer.data.tokenizer import load_tokenizer

LABELS, SHOTS, CONTEXT = ("calm", "urgent"), 3, 128
TEMPLATE = "{text}\nTriage:"
LIKELY = {"task": "classification", "labels": LABELS, "pooling": "likelihood", "template": TEMPLATE}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small decoder of random weights, where a run has its model."""
    place = RunFiles(tmp_path_factory.mktemp("runs") / "few").model
    place.mkdir(parents=True)
    tokenizer_of(place)
    small_decoder().save_pretrained(place)
    commit_manifest(place, Manifest("model", "", metadata={"context_length": CONTEXT, "trained_on": "public"}))
    return place


def settings(folder, model, *overrides, **federated):
    """Options of a simulation of two wards, whose notes are urgent at every third place."""
    source, given = folder / "notes.jsonl", {**LIKELY, **federated}
    rows = [
        {"ward": ("north", "south")[n % 2], "text": f"note {n}", "label": LABELS[n % 3 == 0], "reply": "a" * (n % 5)}
        for n in range(120)
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows_of.cache_clear()
    private = {"text": "text", "silo": "ward", "unit": "", "public_record_counts": {}, "held_out_fraction": 0.4}
    fields = {
        "run.name": "few",
        "run.storage": str(model.parent.parent),
        "federated.state_dir": str(folder / "state"),
        "model.context_length": CONTEXT,
        "data.private.source": str(source),
        **{f"data.private.{name}": value for name, value in private.items()},
        **{f"federated.{name}": value for name, value in given.items()},
    }
    return [*(f"{name}={json.dumps(value)}" for name, value in fields.items()), *overrides]


def by_hand(model, prompts):
    """Which label transformers holds likelier after each prompt, its end included."""
    tokenizer, base = load_tokenizer(model), AutoModelForCausalLM.from_pretrained(model)
    for prompt in prompts:
        nats = []
        for label in LABELS:
            ids = tokenizer.encode(f"{prompt} {label}", add_special_tokens=False)
            read = torch.tensor([[tokenizer.eos_token_id, *ids, tokenizer.eos_token_id]])
            nats.append(base(input_ids=read, labels=read).loss.item() * (read.numel() - 1))
        yield int(nats[1] < nats[0])


@pytest.mark.parametrize("shots", [0, SHOTS])
def test_figures_are_those_of_prompts_written_by_hand(tmp_path, model, shots):
    config = load("tiny", settings(tmp_path, model))
    found = score_base(config, model, shots)
    units = [units_of(silo) for silo in simulated_silos(config, model).values()]
    train = [row for own in units for unit in own.train for row in unit]
    shown = "".join(
        f"{row['text']}\nTriage: {LABELS[row['label']]}\n\n" for row in drawn(train, shots, config.run.seed)
    )
    assert shown.count("note") == shots
    held_out = [row for own in units for (row,) in own.held_out[: config.evaluate.max_records_per_silo]]
    answers = list(by_hand(model, [f"{shown}{row['text']}\nTriage:" for row in held_out]))
    right = sum(row["label"] == answer for row, answer in zip(held_out, answers, strict=True))
    assert found["base"]["accuracy"] == pytest.approx(right / len(held_out))
    assert (found["shots"], found["metric"], found["base"]["records"]) == (shots, "accuracy", len(held_out))
    assert found["simulation_only"] and set(found["base"]["by_silo"]) == {"north", "south"}


def test_what_is_held_out_stays_so_when_the_silos_train_later(tmp_path, model):
    config = load("tiny", settings(tmp_path, model))
    score_base(config, model, 0)
    for silo_config in simulated_silos(config, model).values():
        before = units_of(silo_config)
        silo = Silo(silo_config, TRUSTED, bytes(range(32)))
        silo.close()
        assert units_of(silo_config) == before
        assert before.held_out


def test_worked_examples_go_by_the_seed_and_evenly_over_labels():
    rows = [{"text": str(number), "label": int(number % 10 == 0)} for number in range(50)]
    found = drawn(rows, 8, 1)
    assert Counter(row["label"] for row in found) == {0: 4, 1: 4}
    assert found == drawn(rows, 8, 1) != drawn(rows, 8, 2)
    assert Counter(row["label"] for row in drawn(rows, 20, 1)) == {0: 15, 1: 5}  # there are no more
    plain = [{"source": str(number)} for number in range(9)]
    assert len({row["source"] for row in drawn(plain, 5, 0)}) == 5


@pytest.mark.parametrize(
    ("shots", "changes", "said"),
    [
        (0, {"pooling": "model"}, "evaluate --base: the task 'classification' needs a head, which only training"),
        (1, {"task": "qa", "labels": (), "pooling": "model", "template": ""}, "the task 'qa' needs a head"),
        (
            2,
            {"task": "causal", "labels": (), "pooling": "model", "template": ""},
            "--shots 2: a plain text has no prompt",
        ),
        (130, {}, "evaluate --shots 130: there are "),
        (
            20,
            {},
            "prompts do not fit model.context_length (128); give fewer examples, or a longer context",
        ),
    ],
)
def test_what_has_no_figure_is_refused_in_one_line(tmp_path, model, shots, changes, said):
    config = load("tiny", settings(tmp_path, model, **changes))
    with pytest.raises(InputError) as refused:
        score_base(config, model, shots)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def command(folder, model, *words, **changes):
    options = [word for item in settings(folder, model, **changes) for word in ("--set", item)]
    return CliRunner().invoke(app, ["--debug", "evaluate", "-c", "tiny", *words, *options])


def test_the_command_shows_both_models(tmp_path, model, monkeypatch):
    monkeypatch.setenv("SILOWEAVE_DEBUG", "1")  # so that no command quietens this process for good
    done = command(tmp_path, model, "--base", "--json")
    alone = json.loads(done.stdout.splitlines()[-1])
    assert (done.exit_code, "federated" in alone) == (0, False)
    last = {"accuracy": 0.875, "records": 24}
    evaluation = RunFiles(model.parent).evaluation
    evaluation.write_text(json.dumps({"base": {}, "federated": [{"accuracy": 0.5}, last]}))
    try:
        both = json.loads(command(tmp_path, model, "--shots", "2", "--json").stdout.splitlines()[-1])
        assert (both["shots"], both["federated"]) == (2, last)
        assert both["base"]["records"] == alone["base"]["records"]
        lines = command(tmp_path, model, "--shots", "2").stdout.splitlines()
        assert lines[-2].startswith("base model, 2 worked examples: accuracy ")
        assert lines[-1] == "federated with DP: accuracy 0.875 on 24 public records"
        evaluation.write_text(json.dumps({"federated": [1]}))
        said = str(command(tmp_path, model, "--base").exception)
        assert said.endswith("damaged, or not of this version of Siloweave; run `siloweave evaluate` again")
    finally:
        evaluation.unlink()


def test_private_data_are_refused_before_they_are_read(tmp_path, model):
    config = load("tiny", settings(tmp_path, model, "evaluate.without_dp=false", "data.private.public=false"))
    with pytest.raises(InputError, match=r"needs data declared data\.private\.public = true") as refused:
        score_base(config, model, 0)
    assert refused.value.exit_status == 2
    assert not (tmp_path / "state").exists()
