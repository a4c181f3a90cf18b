"""Keys stay where they were made, and what is exchanged is confirmed by its fingerprint."""

import base64
import json
import stat
import subprocess

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from silo_requests import silo_toml
from typer.testing import CliRunner

from configs.errors import InputError
from configs.load import load
from configs.schema.deployment import FederationConfig
from configs.schema.silo import load_silo
from federated.commands.silo import silo_app
from federated.deployment.federation_folder import FederationFolder
from federated.deployment.silo_site import check_new_id, distrust, make_identity, trust, trusted
from federated.identity.cards import (
    CoordinatorCard,
    EnrolledSilo,
    RelayCard,
    confirm,
    fingerprint,
    read_document,
    write_document,
)
from federated.identity.keys import load_or_create_key, ssh_public_key
from federated.identity.trust import coordinator_signer, enrolled_silos, trusted_coordinators
from federated.identity.x509 import CURVE, Authority, certificate_request, requested_key
from federated.simulation.simulated_places import simulated_silo
from privacy.ledger.journal import Journal

CONFIG = FederationConfig(name="net", hosts=("fed.example.org", "127.0.0.1"), port=9092)


@pytest.fixture
def federation(tmp_path):
    return FederationFolder.create(tmp_path / "federation", CONFIG)


@pytest.fixture
def silo(tmp_path):
    config = simulated_silo(load("tiny"), "roman", tmp_path / "model")
    settings = config.silo.model_copy(update={"state_dir": str(tmp_path / "silo")})
    return config.model_copy(update={"silo": settings})


def relay_card(folder):
    supernode, tls = load_or_create_key(folder / "node.ssh", ec.SECP384R1()), load_or_create_key(folder / "tls", CURVE)
    return RelayCard(supernode_key=ssh_public_key(supernode), certificate_request=certificate_request(tls, "relay"))


def enrolled(silo, folder):
    state_dir = silo.silo.state_dir
    journal = Journal(folder / "silo", folder / "anchor", silo.silo.id, silo.silo.dataset_id)
    assert str(folder / "silo") == state_dir
    return make_identity(silo, journal, relay_card(folder), ("localhost",))


def private_files(folder):
    return [path for path in folder.rglob("*") if path.suffix in (".key", ".ssh")]


def test_private_keys_are_their_owners_alone_and_never_made_twice(federation, silo, tmp_path):
    enrolled(silo, tmp_path)
    before = {path: path.read_bytes() for path in private_files(tmp_path)}
    assert len(before) == 8  # coordinator, its authority, proxy, SuperLink; SuperNode; silo, its authority, service
    assert {stat.S_IMODE(path.stat().st_mode) for path in before} == {0o600}
    FederationFolder.create(tmp_path / "federation", CONFIG)
    enrolled(silo, tmp_path)
    assert before == {path: path.read_bytes() for path in private_files(tmp_path)}


@pytest.mark.parametrize(
    ("name", "fix"), [("north ", "write 'north'"), ("17.0", "write '17'"), (" ", "that is no name")]
)
def test_a_new_silo_is_called_by_a_canonical_name_and_else_nothing_is_made(tmp_path, name, fix):
    relay, settings = tmp_path / "relay.json", silo_toml(tmp_path, name)
    write_document(relay, relay_card(tmp_path))
    command = ["init", "-c", str(settings), "--relay", str(relay)]
    failed = CliRunner().invoke(silo_app, command).exception
    assert isinstance(failed, InputError)
    assert str(failed).startswith(f"silo.id is {name!r}: {fix}")
    assert not (tmp_path / "state").exists()
    settings.write_text(settings.read_text().replace(f'"{name}"', '"north"'))
    assert CliRunner().invoke(silo_app, command).exit_code == 0
    settings.write_text(settings.read_text().replace('"north"', f'"{name}"'))
    check_new_id(load_silo(settings))  # a silo from before there was a rule keeps its name, as its ledger does


def test_no_public_document_holds_a_private_half(federation, silo, tmp_path):
    enrolled(silo, tmp_path)
    for path in (federation.card_file, tmp_path / "silo" / "enrolment.json"):
        assert "PRIVATE" not in path.read_text()
        for key in private_files(tmp_path):
            secret = key.read_bytes()
            assert secret.hex() not in path.read_text()


def test_a_lost_coordinator_key_is_not_replaced_in_silence(federation):
    (federation.folder / "coordinator.key").unlink()
    with pytest.raises(InputError, match="no such key, and a new one would not be the same"):
        _ = FederationFolder(federation.folder).card


def test_another_configuration_does_not_take_over_a_folder(federation):
    with pytest.raises(InputError, match="is there with other settings"):
        FederationFolder.create(federation.folder, CONFIG.model_copy(update={"port": 1}))


def test_a_key_that_others_can_read_is_refused(tmp_path):
    load_or_create_key(tmp_path / "a.key", CURVE)
    (tmp_path / "a.key").chmod(0o640)
    with pytest.raises(InputError, match="mode 640 lets others read it"):
        load_or_create_key(tmp_path / "a.key", CURVE)


def test_the_supernodes_key_is_one_that_openssh_reads(tmp_path):
    key = load_or_create_key(tmp_path / "node.ssh", ec.SECP384R1())
    shown = subprocess.run(
        ["ssh-keygen", "-y", "-f", str(tmp_path / "node.ssh")], capture_output=True, text=True, check=True
    )
    assert shown.stdout.split()[:2] == ssh_public_key(key).split()[:2]


