"""Silos that come and go in a federation's folder."""

import pytest

from configs.errors import InputError
from configs.schema.deployment import FederationConfig
from configs.storage.files import digest_bytes
from federated.deployment.federation_folder import REVOKED, FederationFolder
from federated.deployment.relay import SUPERNODE_CURVE
from federated.identity.cards import EnrolledSilo, write_document
from federated.identity.keys import load_or_create_key, ssh_public_key


@pytest.fixture
def federation(tmp_path):
    return FederationFolder.create(tmp_path / "f", FederationConfig(name="net", hosts=("localhost",)))


@pytest.fixture
def card(tmp_path):
    """The card of a silo, with a relay's key by number."""

    def made(silo: str, relay: int) -> EnrolledSilo:
        key = load_or_create_key(tmp_path / f"{relay}.ssh", SUPERNODE_CURVE)
        return EnrolledSilo(silo=silo, public_key=silo.encode().hex().ljust(64, "0"), node_key=ssh_public_key(key))

    return made


def spellings(key: str) -> list[str]:
    """One key four times: as it came, with a comment, with more blanks, with other bits where base64 reads none."""
    kind, body = key.split()
    assert body.endswith("A==") or body[-3] in "Qgw"
    other = body[:-3] + chr(ord(body[-3]) + 1) + "=="
    return [key, f"{key} another-comment", f"{kind}  {body}", f"{kind} {other}"]


@pytest.mark.parametrize("again", ["north", "south"])
def test_a_relays_key_that_was_revoked_is_never_taken_again(federation, card, again):
    """Flower's SuperLink takes none twice; and it may be revoked because it was stolen."""
    federation.enrol(card("north", 1))
    federation.revoke("north")
    again = card(again, 1)
    for key in spellings(again.node_key):
        with pytest.raises(
            InputError, match=r"its relay's key was revoked, and no key is taken twice; at the site del"
        ):
            federation.enrol(again.model_copy(update={"node_key": key}))
    assert federation.silos() == {}
    federation.enrol(card("north", 2))
    federation.revoke("north")
    for relay in (1, 2):
        with pytest.raises(InputError, match="revoked"):
            federation.enrol(card("north", relay))


@pytest.mark.parametrize("place", range(4))
def test_a_key_that_a_version_before_revoked_stays_revoked(federation, card, place):
    """That one named the document by the key as its card spelt it."""
    north = card("north", 1)
    old = north.model_copy(update={"node_key": spellings(north.node_key)[place]})
    folder = federation.folder / REVOKED
    write_document(folder / "other.json", north.model_copy(update={"node_key": "ssh-ed25519 AAAA"}))  # is no key
    write_document(folder / f"{digest_bytes(old.node_key.encode())}.json", old)
    for key in spellings(north.node_key):
        with pytest.raises(InputError, match="its relay's key was revoked"):
            federation.enrol(card("south", 1).model_copy(update={"node_key": key}))
    federation.enrol(card("north", 2))


def test_two_silos_never_have_one_key_however_it_is_written(federation, card):
    federation.enrol(card("north", 1))
    south = card("south", 1)
    for key in spellings(south.node_key):
        with pytest.raises(InputError, match="has a key of silo 'north'"):
            federation.enrol(south.model_copy(update={"node_key": key}))


def test_a_silo_that_is_not_enrolled_is_not_revoked(federation, card):
    federation.enrol(card("north", 1))
    with pytest.raises(InputError, match=r"'south': is not enrolled \(there are north\)"):
        federation.revoke("south")
    federation.enrol(card("north", 1))  # changes nothing, as before
    assert set(federation.silos()) == {"north"}
