"""The chain from a certificate to each silo's mandate: whoever has the document can follow it, and cut it nowhere."""

import copy
import json

import pytest
from edits import another, edited, leaves
from mandates import signed, stated, terms
from model_parts import model_of
from silo_requests import signer_of

from configs.errors import InputError
from configs.storage.files import digest_bytes
from privacy.certificate.certificate import certificate
from privacy.certificate.check import check_certificate, check_in_ledger
from privacy.ledger.chain import Budget, verify_entries
from privacy.ledger.ledger import Ledger
from privacy.plan import PlanTerms

PLAN = PlanTerms(sampling_rate=0.02, max_grad_norm=1.0, noise_multiplier=0.9, rounds=2, steps_per_round=4, delta=1e-5)
REPLY = "the whole reply of a round"
OTHER = signer_of(bytes(range(1, 33)))


@pytest.fixture(scope="module")
def ledger(tmp_path_factory):
    ledger = Ledger.open(tmp_path_factory.mktemp("silo") / "north", "north", "ward", Budget(20.0, 3e-5))
    yield ledger
    ledger.close_file()


@pytest.fixture(scope="module")
def mandate(ledger):
    return signed(ledger.journal.signer)


@pytest.fixture(scope="module")
def sound(ledger, mandate):
    """The certificate of a run that the ledger of a silo with mandates has seen."""
    north = stated(ledger, PLAN.bind(5000), mandate, [REPLY])
    document = certificate("run-1", PLAN, {"north": north}, model_of({"north": digest_bytes(REPLY.encode())}, {}))
    return json.loads(json.dumps(document))


def test_receipt_and_statement_name_the_mandate_that_is_beside_them(sound, ledger, mandate):
    check_certificate(sound, "test")
    north = sound["silos"]["north"]
    assert north["receipt"]["mandate"] == north["statement"]["mandate"] == mandate.digest
    assert north["mandate"]["terms"]["purpose"] == terms().purpose
    entries = ledger.entries()
    bodies = verify_entries(entries, "ledger", ledger.public_key)
    assert check_in_ledger(sound, bodies, [entry["hash"] for entry in entries], "test") == "north"


def changed(sound, path, value):
    """The certificate with another value in the silo's part."""
    return edited(sound, ("silos", "north", *path), value)


def test_no_field_of_the_mandate_can_be_changed(sound):
    found = list(leaves(sound["silos"]["north"]["mandate"]))
    assert len(found) > 15
    for path, value in found:
        with pytest.raises(InputError, match=r"silos\.north\.mandate"):
            check_certificate(changed(sound, ("mandate", *path), another(value)), "test")


@pytest.mark.parametrize("value", [None, [], "x", {}, float("nan"), {"version": 2}, {"version": float("nan")}])
def test_something_else_in_its_place_is_found(sound, value):
    with pytest.raises(InputError, match=r"silos\.north\.mandate"):
        check_certificate(changed(sound, ("mandate",), value), "test")


@pytest.mark.parametrize("part", ["receipt", "statement"])
def test_a_digest_in_what_the_silo_signed_cannot_be_changed(sound, part):
    for value in ("", "ab" * 32):
        with pytest.raises(InputError, match=rf"silos\.north\.{part}\.mandate"):
            check_certificate(changed(sound, (part, "mandate"), value), "test")


def test_a_mandate_that_was_left_out_is_missed(sound):
    document = copy.deepcopy(sound)
    del document["silos"]["north"]["mandate"]
    with pytest.raises(InputError, match=r"silos\.north\.receipt\.mandate"):
        check_certificate(document, "test")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"silo": "south"}, r"silo is 'south'"),
        ({"dataset": "lab"}, r"dataset is 'lab'"),
        ({"allowed": terms(min_noise_multiplier=1.0)}, "terms.min_noise_multiplier"),
        ({"allowed": terms(max_steps_per_round=3)}, "terms.max_steps_per_round"),
        ({"allowed": terms(budget_epsilon=0.1)}, "terms.budget_epsilon"),
    ],
)
def test_a_mandate_that_does_not_cover_the_run_is_found_whoever_signed_it(sound, ledger, changes, field):
    """A silo in the hands of an adversary signs anything: the plan is compared all the same."""
    found = signed(ledger.journal.signer, **changes).model_dump(mode="json")
    with pytest.raises(InputError, match=field):
        check_certificate(changed(sound, ("mandate",), found), "test")


def test_a_mandate_of_another_key_is_found(sound):
    with pytest.raises(InputError, match="public_key is"):
        check_certificate(changed(sound, ("mandate",), signed(OTHER).model_dump(mode="json")), "test")
