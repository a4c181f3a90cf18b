"""Traps that take whole silos: what one reply may show of other data, of the number of records, of earlier training."""

import json
import shutil

import numpy as np
import pytest
from silo_requests import TRUSTED, ask

from configs.schema.silo import SiloConfig
from federated.adapters.arrays import from_bytes, to_bytes
from federated.adapters.warm_model import initial_adapter, kept_warm
from federated.protocol import silo_pb2 as pb
from federated.silo.silo import Silo
from federated.silo.units import rows_of
from privacy.plan import PlanTerms

PLAN = PlanTerms(sampling_rate=0.05, max_grad_norm=1.0, noise_multiplier=0.8, rounds=2, steps_per_round=2, delta=1e-5)
# Some 54 records are the larger silo's alone: that no batch of two has one of them has a chance of 0.7^108 (1e-16).
OFTEN = PLAN.model_copy(update={"sampling_rate": 0.3, "noise_multiplier": 4.0})
SEED = bytes(range(32))


def silo_of(folder, model, rows, name="south", **policy):
    """A silo of this many records, with injected seed and a split that is the same for all."""
    state = folder / "state" / name
    state.mkdir(parents=True)
    (state / "split.key").write_bytes(SEED)
    (state / "split.key").chmod(0o600)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps({"text": f"note {i} of ward {name}"}) + "\n" for i in range(rows)))
    rows_of.cache_clear()
    config = SiloConfig(
        silo={
            "id": name,
            "dataset_id": "ward",
            "state_dir": str(state),
            "base_model": str(model),
            "public_record_count": 100,
        },
        data={"source": str(data)},
        policy={"budget_epsilon": 20.0, "budget_delta": 1e-4, "max_epsilon_per_run": 10.0, **policy},
    )
    return Silo(config, TRUSTED, SEED)


def trained(silo, adapter, plan=PLAN):
    """The reply to the first round's request, and what the ledger then says."""
    name = silo.config.silo.id
    ask(silo, "reserve", silo_id=name, reserve=pb.Reserve(plan=plan.model_dump_json()))
    train = pb.Train(
        round=1,
        plan_digest=plan.digest,
        base_model_digest=silo.workbench.base_model.content_digest,
        task="causal",
        adapter_spec=pb.AdapterSpec(rank=4, alpha=8.0),
        adapter=adapter,
        learning_rate=0.01,
        optimizer="adam",
    )
    reply, _ = ask(silo, "round-1", silo_id=name, train=train)
    kinds = [json.loads(entry["body"])["kind"] for entry in silo.ledger.entries()]
    claims = (kinds, silo.ledger.left())
    silo.close()
    return reply, claims


@pytest.fixture(scope="module")
def adapter(tiny_run):
    return to_bytes(initial_adapter(tiny_run.config(), tiny_run.model))


def test_what_other_data_left_in_the_warm_model_never_reaches_a_release(tmp_path, tiny_model, adapter):
    """A silo's release on a fresh model, and on one that another silo has just trained: the same bytes."""
    kept_warm.cache_clear()
    alone, _ = trained(silo_of(tmp_path / "alone", tiny_model, 120), adapter)
    kept_warm.cache_clear()
    other, _ = trained(silo_of(tmp_path / "other", tiny_model, 120, "north"), adapter)
    after, _ = trained(silo_of(tmp_path / "after", tiny_model, 120), adapter)
    assert alone.trained.update == after.trained.update
    assert other.trained.update != after.trained.update


def test_the_number_of_records_changes_nothing_but_the_noised_update(tmp_path, tiny_model, adapter):
    """With 120 records and with 60: the same fields and sizes, the same claims, the update of another batch."""
    replies, claims = zip(
        *(
            trained(silo_of(tmp_path / str(rows), tiny_model, rows, max_sampling_rate=0.3), adapter, OFTEN)
            for rows in (120, 60)
        ),
        strict=True,
    )
    assert claims[0] == claims[1]
    assert [reply.WhichOneof("kind") for reply in replies] == ["trained", "trained"]
    assert len(replies[0].trained.update) == len(replies[1].trained.update)
    arrays = [from_bytes(reply.trained.update) for reply in replies]
    assert {name: value.shape for name, value in arrays[0].items()} == {n: v.shape for n, v in arrays[1].items()}
    assert any((arrays[0][name] != arrays[1][name]).any() for name in arrays[0])
    # The noise under both is the same: only what the records add differs, and it is small beside it.
    first, second = (np.concatenate([values[name].ravel() for name in sorted(values)]) for values in arrays)
    assert np.corrcoef(first, second)[0, 1] > 0.9


def test_a_silos_answer_does_not_depend_on_who_else_answers(tmp_path, tiny_model, adapter):
    """Every silo adds all of its own noise, so a missing one takes away only what was its own."""
    together = [trained(silo_of(tmp_path / "both", tiny_model, 120, name), adapter)[0] for name in ("north", "south")]
    shutil.rmtree(tmp_path / "both")
    alone, _ = trained(silo_of(tmp_path / "both", tiny_model, 120), adapter)
    assert together[1].trained.update == alone.trained.update
