"""Real silos whose updates leave under masks alone: what leaves, what is answered twice, and what is refused."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
from silo_requests import COORDINATOR, TRUSTED, acquainted, ask, body_of, opened, ward

from configs.storage.layout import SiloFiles
from federated.adapters.arrays import from_bytes, to_bytes
from federated.adapters.warm_model import initial_adapter
from federated.aggregation.secure_sum import agreement, length_of, members
from federated.identity.cards import EnrolledSilo, write_document
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_request
from federated.protocol.framing import SECURE_VERSION
from federated.silo.masking import masking
from federated.silo.silo import FAILED, Silo
from privacy.plan import PlanTerms
from privacy.secagg.messages import Phase
from privacy.secagg.server import Server

NAMES = ("north", "south")
PLAN = PlanTerms(
    sampling_rate=0.05,
    max_grad_norm=1.0,
    noise_multiplier=0.8,
    rounds=2,
    steps_per_round=2,
    delta=1e-5,
    secure_sum={"colluders": 0, "min_survivors": 2},
)
PLAIN = PLAN.model_copy(update={"secure_sum": None})
CLIP = 2 * 0.01 * 7.3


@dataclass
class Pair:
    """Two silos, and what both of them know."""

    silos: dict
    roster: dict
    adapter: bytes

    def ask(self, name, request_id, **kind):
        return ask(self.silos[name], request_id, silo_id=name, version=SECURE_VERSION, **kind)[0]

    def reserve(self, name, plan=PLAN, roster=None):
        roster = members(self.roster if roster is None else roster)
        asked = pb.Reserve(plan=plan.model_dump_json(), secure=pb.Secure(roster=roster))
        return self.ask(name, "reserve", reserve=asked)

    def train(self, plan=PLAN, clip=CLIP, roster=None, **changes):
        roster = members(self.roster if roster is None else roster)
        return pb.Train(
            **{
                "round": 1,
                "plan_digest": plan.digest,
                "base_model_digest": self.silos["north"].workbench.base_model.content_digest,
                "task": "causal",
                "adapter_spec": pb.AdapterSpec(rank=4, alpha=8.0),
                "adapter": self.adapter,
                "learning_rate": 0.01,
                "optimizer": "adam",
                "secure": pb.Secure(roster=roster, clip=clip),
                **changes,
            }
        )

    def server(self, train, plan=PLAN):
        length = length_of(from_bytes(train.adapter))
        return Server(agreement(train, plan.secure_sum, COORDINATOR.public_key, "run-1", length))

    def trained(self, train):
        """A server that has all keys, and what it tells the silos then."""
        server = self.server(train)
        for name in NAMES:
            self.reserve(name)
            server.receive(self.ask(name, "round-1", train=train).trained.keys)
        return server, server.advance()

    def aggregate(self, name, phase, message):
        asked = pb.Aggregate(round=1, phase=phase, message=message)
        return self.ask(name, f"round-1-{phase}", aggregate=asked)


@pytest.fixture(scope="module")
def adapter(tiny_run):
    return to_bytes(initial_adapter(tiny_run.config(), tiny_run.model))


@pytest.fixture
def pair(tmp_path, tiny_model, adapter):
    with acquainted(tmp_path, tiny_model, NAMES) as (silos, roster):
        yield Pair(silos, roster, adapter)


@pytest.fixture
def updates(monkeypatch):
    """What the silos have trained, before it is cut and masked."""
    seen, begun = {}, masking.Masking.begun

    def watched(self, agreement, update, *rest):
        seen[self._name] = update
        return begun(self, agreement, update, *rest)

    monkeypatch.setattr(masking.Masking, "begun", watched)
    return seen


def kinds(silo):
    return [json.loads(entry["body"])["kind"] for entry in silo.ledger.entries()]


def flat(update):
    return np.concatenate([update[name].reshape(-1) for name in sorted(update)]).astype(np.float64)


def finished(pair, server, inbox, phases=list(Phase)[1:]):
    for phase in phases:
        for name in inbox:
            server.receive(pair.aggregate(name, phase, inbox[name]).aggregated.message)
        inbox = server.advance()
    return inbox


def test_only_the_sum_of_the_noised_updates_is_seen(pair, updates):
    server, inbox = pair.trained(pair.train())
    finished(pair, server, inbox)
    total = server._agreement.encoding.decode(server.total())
    north, south = (flat(updates[name]) for name in NAMES)
    assert np.abs(north).max() < CLIP  # Adam's bound: nothing was cut
    assert np.abs(total - (north + south)).max() <= server._agreement.encoding.error_bound(2)
    assert np.abs(north).max() > 1000 * server._agreement.encoding.error_bound(2)
    for name in NAMES:
        reply = pair.ask(name, "round-1", train=pair.train())
        assert reply.trained.update == b"" and len(reply.trained.keys) < 300
        assert kinds(pair.silos[name]) == ["open", "reserve", "charge", "release"]


def test_values_beyond_the_clip_are_cut_and_no_error(pair, updates):
    clip = CLIP / 50
    server, inbox = pair.trained(pair.train(clip=clip))
    finished(pair, server, inbox)
    found = server._agreement.encoding.decode(server.total())
    cut = sum(np.clip(flat(updates[name]), -clip, clip) for name in NAMES)
    assert any(np.abs(flat(updates[name])).max() > clip for name in NAMES)
    assert np.abs(found - cut).max() <= server._agreement.encoding.error_bound(2)


def test_an_update_that_is_not_finite_fails_by_a_constant_code(pair, monkeypatch):
    monkeypatch.setattr("federated.silo.local_training._difference", lambda *_: {"a": np.full(3, np.nan, np.float32)})
    pair.reserve("north")
    reply = pair.ask("north", "round-1", train=pair.train())
    assert reply.failure.code == FAILED and len(reply.SerializeToString()) < 150


def test_a_repeated_request_gets_the_same_bytes_and_another_one_of_its_phase_nothing(pair):
    server, inbox = pair.trained(pair.train())
    asked = pb.Aggregate(round=1, phase=2, message=inbox["north"])
    body = body_of("round-1-2", version=SECURE_VERSION, aggregate=asked)
    envelope = seal_request(COORDINATOR, body)
    first = pair.silos["north"].handle(envelope)
    assert pair.silos["north"].handle(envelope) == first
    assert opened(first).WhichOneof("kind") == "aggregated"
    for other in (inbox["north"] + b"\0", b"", inbox["north"]):
        refusal = ask(
            pair.silos["north"],
            "another",
            version=SECURE_VERSION,
            aggregate=pb.Aggregate(round=1, phase=2, message=other),
        )[0].refusal
        assert "was answered, and this is another message" in refusal.message
    for name in NAMES:
        server.receive(
            pair.aggregate(name, 2, inbox[name]).aggregated.message
            if name == "south"
            else opened(first).aggregated.message
        )
    finished(pair, server, server.advance(), list(Phase)[2:])
    assert server.survivors == list(NAMES)


@pytest.mark.parametrize(
    ("phase", "message", "said"),
    [
        (0, b"", "allowed 2 to 5"),
        (1, b"", "allowed 2 to 5"),
        (6, b"", "allowed 2 to 5"),
        (2**32 - 1, b"", "allowed 2 to 5"),
        (2, b"", "this is no message of secure aggregation"),
        (2, b"SWSA" + b"\xff" * 60, "a message of version 255"),
        (3, b"", "phase 3 of a sum in which this silo is at phase 2"),
        (5, b"", "phase 5 of a sum in which this silo is at phase 2"),
    ],
)
def test_a_message_that_is_not_due_is_refused_by_name_and_changes_nothing(pair, phase, message, said):
    server, inbox = pair.trained(pair.train())
    assert said in pair.aggregate("north", phase, message).refusal.message
    finished(pair, server, inbox)
    assert server.survivors == list(NAMES)


def test_a_silo_that_starts_again_drops_out_and_never_has_a_second_client(pair):
    _, inbox = pair.trained(pair.train())
    before = pair.ask("north", "round-1", train=pair.train())
    silo = pair.silos["north"]
    silo.close()
    pair.silos["north"] = Silo(silo.config, TRUSTED, roster=pair.roster)
    assert pair.ask("north", "round-1", train=pair.train()) == before
    refusal = pair.aggregate("north", 2, inbox["north"]).refusal
    assert refusal.rule == "secure_aggregation" and "was started again since and so drops out of it" in refusal.message
    assert kinds(pair.silos["north"]) == ["open", "reserve", "charge", "release"]
    assert pair.aggregate("south", 2, inbox["south"]).WhichOneof("kind") == "aggregated"


def test_a_kill_before_the_keys_are_stored_repeats_the_noise_under_other_keys(pair, updates, monkeypatch):
    train = pair.train()
    pair.reserve("north")
    silo, release = pair.silos["north"], pair.silos["north"].ledger.release
    monkeypatch.setattr(silo.ledger, "release", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    assert pair.ask("north", "round-1", train=train).failure.code == FAILED
    first = flat(updates["north"])
    assert pair.aggregate("north", 2, b"").refusal.rule == "secure_aggregation"  # nothing was kept of it
    monkeypatch.setattr(silo.ledger, "release", release)
    assert pair.ask("north", "round-1", train=train).trained.keys
    assert (flat(updates["north"]) == first).all()
    assert kinds(silo).count("charge") == 1


def test_a_run_that_was_ended_gets_no_further_message(pair):
    _, inbox = pair.trained(pair.train())
    ledger = pair.silos["north"].ledger
    ledger.close("run-1", COORDINATOR.public_key)  # as the steward does, from another process
    assert pair.aggregate("north", 2, inbox["north"]).refusal.rule == "closed"
    pair.ask("south", "close", close=pb.Close())
    assert "is in no sum of round 1" in pair.aggregate("south", 2, inbox["south"]).refusal.message


def test_a_roster_that_the_steward_has_changed_meanwhile_ends_the_sum(pair):
    _, inbox = pair.trained(pair.train())
    pair.roster["south"] = "00" * 32
    assert "south with another key" in pair.aggregate("north", 2, inbox["north"]).refusal.message


def test_a_roster_is_looked_at_before_anything_is_reserved_or_charged(pair):
    stranger = {**pair.roster, "west": "11" * 32}
    assert "west not confirmed here" in pair.reserve("north", roster=stranger).refusal.message
    assert "south confirmed here, and not there" in pair.reserve("north", roster={}).refusal.message
    assert kinds(pair.silos["north"]) == ["open"]
    pair.reserve("north")
    for roster in (stranger, {}, {**pair.roster, "south": pair.roster["north"]}):
        assert pair.ask("north", "round-1", train=pair.train(roster=roster)).refusal.rule == "roster"
    twice = pair.train()
    twice.secure.roster.extend(members(pair.roster))
    assert "a silo is there twice" in pair.ask("north", "round-1", train=twice).refusal.message
    for clip in (0.0, -1.0, float("nan"), float("inf")):
        assert "clip" in pair.ask("north", "round-1", train=pair.train(clip=clip)).refusal.message
    assert kinds(pair.silos["north"]) == ["open", "reserve"]


def test_a_plan_says_whether_updates_leave_under_masks(pair):
    """Neither can a coordinator that has reserved sums ask for an update, nor for a sum where the plan has none."""
    pair.reserve("north")
    assert pair.ask("north", "round-1", train=pair.train(secure=None)).refusal.rule == "roster"
    refusal = pair.reserve("south", PLAIN).refusal
    assert "allowed none, which the plan has not got" in refusal.message
    assert (
        pair.ask("south", "reserve", reserve=pb.Reserve(plan=PLAIN.model_dump_json())).WhichOneof("kind") == "reserved"
    )
    assert pair.ask("south", "round-1", train=pair.train(PLAIN)).refusal.rule == "secure_aggregation"
    assert kinds(pair.silos["north"]) == kinds(pair.silos["south"]) == ["open", "reserve"]


def test_a_steward_may_require_it_and_how_many_colluders_it_withstands(pair):
    silo = pair.silos["north"]
    policy = silo.config.policy.model_copy(update={"secure_aggregation": "required"})
    silo.config = silo.config.model_copy(update={"policy": policy})
    refusal = ask(silo, "reserve", reserve=pb.Reserve(plan=PLAIN.model_dump_json()))[0].refusal
    assert (refusal.rule, refusal.allowed) == ("secure_aggregation", "a run with secure aggregation alone")
    assert pair.reserve("north").WhichOneof("kind") == "reserved"
    silo.config = silo.config.model_copy(update={"policy": policy.model_copy(update={"min_colluders": 1})})
    refusal = pair.ask("north", "round-1", train=pair.train()).refusal
    assert (refusal.rule, refusal.asked, refusal.allowed) == ("min_colluders", "0", "1")
    assert kinds(silo) == ["open", "reserve"]


def test_a_service_knows_the_silos_that_its_steward_has_confirmed(tmp_path, tiny_model):
    config = ward(tmp_path, tiny_model)
    silo = Silo(config, TRUSTED)
    assert silo.roster() == {"north": silo.ledger.public_key}
    folder = tmp_path / "state" / "roster"
    folder.mkdir()
    write_document(folder / "south.json", EnrolledSilo(silo="south", public_key="22" * 32, node_key=""))
    assert silo.roster() == {"north": silo.ledger.public_key, "south": "22" * 32}
    (folder / "west.json").write_text("{")
    asked = {"plan": PLAN.model_dump_json(), "secure": pb.Secure(roster=members({"north": "00" * 32}))}
    refusal = ask(silo, "reserve", reserve=pb.Reserve(**asked))[0].refusal
    assert refusal.rule == "roster" and str(tmp_path) not in refusal.message
    assert "west.json" in (tmp_path / "state" / "silo.log").read_text()
    plain = ask(silo, "plain", run_id="run-2", reserve=pb.Reserve(plan=PLAIN.model_dump_json()))[0]
    assert plain.WhichOneof("kind") == "reserved"  # whose updates go with nobody's
    silo.close()


def test_a_silo_keeps_the_updates_that_leave_and_none_that_its_masks_hide(pair):
    silo = pair.silos["north"]
    silo.config = silo.config.model_copy(update={"silo": silo.config.silo.model_copy(update={"keep_released": True})})
    kept = SiloFiles(silo.ledger.path.parent).released
    pair.trained(pair.train())
    assert not kept.exists()
    plain = {"run_id": "run-2", "silo_id": "north"}
    ask(silo, "reserve", reserve=pb.Reserve(plan=PLAIN.model_dump_json()), **plain)
    # A request that speaks of masks where the plan has none has no roster.
    train = pair.train(PLAIN, roster={})
    assert ask(silo, "round-1", train=train, **plain)[0].trained.update
    assert len(list(kept.iterdir())) == 1


def test_a_rehearsal_says_that_rosters_differ(pair):
    def refusals(roster):
        asked = pb.Reserve(plan=PLAN.model_dump_json(), secure=pb.Secure(roster=members(roster)))
        told = pair.ask("north", f"trial-{len(roster)}", rehearse=pb.Rehearse(reserve=asked, train=pair.train()))
        return [line.split(":")[0] for line in told.rehearsed.refusals]

    assert refusals(pair.roster) == []
    assert refusals({**pair.roster, "west": "00" * 32}) == ["roster"]
    assert refusals({}) == ["roster"]
