"""What the coordinator's page says of each site: up, down, refusing, and why; and how fast the rounds are."""

import json

import pytest
from damage import command
from signed_silos import InProcess, SignedSilo, adapter, coordinator

from configs.events import EventLog, read_events
from federated.deployment import federation_status
from federated.deployment.federation_folder import FederationFolder
from federated.deployment.federation_status import overview, status
from federated.deployment.relay import SUPERNODE_CURVE
from federated.deployment.served_run import CURRENT
from federated.identity.cards import EnrolledSilo
from federated.identity.keys import load_or_create_key, ssh_public_key
from federated.protocol import silo_pb2 as pb

REASON = "max_rounds: asked 80, allowed at most 40"


def refuse(_, reply, request):
    """A silo that takes no part, and says why."""
    if request.WhichOneof("kind") == "describe":
        return reply
    refusal = pb.Refusal(rule="max_rounds", asked="80", allowed="at most 40", message=REASON)
    return pb.Reply(version=reply.version, silo_id=reply.silo_id, request_digest=reply.request_digest, refusal=refusal)


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """A run of two rounds at three sites; one refuses it, and nothing is served any more."""
    root = tmp_path_factory.mktemp("federation")
    assert command("federation", "init", str(root / "f"), "--name", "net", "--host", "localhost")[0] == 0
    made = FederationFolder(root / "f")
    silos = [SignedSilo("north"), SignedSilo("south"), SignedSilo("west", refuse)]
    for silo in silos:
        node_key = ssh_public_key(load_or_create_key(root / f"{silo.name}.ssh", SUPERNODE_CURVE))
        made.enrol(EnrolledSilo(silo=silo.name, public_key=silo.signer.public_key, node_key=node_key))
    coordinator(InProcess(silos), root, "federated.min_silos=1").run(adapter)
    (made.state / CURRENT).write_text(json.dumps({"directory": str(root / "run"), "run": "stroke", "flower_run": 1}))
    return made


@pytest.fixture
def served(federation, monkeypatch):
    """The same as if its SuperLink ran, which has lost the relay of one site."""
    online = {name: {"node": number, "status": "online"} for number, name in enumerate(federation.silos(), 1)}
    online["south"]["status"] = "offline"
    programs = {"superlink": {"healthy": True, "restarts": 0, "process": None}}
    monkeypatch.setattr(federation_status, "nodes", lambda *_: online)
    monkeypatch.setattr(federation_status, "read_state", lambda _: {"programs": programs})
    return federation


def test_a_site_is_up_down_or_refuses_with_its_reason(served):
    found = overview(served)["silos"]
    assert {name: one["state"] for name, one in found.items()} == {"north": "up", "south": "down", "west": "refuses"}
    assert found["north"]["reason"] == ""
    assert found["south"]["reason"] == "its relay is not connected (Flower says offline)"
    assert REASON in found["west"]["reason"]
    assert found["north"]["epsilon_left"] == pytest.approx(32 - found["north"]["epsilon_reserved"])
    assert found["west"]["epsilon_left"] is None


def test_the_newest_word_of_a_site_counts(served):
    log = EventLog(served.folder.parent / "run" / "events.jsonl")
    before = log.path.read_bytes()

    def told(name, **event):
        log.path.write_bytes(before)
        log.emit("federate", **event)
        return overview(served)["silos"][name]

    try:
        silent = told("north", kind="timeout", step="3", missing=1, silos=["north"], message="no reply in 60 s")
        assert (silent["state"], "no reply in 60 s" in silent["reason"]) == ("silent", True)
        assert told("north", kind="rejected", silo="north", step="3", message="x")["state"] == "no sound reply"
        at_the_door = told("north", kind="rejected", node=1, rule="coordinator", step="describe", message="not trusted")
        assert (at_the_door["state"], "not trusted" in at_the_door["reason"]) == ("refuses", True)
        assert told("west", kind="round", round=3, answered=["north", "west"])["state"] == "up"
        down = told("south", kind="refused", silo="south", rule="budget_epsilon", step="3", message="nothing left")
        assert "before that: refused at 3: nothing left" in down["reason"]
    finally:
        log.path.write_bytes(before)


def test_rounds_and_their_pace(federation):
    events = list(read_events(federation.folder.parent / "run" / "events.jsonl"))
    rounds = [event for event in events if event["event"] == "round"]
    found = overview(federation)
    assert [one["round"] for one in found["rounds"]] == [1, 2]
    assert [one["answered"] for one in found["rounds"]] == [["north", "south"]] * 2
    assert found["rounds"][1]["epsilon_left"] == rounds[1]["epsilon_left"]
    pace, moved = found["pace"], sum(one["bytes"] for one in rounds)
    assert pace["rounds"] == 2
    assert pace["bytes_per_second"] == pytest.approx(moved / sum(one["seconds"] for one in rounds))
    assert pace["seconds_per_round"] == pytest.approx(sum(one["seconds"] for one in rounds) / 2)
    assert pace["seconds_to_go"] == 0


def test_what_is_not_served_is_unknown_and_not_down(federation):
    found = overview(federation)
    assert {one["state"] for one in found["silos"].values()} == {"unknown"}
    assert {name: status(federation)[name] for name in ("run", "federation")} == {
        name: found[name] for name in ("run", "federation")
    }


def test_a_refusal_at_the_door_has_its_rule(tmp_path):
    """By it the page tells a site that refuses from one whose reply is unsound."""

    def change(_, reply, request):
        refusal = pb.Refusal(rule="coordinator", asked="x", allowed="y", message="not trusted")
        return pb.Reply(
            version=reply.version, silo_id=reply.silo_id, request_digest=reply.request_digest, refusal=refusal
        )

    silos = [SignedSilo("north"), SignedSilo("west", change)]
    coordinator(InProcess(silos), tmp_path, "federated.min_silos=1").run(adapter)
    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    assert {event.get("rule") for event in events if event["event"] == "rejected"} == {"coordinator"}