def test_a_fingerprint_covers_every_field(federation):
    card = federation.card
    whole = fingerprint(card)
    assert len(whole.replace("-", "")) == 40
    for field, other in (
        ("name", "other"),
        ("public_key", "0" * 64),
        ("address", "elsewhere:1"),
        ("root_certificate", "another"),
    ):
        assert fingerprint(card.model_copy(update={field: other})) != whole


def test_a_fingerprint_is_confirmed_by_the_text_or_by_a_person(federation):
    card, whole = federation.card, fingerprint(federation.card)
    assert confirm(card, whole.upper().replace("-", " "), "file", lambda _: False) == whole
    asked = []
    assert confirm(card, None, "file", lambda text: asked.append(text) or True) == whole
    assert whole in asked[0]
    with pytest.raises(InputError, match="was not confirmed; nothing was changed"):
        confirm(card, None, "file", lambda _: False)
    with pytest.raises(InputError, match="its fingerprint is"):
        confirm(card, whole[:-1], "file", lambda _: True)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff", b"[" * 50_000, b'{"kind": "silo"}', b" " * 200_000])
def test_what_is_no_document_is_one_line(content, tmp_path):
    (tmp_path / "card.json").write_bytes(content)
    with pytest.raises(InputError) as caught:
        read_document(CoordinatorCard, tmp_path / "card.json")
    assert "\n" not in str(caught.value)


def test_a_silo_trusts_and_distrusts_what_its_service_reads(federation, silo, tmp_path):
    card = federation.card
    trust(silo, card)
    assert trusted_coordinators(tmp_path / "silo") == {coordinator_signer(federation.folder).public_key}
    assert trusted(silo) == {"net": card.public_key}
    distrust(silo, "net")
    assert trusted_coordinators(tmp_path / "silo") == frozenset()
    with pytest.raises(InputError, match="no trusted coordinator has this name"):
        distrust(silo, "net")
    (tmp_path / "silo" / "trusted" / "long.json").write_bytes(b" " * 200_000)
    with pytest.raises(InputError, match=r"long.json: 200000 bytes, a public document has at most"):
        trusted_coordinators(tmp_path / "silo")


def test_enrolments_are_the_roster_that_rounds_read(federation, silo, tmp_path):
    card = enrolled(silo, tmp_path)
    federation.enrol(card)
    federation.enrol(card)  # twice is once
    assert enrolled_silos(federation.folder) == {"roman": card.public_key}
    with pytest.raises(InputError, match="is enrolled with other keys; revoke it first"):
        federation.enrol(card.model_copy(update={"public_key": "0" * 64}))
    with pytest.raises(InputError, match="has a key of silo 'roman'"):
        federation.enrol(card.model_copy(update={"silo": "other"}))
    federation.revoke("roman")
    assert enrolled_silos(federation.folder) == {}
    with pytest.raises(InputError, match="is not enrolled"):
        federation.revoke("roman")


def test_a_silo_may_be_called_anything_and_stays_in_its_folder(federation):
    key = ssh_public_key(load_or_create_key(federation.folder / "x.ssh", ec.SECP384R1()))
    federation.enrol(EnrolledSilo(silo="../../etc/x", public_key="0" * 64, node_key=key))
    assert [path.parent for path in federation.folder.rglob("*etc*")] == [federation.folder / "silos"]
    assert set(federation.silos()) == {"../../etc/x"}
    federation.revoke("../../etc/x")
    long, key = "\u5317\u4eac" * 50, ssh_public_key(load_or_create_key(federation.folder / "y.ssh", ec.SECP384R1()))
    # 900 bytes where each is quoted
    federation.enrol(EnrolledSilo(silo=long, public_key="0" * 64, node_key=key))
    assert set(federation.silos()) == {long}
    federation.revoke(long)
    assert federation.silos() == {}


def test_a_request_gets_no_certificate_for_a_key_that_did_not_sign_it(tmp_path):
    ours, theirs = (
        x509.load_pem_x509_csr(certificate_request(load_or_create_key(tmp_path / name, CURVE), name).encode())
        for name in ("ours", "their")
    )
    whole, signature = ours.public_bytes(Encoding.DER), ours.signature
    forged = whole.replace(signature, theirs.signature.ljust(len(signature), b"\0")[: len(signature)])
    assert forged != whole
    body = base64.encodebytes(forged).decode()
    with pytest.raises(InputError, match="certificate request"):
        requested_key(f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n", "relay.json")


def test_an_authority_and_its_key_belong_together(tmp_path):
    Authority(tmp_path / "a.key", tmp_path / "a.pem", "a")
    Authority(tmp_path / "b.key", tmp_path / "b.pem", "b")
    with pytest.raises(InputError, match="is not the certificate of"):
        Authority(tmp_path / "a.key", tmp_path / "b.pem", "a")


def test_documents_survive_their_files(federation, tmp_path):
    write_document(tmp_path / "again.json", federation.card)
    assert read_document(CoordinatorCard, tmp_path / "again.json") == federation.card
    assert json.loads((tmp_path / "again.json").read_text())["address"] == "fed.example.org:9092"
