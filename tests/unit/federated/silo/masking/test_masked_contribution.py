"""Real silos as clients under masks: what leaves, once for a round, and what a coordinator can't have instead."""

import json

import numpy as np
import pytest
from client_plans import client_plan
from silo_requests import COORDINATOR, TRUSTED, acquainted, ask, body_of

from configs.storage.files import digest_bytes
from configs.storage.layout import SiloFiles
from federated.adapters.arrays import from_bytes, to_bytes
from federated.adapters.warm_model import initial_adapter
from federated.aggregation.secure_sum import agreement, length_of, members
from federated.protocol import silo_pb2 as pb
from federated.protocol.framing import SECURE_VERSION
from federated.silo.contribution import Contribution
from federated.silo.masking import masking
from federated.silo.silo import Silo
from privacy.mechanism.masked_clients import client_encoding
from privacy.secagg.failures import SecureAggregationError
from privacy.secagg.messages import Phase
from privacy.secagg.server import Server
from privacy.secure_sum import SharedNoise

NAMES = ("north", "south")
C = 0.05
PLAN = client_plan(
    max_grad_norm=C, noise_multiplier=2.0, rounds=2, num_clients=5, secure_sum={"min_survivors": 2, "colluders": 0}
)
PLAIN = PLAN.model_copy(update={"secure_sum": None})
ENCODING = client_encoding(PLAN.for_clients(), 2)


@pytest.fixture(scope="module")
def adapter(tiny_run):
    return to_bytes(initial_adapter(tiny_run.config(), tiny_run.model))


@pytest.fixture
def silos(tmp_path, tiny_model):
    with acquainted(tmp_path, tiny_model, NAMES, units=["record", "client"]) as (found, _):
        yield found


@pytest.fixture
def words(monkeypatch):
    """What the silos have trained, before it is masked."""
    seen, begun = {}, masking.Masking.begun

    def watched(self, agreement, update, *rest):
        seen[self._name] = update.copy()
        return begun(self, agreement, update, *rest)

    monkeypatch.setattr(masking.Masking, "begun", watched)
    return seen


def told(silos, name, request_id, **kind):
    return ask(silos[name], request_id, silo_id=name, version=SECURE_VERSION, **kind)[0]


def roster_of(silos):
    return members({name: silo.ledger.public_key for name, silo in silos.items()})


def reserve(silos, name, plan=PLAN):
    secure = pb.Secure(roster=roster_of(silos)) if plan.secure_sum else None
    return told(silos, name, "reserve", reserve=pb.Reserve(plan=plan.model_dump_json(), secure=secure))


def contribute(silos, adapter, plan=PLAN, clip=ENCODING.clip, number=1, **changes):
    train = pb.Train(
        round=number,
        plan_digest=plan.digest,
        base_model_digest=silos["north"].workbench.base_model.content_digest,
        task="causal",
        adapter_spec=pb.AdapterSpec(rank=4, alpha=8.0),
        adapter=adapter,
        learning_rate=0.01,
        optimizer="adam",
        secure=pb.Secure(roster=roster_of(silos), clip=clip) if plan.secure_sum else None,
    )
    return pb.Contribute(**{"train": train, "local_steps": 3, "sampling_rate": 0.1, **changes})


def server_of(asked):
    length = length_of(from_bytes(asked.train.adapter))
    return Server(agreement(asked, PLAN.secure_sum, COORDINATOR.public_key, "run-1", length))


def begun(silos, asked):
    """A server that has all keys, and what it tells the silos then."""
    server = server_of(asked)
    for name in NAMES:
        reserve(silos, name)
        server.receive(told(silos, name, "round-1", contribute=asked).trained.keys)
    return server, server.advance()


def aggregate(silos, name, phase, message):
    asked = pb.Aggregate(round=1, phase=phase, message=message)
    return told(silos, name, f"round-1-{phase}", aggregate=asked)


def kinds(silo):
    return [json.loads(entry["body"])["kind"] for entry in silo.ledger.entries()]


def test_the_sum_is_of_what_the_silos_have_clipped_and_nothing_else_of_it_leaves(silos, adapter, words):
    north = silos["north"]
    north.config = north.config.model_copy(
        update={"silo": north.config.silo.model_copy(update={"keep_released": True})}
    )
    asked = contribute(silos, adapter)
    server, inbox = begun(silos, asked)
    for phase in list(Phase)[1:]:
        for name in NAMES:
            reply = aggregate(silos, name, phase, inbox[name])
            assert aggregate(silos, name, phase, inbox[name]) == reply
            server.receive(reply.aggregated.message)
        inbox = server.advance()
    assert (server.total() == words["north"] + words["south"]).all()
    step = ENCODING.clip / ENCODING.largest
    for name in NAMES:
        norm = np.linalg.norm(words[name].view(np.int32).astype(np.float64) * step)
        assert 0.999 * C <= norm <= C  # three steps go further than C
        reply = told(silos, name, "round-1", contribute=asked)
        assert reply.trained.update == b"" and reply.trained.keys
        assert kinds(silos[name]) == ["open", "entrust", "unnoised"]
    assert not SiloFiles(north.ledger.path.parent).released.exists()


