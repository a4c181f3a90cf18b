"""`siloweave federation status` of a federation whose files are damaged, foreign, or no files at all."""

import json
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_ssh_public_key
from damage import KINDS, command, damaged, is_clear
from flwr.proto.control_pb2 import ListNodesResponse
from flwr.proto.node_pb2 import NodeInfo
from hypothesis import given, settings
from hypothesis import strategies as st
from signed_silos import InProcess, SignedSilo, adapter, coordinator

from configs.errors import InputError
from configs.storage.storage import COMMITTED
from federated.coordinator import outcome
from federated.coordinator.round_commits import SILOS
from federated.deployment import federation_status, superlink
from federated.deployment.federation_folder import FederationFolder
from federated.deployment.federation_status import overview, status
from federated.deployment.relay import SUPERNODE_CURVE
from federated.deployment.served_run import CURRENT
from federated.deployment.supervisor import STATE
from federated.identity.cards import EnrolledSilo, write_document
from federated.identity.keys import load_or_create_key, ssh_public_key
from federated.identity.trust import ENROLLED


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    """A federation that is not served, with one silo and a run of two rounds."""
    root = tmp_path_factory.mktemp("federation")
    status, _, errors = command("federation", "init", str(root / "f"), "--name", "net", "--host", "localhost")
    assert status == 0, errors
    made, silo = FederationFolder(root / "f"), SignedSilo("one")
    node_key = ssh_public_key(load_or_create_key(root / "node.ssh", SUPERNODE_CURVE))
    made.enrol(EnrolledSilo(silo="one", public_key=silo.signer.public_key, node_key=node_key))
    coordinator(InProcess([silo]), root, "federated.min_silos=1").run(adapter)
    current = {"directory": str(root / "run"), "run": "stroke", "flower_run": 1}
    (made.state / CURRENT).write_text(json.dumps(current))
    program = {"process": None, "healthy": False, "restarts": 0, "last_exit": None, "log": "x"}
    state = {"supervisor": {"pid": 1, "created": 0.0}, "programs": {"superlink": program}}
    (made.state / STATE).write_text(json.dumps(state))
    (root / "run" / outcome.LOCK).write_bytes(b"1")
    return made


def test_status_shows_what_can_be_read_of_any_damaged_federation(federation):
    """Before: a traceback for a file that was cut short, and a wait without end for a pipe."""
    shown = ("federation", "status", str(federation.folder), "--json")
    whole = json.loads(command(*shown)[1])
    assert whole["unreadable"] == []
    assert (whole["run"]["round"], whole["silos"]["one"]["epsilon_left"]) == (2, pytest.approx(30, abs=0.1))
    directory = federation.folder.parent / "run"
    newest = sorted(directory.glob("round-*"))[-1]
    files = [federation.state / CURRENT, federation.state / STATE, directory / outcome.LOCK]
    files += [directory / "events.jsonl", newest / SILOS, newest / COMMITTED]

    @settings(max_examples=150, deadline=None)
    @given(st.sampled_from(files), KINDS)
    def check(path, kind):
        with damaged(path, *kind):
            for arguments in (shown, shown[:-1], ("federation", "dashboard", *shown[2:])):
                status, out, errors = command(*arguments)
                assert (status, errors) == (0, ""), (path, kind)
            assert "one" in out and out.isascii()

    check()
    with damaged(newest / SILOS, "pipe", 0, None):
        (told,) = json.loads(command(*shown)[1])["unreadable"]
        assert told == f"{newest / SILOS}: is no regular file; it is left out here"


@settings(max_examples=60, deadline=None)
@given(KINDS)
def test_an_outcome_that_can_not_be_read_is_one_clear_line(tmp_path_factory, kind):
    directory = tmp_path_factory.mktemp("outcome")
    outcome._write(directory, outcome.Outcome(7, 2, "x"))
    with damaged(directory / outcome.OUTCOME, *kind):
        try:
            found = outcome.read_outcome(directory, 7)
        except InputError as error:
            assert str(error).startswith(str(directory / outcome.OUTCOME))
        else:
            assert found is None or isinstance(found.exit_status, int)


def test_a_damaged_state_ends_no_command_with_a_traceback(federation):
    for name, kind in ((STATE, "cut"), (CURRENT, "binary"), (CURRENT, "pipe")):
        with damaged(federation.state / name, kind, 5, None):
            for words in (("stop",), ("run", "-c", "tiny")):
                status, _, errors = command("federation", words[0], str(federation.folder), *words[1:])
                assert is_clear(status, errors), (name, kind, errors)


@pytest.mark.parametrize("content", [b"", b"{", b'{"silo": "two"}'])
def test_one_damaged_enrolment_hides_no_other_silo(federation, content):
    """Before: the whole page was one line about it."""
    path = federation.folder / ENROLLED / "two.json"
    path.write_bytes(content)
    try:
        for look in (status, overview):
            found = look(federation)
            assert found["silos"]["one"]["epsilon_left"] == pytest.approx(30, abs=0.1)
            (told,) = found["unreadable"]
            assert told.startswith(str(path))
    finally:
        path.unlink()


@pytest.mark.parametrize("key", ["", "a key", "ecdsa-sha2-nistp384 AAAA", "ssh-ed25519 " + "A" * 200])
def test_an_enrolment_whose_key_is_none_is_named_and_hides_no_other_silo(federation, monkeypatch, key):
    """Before: no page at all where the federation is served, since the SuperLink's keys are compared with it."""
    path = federation.folder / ENROLLED / "two.json"
    card = federation.silos()["one"].model_copy(update={"silo": "two", "node_key": key})
    pem = load_ssh_public_key(federation.silos()["one"].node_key.encode()).public_bytes(
        Encoding.PEM, PublicFormat.SubjectPublicKeyInfo
    )
    listed = ListNodesResponse(nodes_info=[NodeInfo(node_id=7, status="online", public_key=pem)])
    client = SimpleNamespace(ListNodes=lambda _: listed)
    monkeypatch.setattr(superlink, "control", lambda _: nullcontext(client))
    monkeypatch.setattr(federation_status, "read_state", lambda _: json.loads((federation.state / STATE).read_text()))
    write_document(path, card)
    try:
        for look in (status, overview):
            found = look(federation)
            assert {name: silo["status"] for name, silo in found["silos"].items()} == {"one": "online"}
            assert found["unreadable"] == [f"{path}: silo 'two': its node_key is no OpenSSH public key"]
        for ask in (superlink.nodes, superlink.reconcile):
            with pytest.raises(InputError, match="silo 'two': its node_key is no OpenSSH public key"):
                ask(federation)
    finally:
        path.unlink()
