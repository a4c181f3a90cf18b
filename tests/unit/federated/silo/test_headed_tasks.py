"""A silo with entities, one with questions: from a file to a noised update and noised sums, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from silo_requests import TRUSTED, ask
from tiny_bert import base_model, published

from configs.errors import InputError
from configs.parse import parse
from configs.schema.silo import SiloConfig
from configs.storage.manifests import read_manifest
from federated.adapters.arrays import from_bytes, to_bytes
from federated.evaluation.private_sums import bounds_of, figures
from federated.protocol import silo_pb2 as pb
from federated.silo.local_training import LocalSettings, plain_update
from federated.silo.silo import Silo
from privacy.plan import METRIC, MetricRelease, PlanTerms
from trainer.models.adapters import adapter_weights
from trainer.scoring.score import score

PLAN = PlanTerms(
    sampling_rate=0.1, max_grad_norm=1.0, noise_multiplier=0.8, rounds=1, steps_per_round=2, delta=1e-5,
    metric_releases=(MetricRelease(name=METRIC, noise_multiplier=2.0, releases=1),),
)  # fmt: skip
TAGS = ["O", "B-PER", "I-PER"]
NAMES, PLACES = ["Ada", "Ben", "Cleo", "Dora"], ["Rome", "Oslo", "Bonn"]


def entity_row(number):
    name, place = NAMES[number % 4], PLACES[number % 3]
    return {"tokens": [name, "Smith", "went", "to", place], "tags": ["B-PER", "I-PER", "O", "O", "O"]}


def question_row(number):
    name, place = NAMES[number % 4], PLACES[number % 3]
    context = "Nobody was late. " * (number % 2) + f"{name} went to {place}."
    answer = {"text": [name], "answer_start": [context.index(name)]}
    return {"context": context, "question": "Who went away?", "answer": answer}


ROWS = {"entities": entity_row, "qa": question_row}
TEXTS = [" ".join([*NAMES, *PLACES, "Smith went to nobody was late . who went away ?"])] * 3


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    return base_model(folder, published(folder / "theirs", TEXTS))


@pytest.fixture(params=ROWS)
def config(request, model, tmp_path):
    """Settings of a silo of 60 people, each with two records."""
    make, data = ROWS[request.param], tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({**make(n), "who": f"person {n // 2}"}) + "\n" for n in range(120)))
    labels = {"labels": TAGS} if request.param == "entities" else {}
    return SiloConfig(
        silo={
            "id": "north", "dataset_id": "ward", "state_dir": str(tmp_path / "state"), "base_model": str(model),
            "public_record_count": 50,
        },
        data={"source": str(data), "unit": "who", "held_out_fraction": 0.3},
        policy={
            "tasks": [request.param], **labels, "releases_metrics": True,
            "base_models": [read_manifest(model, "model").content_digest],
            "budget_epsilon": 60.0, "budget_delta": 1e-4, "max_epsilon_per_run": 60.0,
        },
    )  # fmt: skip


def asked(silo, config, **fields):
    spec = config.policy.task_spec
    return {
        "plan_digest": PLAN.digest,
        "base_model_digest": silo.workbench.base_model.content_digest,
        "task": spec.name,
        "task_spec": pb.TaskSpec(labels=spec.labels, template=spec.template),
        "adapter_spec": pb.AdapterSpec(rank=2, alpha=4.0),
        **fields,
    }


def test_a_round_and_an_evaluation(config):
    silo = Silo(config, TRUSTED, bytes(range(32)))
    try:
        ask(silo, "reserve", reserve=pb.Reserve(plan=PLAN.model_dump_json()))
        model = silo.workbench.model(pb.Train(**asked(silo, config)))
        adapter = {name: value.numpy() for name, value in adapter_weights(model).items()}
        content = to_bytes(adapter)
        train = pb.Train(**asked(silo, config, round=1, adapter=content, learning_rate=0.01, optimizer="sgd"))
        update = from_bytes(ask(silo, "round-1", train=train)[0].trained.update)
        assert {name: array.shape for name, array in update.items()} == {n: a.shape for n, a in adapter.items()}
        assert all(np.isfinite(array).all() for array in update.values())
        heads = [array for name, array in update.items() if "lora" not in name]
        assert heads and all(array.any() for array in heads)
        evaluate = pb.Evaluate(**asked(silo, config, number=1, metric=METRIC, adapter=content))
        sums = list(ask(silo, "evaluation-1", evaluate=evaluate)[0].evaluated.sums)
        bounds = bounds_of(silo.workbench.base_model, config.policy.task_spec, ())
        assert len(sums) == bounds.num_sums
        found = figures([sums], bounds, 1e-9)
        assert bounds.measures.main in found
        assert {"entities": "entity_f1", "qa": "answer_f1"}[config.policy.tasks[0]] == bounds.measures.main
        # A person's two records are one unit.
        assert len(silo.workbench.records) + len(silo.workbench.held_out) == 60
        kinds = [json.loads(entry["body"])["kind"] for entry in silo.ledger.entries()]
        assert kinds.count("charge") == 2
    finally:
        silo.close()


def test_what_the_tags_or_the_place_say_is_learnt(config):
    """Without DP, to see that losses and answers belong together: a few steps solve what is easy."""
    silo = Silo(config, TRUSTED, bytes(range(32)))
    try:
        bench, task = silo.workbench, silo.workbench.task
        model = bench.model(pb.Train(**asked(silo, config)))
        adapter = {name: value.numpy() for name, value in adapter_weights(model).items()}
        train, held_out = ([one for unit in part for one in unit] for part in (bench.records, bench.held_out))
        before = score(model.eval(), task, held_out, 16).main
        settings = LocalSettings(0.01, "adam", 16, "bookkeeping")
        plain_update([train] * 40, len(train), model, task, adapter, settings)
        after = score(model.eval(), task, held_out, 16).main
        assert after > 0.9
        assert before is None or before < 0.6
    finally:
        silo.close()


def damaged(config):
    """One record more, which does not fit."""
    secret = {
        "entities": {"tokens": ["Zaphod", "Smith"], "tags": ["O"]},
        "qa": {"context": "Zaphod went.", "question": "Who?", "answer": "Ford"},
    }[config.policy.tasks[0]]
    with Path(config.data.source).open("a", encoding="utf-8") as file:
        file.write(json.dumps({**secret, "who": "person 1"}) + "\n")


def test_a_record_that_does_not_fit_stops_the_silo_before_any_charge(config):
    damaged(config)
    with pytest.raises(
        InputError, match=r"data\.jsonl, line 121: it(s answer is not| has not as many tags)"
    ) as refused:
        Silo(config, TRUSTED)
    assert "Zaphod" not in str(refused.value)
    assert "\n" not in str(refused.value)


def test_only_answers_can_be_deidentified(config):
    tree = config.model_dump()
    tree["data"]["deidentify"]["enabled"] = True
    if config.policy.tasks[0] == "qa":
        assert parse(SiloConfig, tree, "silo.toml").data.deidentify.enabled
        return
    with pytest.raises(InputError, match="'entities' has tags for single words, inside which nothing can be replaced"):
        parse(SiloConfig, tree, "silo.toml")
