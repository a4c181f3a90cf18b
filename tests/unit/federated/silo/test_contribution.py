"""A silo in a run with clients as units: only where its steward allows it, clipped, and told in its ledger."""

import json
import math

import numpy as np
import pytest
from client_plans import client_plan
from silo_requests import COORDINATOR, TRUSTED, ask, body_of, opened, signer_of

from configs.errors import InputError
from configs.schema.silo import SiloConfig
from configs.storage.files import digest_bytes
from federated.adapters.arrays import from_bytes, to_bytes
from federated.adapters.packed_updates import unpacked
from federated.adapters.warm_model import initial_adapter
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_request
from federated.silo.silo import Silo
from privacy.compression import Compression
from privacy.ledger.chain import verify_entries
from privacy.ledger.replay import replay
from privacy.plan import PlanTerms

C = 0.05
CLIENTS = client_plan(max_grad_norm=C, noise_multiplier=2.0, rounds=2, num_clients=5)
RECORDS = PlanTerms(
    sampling_rate=0.05, max_grad_norm=1.0, noise_multiplier=0.8, rounds=2, steps_per_round=2, delta=1e-5
)
OTHER = signer_of(bytes(range(1, 33)))


@pytest.fixture(scope="module")
def adapter(tiny_run):
    return to_bytes(initial_adapter(tiny_run.config(), tiny_run.model))


@pytest.fixture
def silo_with(tmp_path, tiny_model):
    """Opens a silo with a policy."""
    silos = []

    def new(trusted=TRUSTED, **policy):
        data = tmp_path / "data.jsonl"
        data.write_text(
            "".join(json.dumps({"text": f"patient note number {i} of the ward"}) + "\n" for i in range(120))
        )
        config = SiloConfig(
            silo={
                "id": "north",
                "dataset_id": "ward",
                "state_dir": str(tmp_path / "north"),
                "base_model": str(tiny_model),
                "public_record_count": 100,
            },
            data={"source": str(data)},
            policy={"budget_epsilon": 20.0, "budget_delta": 1e-4, **policy},
        )
        silos.append(Silo(config, trusted))
        return silos[-1]

    yield new
    for silo in silos:
        silo.close()


def reserve(silo, plan=CLIENTS, **changes):
    return ask(silo, "reserve", reserve=pb.Reserve(plan=plan.model_dump_json()), **changes)[0]


def train(silo, content, plan=CLIENTS, round_number=1):
    return pb.Train(
        round=round_number,
        plan_digest=plan.digest,
        base_model_digest=silo.workbench.base_model.content_digest,
        task="causal",
        adapter_spec=pb.AdapterSpec(rank=4, alpha=8.0),
        adapter=content,
        learning_rate=0.01,
        optimizer="adam",
    )


def contribute(silo, content, request_id="round-1", **changes):
    fields = {"local_steps": 3, "sampling_rate": 0.1, **changes}
    fields.setdefault("train", train(silo, content))
    return ask(silo, request_id, contribute=pb.Contribute(**fields))[0]


def kinds(silo):
    return [json.loads(entry["body"])["kind"] for entry in silo.ledger.entries()]


BOTH = {"units": ["record", "client"]}


def test_a_record_only_silo_refuses_a_client_plan_by_its_rule(silo_with, adapter):
    silo = silo_with()
    refusal = reserve(silo).refusal
    assert (refusal.rule, refusal.asked, refusal.allowed) == ("units", "client", "record")
    assert contribute(silo, adapter).refusal.rule == "reservation"
    assert kinds(silo) == ["open"]


def test_an_update_without_noise_is_rounded_where_its_plan_says_so_and_nothing_of_it_is_kept(silo_with, adapter):
    """What it would leave out is private, and no plan has that (``share`` below 1 with clients as units)."""
    silo, how = silo_with(**BOTH), Compression(dtype="int8", block=64)
    plan = CLIENTS.model_copy(update={"compression": how})
    assert reserve(silo, plan).WhichOneof("kind") == "reserved"
    reply = contribute(silo, adapter, train=train(silo, adapter, plan))
    shapes = {name: array.shape for name, array in from_bytes(adapter).items()}
    update = unpacked(reply.trained.update, how, shapes)
    norm = math.sqrt(sum(float((array.astype(np.float64) ** 2).sum()) for array in update.values()))
    assert norm == pytest.approx(C, rel=0.01)  # up to the rounding, after which the aggregator clips again
    assert contribute(silo, adapter, train=train(silo, adapter, plan)) == reply
    assert not (silo.ledger.path.parent / "remainders").exists()
    with pytest.raises(ValueError, match="has no noise, and would be kept"):
        PlanTerms(**{**plan.model_dump(), "compression": {**how.model_dump(), "share": 0.5}})


