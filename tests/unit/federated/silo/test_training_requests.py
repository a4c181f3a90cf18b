"""What a silo takes of FedProx, SCAFFOLD and FFA-LoRA in a request, and what it refuses before anything is charged."""

import json

import numpy as np
import pytest
from silo_requests import TRUSTED, ask

from configs.schema.silo import SiloConfig
from federated.adapters.arrays import from_bytes, to_bytes
from federated.adapters.lora_factors import frozen, frozen_digest
from federated.adapters.warm_model import initial_adapter
from federated.protocol import silo_pb2 as pb
from federated.silo.silo import Silo
from privacy.plan import PlanTerms

PLAN = PlanTerms(sampling_rate=0.05, max_grad_norm=1.0, noise_multiplier=0.8, rounds=9, steps_per_round=1, delta=1e-5)


@pytest.fixture(scope="module")
def silo(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("silo")
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps({"text": f"patient note number {i} of the ward"}) + "\n" for i in range(120)))
    config = SiloConfig(
        silo={
            "id": "north",
            "dataset_id": "ward",
            "state_dir": str(folder / "state"),
            "base_model": str(tiny_model),
            "public_record_count": 100,
        },
        data={"source": str(data)},
        policy={"budget_epsilon": 100.0, "budget_delta": 1e-3, "max_epsilon_per_run": 50.0},
    )
    silo = Silo(config, TRUSTED, bytes(range(32)))
    ask(silo, "reserve", reserve=pb.Reserve(plan=PLAN.model_dump_json()))
    yield silo
    silo.close()


@pytest.fixture(scope="module")
def adapter(tiny_run):
    return initial_adapter(tiny_run.config(), tiny_run.model)


def train(silo, adapter, request_id, round_number=1, spec=None, **changes):
    values = {
        "round": round_number,
        "plan_digest": PLAN.digest,
        "base_model_digest": silo.workbench.base_model.content_digest,
        "task": "causal",
        "adapter_spec": pb.AdapterSpec(rank=4, alpha=8.0, **(spec or {})),
        "adapter": to_bytes(adapter),
        "learning_rate": 0.01,
        "optimizer": "sgd",
    }
    return ask(silo, request_id, train=pb.Train(**{**values, **changes}))[0]


def charges(silo):
    return [json.loads(entry["body"])["kind"] for entry in silo.ledger.entries()].count("charge")


NAN = {"proximal_mu": float("nan")}


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"proximal_mu": -1.0}, "max_proximal_mu"),
        ({"proximal_mu": 101.0}, "max_proximal_mu"),
        (NAN, "max_proximal_mu"),
        ({"proximal_mu": 1.01, "learning_rate": 1.0}, "proximal_mu"),
        ({"proximal_mu": 100.0, "learning_rate": 0.02, "optimizer": "adam"}, "proximal_mu"),
        ({"correction": b"lies"}, "correction"),
        ({"correction": to_bytes({"other": np.zeros(3, dtype=np.float32)})}, "correction"),
        ({"spec": {"frozen_digest": "00" * 32, "frozen_seed": 0}}, "frozen_digest"),
    ],
)
def test_what_is_refused_is_never_charged(silo, adapter, changes, rule):
    before = charges(silo)
    assert train(silo, adapter, "refused", **changes).refusal.rule == rule
    assert charges(silo) == before


def test_a_pull_that_overshoots_is_refused_by_the_product_of_both(silo, adapter):
    """Before: charged, and after enough steps every value was infinite."""
    refusal = train(silo, adapter, "refused", proximal_mu=4.0, learning_rate=0.5).refusal
    assert refusal.message == (
        "proximal_mu: asked learning_rate 0.5 times proximal_mu 4 is 2, allowed at most 1: a longer step overshoots"
    )
    # Up to the bound a step ends between where it began and the shared adapter.
    assert train(silo, adapter, "pulled", 5, proximal_mu=100.0, learning_rate=0.01).WhichOneof("kind") == "trained"


def test_a_correction_that_is_not_finite_is_refused(silo, adapter):
    poisoned = {name: array * np.float32("nan") for name, array in adapter.items()}
    assert train(silo, adapter, "poisoned", correction=to_bytes(poisoned)).refusal.rule == "max_adapter_value"


def test_a_correction_reaches_the_steps(silo, adapter):
    """One step: the update moves by learning rate times correction; a correction so large that noise is lost in it."""
    correction = {name: np.full_like(array, 1000.0) for name, array in adapter.items()}
    reply = train(silo, adapter, "corrected", 2, correction=to_bytes(correction))
    for array in from_bytes(reply.trained.update).values():
        np.testing.assert_allclose(array, -10.0, rtol=0.02)


def test_with_a_frozen_a_only_b_travels(silo, adapter, tiny_run):
    spec = {"frozen_digest": frozen_digest(adapter), "frozen_seed": tiny_run.config().run.seed}
    sent = {name: array for name, array in adapter.items() if not frozen(name)}
    reply = train(silo, sent, "ffa", 3, spec)
    update = from_bytes(reply.trained.update)
    assert set(update) == set(sent)
    assert all(array.any() for array in update.values())
    refused = train(silo, adapter, "ffa, both factors", 4, spec).refusal
    assert refused.rule == "adapter"
    other = train(silo, sent, "ffa, another A", 4, {**spec, "frozen_seed": 7}).refusal
    assert other.rule == "frozen_digest"
