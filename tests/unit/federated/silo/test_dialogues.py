"""A silo whose records are dialogues, from its file to a noised update and a private evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
from chat_templates import small_decoder, tokenizer_of
from silo_requests import TRUSTED, ask, ward

from configs.schema.silo import SiloConfig
from configs.storage.manifests import Manifest, commit_manifest
from federated.adapters.arrays import from_bytes, to_bytes
from federated.evaluation.private_sums import bounds_of, figures
from federated.protocol import silo_pb2 as pb
from federated.silo.silo import Silo
from federated.silo.units import units_of
from privacy.plan import METRIC, MetricRelease, PlanTerms
from trainer.models.adapters import adapter_weights, add_adapter
from trainer.models.load import load_model

PLAN = PlanTerms(
    sampling_rate=0.1,
    max_grad_norm=1.0,
    noise_multiplier=0.8,
    rounds=1,
    steps_per_round=2,
    delta=1e-5,
    metric_releases=(MetricRelease(name=METRIC, releases=1, noise_multiplier=2.0),),
)
SPEC = pb.AdapterSpec(rank=2, alpha=4.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer_of(folder)
    small_decoder().save_pretrained(folder)
    commit_manifest(folder, Manifest("model", "", metadata={"context_length": 64, "trained_on": "public"}))
    return folder


def settings(folder, model, **data):
    given = ward(folder, model, tasks=["chat"], releases_metrics=True).model_dump()
    lines = [
        [{"role": "user", "content": f"How is Ada {i}?"}, {"role": "assistant", "content": f"Ada {i} sleeps."}]
        for i in range(60)
    ]
    for turns in lines[:20]:
        turns[0]["content"] = "long " * 99  # of its answer nothing fits the context
    (folder / "data.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for turns in lines))
    return SiloConfig(**{**given, "data": {**given["data"], **data}})


def common(silo):
    base = silo.workbench.base_model.content_digest
    adapter = add_adapter(load_model(Path(silo.config.silo.base_model)), 2, 4.0, seed=0)
    content = to_bytes({name: weight.numpy() for name, weight in adapter_weights(adapter).items()})
    known = {"plan_digest": PLAN.digest, "base_model_digest": base, "task": "chat"}
    return {**known, "adapter_spec": SPEC, "adapter": content}


def test_a_silo_of_dialogues_trains_and_is_evaluated(tmp_path, model):
    silo = Silo(settings(tmp_path, model), TRUSTED, bytes(range(32)))
    ask(silo, "reserve", reserve=pb.Reserve(plan=PLAN.model_dump_json()))
    fields = common(silo)
    steps = {"round": 1, "learning_rate": 0.01, "optimizer": "adam"}
    trained, _ = ask(silo, "round-1", train=pb.Train(**fields, **steps))
    update = from_bytes(trained.trained.update)
    assert all(np.isfinite(array).all() and array.any() for array in update.values())
    evaluated, _ = ask(silo, "evaluation", evaluate=pb.Evaluate(**fields, number=1, metric=METRIC))
    bounds = bounds_of(silo.workbench.base_model, silo.config.policy.task_spec, ())
    found = figures([evaluated.evaluated.sums], bounds, 2.0)
    assert set(found) == {"nats_per_token", "nats_per_token_error", "accuracy", "accuracy_error"}
    long = sum(row["messages"][0][1].startswith("long") for unit in units_of(silo.config).train for row in unit)
    (dropped,) = [line for line in silo.workbench.notes if line.startswith("  dropped: training units with nothing")]
    assert dropped.split("context")[1].split()[0] == str(long)
    silo.close()


def test_names_are_taken_out_of_what_is_said_and_roles_stay(tmp_path, model):
    (tmp_path / "names.txt").write_text("Ada\nuser\n")
    config = settings(tmp_path, model, deidentify={"enabled": True, "names_file": str(tmp_path / "names.txt")})
    Silo(config, TRUSTED).close()
    units = units_of(config)
    dialogues = [row["messages"] for unit in (*units.train, *units.held_out) for row in unit]
    assert len(dialogues) == 60
    assert {tuple(role for role, _ in dialogue) for dialogue in dialogues} == {(1, 2)}
    assert not [said for dialogue in dialogues for _, said in dialogue if "Ada" in said]