def test_an_update_leaves_clipped_and_the_ledger_says_that_it_had_no_noise(silo_with, adapter, siloweave, tmp_path):
    silo = silo_with(**BOTH)
    assert reserve(silo).WhichOneof("kind") == "reserved"
    first = from_bytes(contribute(silo, adapter).trained.update)
    norm = math.sqrt(sum(float((array.astype(np.float64) ** 2).sum()) for array in first.values()))
    assert norm == pytest.approx(C, rel=1e-5)  # longer before: three steps of Adam move every weight by some 0.01
    again = from_bytes(contribute(silo, adapter).trained.update)
    assert all((first[name] == again[name]).all() for name in first)
    assert kinds(silo) == ["open", "entrust", "unnoised"]
    assert silo.ledger.left().epsilon == 20  # about records there is nothing to add up
    ask(silo, "close", close=pb.Close())
    assert contribute(silo, adapter).refusal.rule == "closed"
    replay(verify_entries(silo.ledger.entries(), "test"), "test")
    shown = siloweave("ledger", "show", str(tmp_path / "north"), cwd=tmp_path).stdout.splitlines()
    assert "unnoised" in shown[2]
    assert "noise=none: the aggregator adds it" in shown[2]
    audited = (tmp_path / "north" / "audit.jsonl").read_text()
    assert audited.count('"kind": "contribute"') == 3


def test_no_record_plan_gets_an_update_without_noise_and_no_client_plan_gets_records(silo_with, adapter):
    silo = silo_with(**BOTH)
    reserve(silo, RECORDS)
    for plan in (RECORDS, CLIENTS):
        assert contribute(silo, adapter, train=train(silo, adapter, plan)).refusal.rule == "reservation"
    assert reserve(silo).refusal.rule == "reservation"  # the same run can't be both
    assert reserve(silo, run_id="run-2").WhichOneof("kind") == "reserved"
    for plan in (RECORDS, CLIENTS):
        kind = {"train": train(silo, adapter, plan)}
        assert ask(silo, "round-1", run_id="run-2", **kind)[0].refusal.rule == "reservation"
    assert reserve(silo, RECORDS, run_id="run-2").refusal.rule == "reservation"
    assert kinds(silo) == ["open", "reserve", "entrust"]


def test_only_the_aggregator_that_a_run_was_entrusted_to_gets_its_updates(silo_with, adapter):
    silo = silo_with(trusted=TRUSTED | {OTHER.public_key}, **BOTH)
    reserve(silo)
    asked = pb.Contribute(train=train(silo, adapter), local_steps=3, sampling_rate=0.1)
    body = body_of("round-1", coordinator=OTHER.public_key, contribute=asked)
    assert opened(silo.handle(seal_request(OTHER, body)), silo).refusal.rule == "reservation"
    assert kinds(silo) == ["open", "entrust"]
    assert COORDINATOR.public_key in silo.ledger.entries()[1]["body"]


def test_a_used_id_a_used_round_and_rounds_beyond_the_plan_are_refused(silo_with, adapter):
    silo = silo_with(**BOTH)
    reserve(silo)
    reply, body = ask(
        silo, "round-1", contribute=pb.Contribute(train=train(silo, adapter), local_steps=1, sampling_rate=0.1)
    )
    assert reply.request_digest == digest_bytes(body)
    assert contribute(silo, adapter, local_steps=2).refusal.rule == "request_id"
    assert contribute(silo, adapter, "another", local_steps=2).refusal.rule == "schedule"
    third = train(silo, adapter, round_number=3)
    assert contribute(silo, adapter, "round-3", train=third).refusal.rule == "schedule"
    assert kinds(silo).count("unnoised") == 1


@pytest.mark.parametrize(
    ("policy", "plan", "changes", "rule"),
    [
        ({"min_noise_multiplier": 3.0}, {}, {}, "min_noise_multiplier"),
        ({"max_epsilon_per_run": 1.0}, {}, {}, "max_epsilon_per_run"),
        ({}, {"clipping_function": "automatic"}, {}, "clipping_function"),
        ({}, {}, {"local_steps": 0}, "contribute"),
        ({}, {}, {"sampling_rate": math.nan}, "contribute"),
        ({}, {}, {"sampling_rate": 0.5}, "max_sampling_rate"),
        ({"max_steps_per_round": 2}, {}, {}, "max_steps_per_round"),
    ],
)
def test_the_stewards_other_rules_hold_as_well(silo_with, adapter, policy, plan, changes, rule):
    silo = silo_with(**BOTH, **policy)
    reserved = reserve(silo, CLIENTS.model_copy(update=plan))
    reply = reserved if reserved.WhichOneof("kind") == "refusal" else contribute(silo, adapter, **changes)
    assert reply.refusal.rule == rule
    assert "unnoised" not in kinds(silo)


def test_a_steward_who_takes_client_back_ends_the_run(silo_with, adapter):
    reserve(silo_with(**BOTH))
    assert contribute(silo_with(), adapter).refusal.rule == "units"


@pytest.mark.parametrize(
    ("number", "field", "value", "message"),
    [
        (2, "plan_digest", "00" * 32, "entrusted with another plan"),
        (3, "round", 3, "not entrusted with it"),
        (3, "run", "run-9", "not entrusted with it"),
    ],
)
def test_a_ledger_that_tells_it_otherwise_does_not_replay(silo_with, adapter, number, field, value, message):
    silo = silo_with(**BOTH)
    reserve(silo)
    contribute(silo, adapter)
    bodies = silo.ledger.journal.bodies()
    bodies[number - 1][field] = value
    with pytest.raises(InputError, match=message):
        replay(bodies, "test")