def test_words_are_the_update_that_would_leave_by_itself_cut_towards_zero(silos, adapter, monkeypatch):
    asked, north = contribute(silos, adapter), silos["north"]
    body = body_of("round-1", version=SECURE_VERSION, contribute=asked)
    given = Contribution(north.workbench, north.config, PLAN, pb.Request.FromString(body), digest_bytes(body))
    monkeypatch.setattr("federated.silo.contribution.record_update", lambda *_: True)
    update, words = given.update(None), given.words(None, ENCODING)
    values = np.concatenate([update[name].reshape(-1) for name in sorted(update)]).astype(np.float64)
    step = ENCODING.clip / ENCODING.largest
    cut = values - words.view(np.int32) * step
    assert np.abs(cut).max() <= step + 2**-24 * np.abs(values).max()  # an update by itself is rounded to float32
    assert (np.abs(words.view(np.int32) * step) <= np.abs(values) * (1 + 2**-24)).all() and words.any()


def test_a_silo_that_starts_again_drops_out_and_never_has_a_second_client(silos, adapter):
    asked = contribute(silos, adapter)
    _, inbox = begun(silos, asked)
    first = told(silos, "north", "round-1", contribute=asked)
    assert told(silos, "north", "round-1", contribute=asked) == first
    silo = silos["north"]
    silo.close()
    silos["north"] = Silo(silo.config, TRUSTED, roster=silo._roster)
    refusal = told(silos, "north", "round-1", contribute=asked).refusal
    assert refusal.rule == "secure_aggregation" and "and so drops out of its sum" in refusal.message
    assert (
        "was started again since and so drops out of it" in aggregate(silos, "north", 2, inbox["north"]).refusal.message
    )
    assert kinds(silos["north"]) == ["open", "entrust", "unnoised"]
    again = told(silos, "north", "round-2", contribute=contribute(silos, adapter, number=2))
    assert again.WhichOneof("kind") == "trained"


def test_a_round_has_one_sum_whatever_else_is_asked_of_it(silos, adapter):
    begun(silos, contribute(silos, adapter))
    other = contribute(silos, adapter, local_steps=2)
    assert told(silos, "north", "round-1", contribute=other).refusal.rule == "request_id"
    assert told(silos, "north", "round-1b", contribute=other).refusal.rule == "schedule"
    assert kinds(silos["north"]) == ["open", "entrust", "unnoised"]


def test_silos_that_were_asked_for_different_work_have_no_sum_in_common(silos, adapter):
    """The whole request is the sum's context, and not its training alone."""
    asked = contribute(silos, adapter)
    server = server_of(asked)
    for name, work in (("north", asked), ("south", contribute(silos, adapter, local_steps=2))):
        reserve(silos, name)
        keys = told(silos, name, "round-1", contribute=work).trained.keys
        if name == "south":
            with pytest.raises(SecureAggregationError, match="another"):
                server.receive(keys)
        else:
            server.receive(keys)


@pytest.mark.parametrize("factor", [0.0, 0.5, 2.0, float("nan"), float("inf"), 1 + 2**-40])
def test_how_values_become_words_is_the_plans_and_no_coordinators(silos, adapter, factor):
    """Coarser words would make honest updates shorter, and finer ones leave their noise no room."""
    reserve(silos, "north")
    refusal = told(
        silos, "north", "round-1", contribute=contribute(silos, adapter, clip=ENCODING.clip * factor)
    ).refusal
    assert refusal.rule == "clip" and repr(ENCODING.clip) in refusal.allowed
    assert kinds(silos["north"]) == ["open", "entrust"]


def test_a_run_that_has_reserved_sums_gets_no_update_by_itself(silos, adapter):
    reserve(silos, "north")
    asked = contribute(silos, adapter)
    asked.train.ClearField("secure")
    assert told(silos, "north", "round-1", contribute=asked).refusal.rule == "roster"
    assert told(silos, "north", "round-1", contribute=contribute(silos, adapter, PLAIN)).refusal.rule == "reservation"
    ask(silos["south"], "reserve", silo_id="south", reserve=pb.Reserve(plan=PLAIN.model_dump_json()))
    asked = contribute(silos, adapter, PLAIN)
    asked.train.secure.CopyFrom(pb.Secure(roster=roster_of(silos), clip=ENCODING.clip))
    assert told(silos, "south", "round-1", contribute=asked).refusal.rule == "secure_aggregation"
    assert [kinds(silos[name]) for name in NAMES] == [["open", "entrust"]] * 2


def test_a_run_that_was_ended_gets_no_further_message(silos, adapter):
    _, inbox = begun(silos, contribute(silos, adapter))
    silos["north"].ledger.close("run-1", COORDINATOR.public_key)  # as the steward does, from another process
    assert aggregate(silos, "north", 2, inbox["north"]).refusal.rule == "closed"
    told(silos, "south", "close", close=pb.Close())
    assert "is in no sum of round 1" in aggregate(silos, "south", 2, inbox["south"]).refusal.message


def test_a_roster_that_the_steward_has_changed_meanwhile_ends_the_sum(silos, adapter):
    _, inbox = begun(silos, contribute(silos, adapter))
    silos["north"]._roster["south"] = "00" * 32
    assert "south with another key" in aggregate(silos, "north", 2, inbox["north"]).refusal.message


def test_a_policy_that_takes_no_clients_any_more_ends_the_sum(silos, adapter):
    _, inbox = begun(silos, contribute(silos, adapter))
    silo = silos["north"]
    policy = silo.config.policy.model_copy(update={"units": ("record",)})
    silo.config = silo.config.model_copy(update={"policy": policy})
    assert aggregate(silos, "north", 2, inbox["north"]).refusal.rule == "units"


def test_shared_noise_is_no_plan_of_clients():
    with pytest.raises(ValueError, match=r"sampler is 'all': with secure_sum.noise give poisson"):
        PLAN.model_validate(
            PLAN.model_dump()
            | {"secure_sum": {"colluders": 1, "noise": SharedNoise(min_honest=2, reach=1.0, values=9).model_dump()}}
        )
