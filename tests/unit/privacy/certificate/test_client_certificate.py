"""The certificate of a run with clients as units: the aggregator's ledger stands for it, and no silo's can."""

import copy
import json

import pytest
from client_plans import client_plan
from model_parts import model_of

from configs.errors import InputError
from privacy.certificate.certificate import AGGREGATOR, certificate
from privacy.certificate.check import check_certificate, check_in_ledger
from privacy.ledger.chain import Budget, verify_entries
from privacy.ledger.ledger import Ledger
from privacy.plan import PlanTerms

CLIENTS = client_plan(noise_multiplier=2.0, rounds=3, num_clients=50)
RECORDS = PlanTerms(
    sampling_rate=0.02, max_grad_norm=1.0, noise_multiplier=0.9, rounds=3, steps_per_round=4, delta=1e-5
)
DIGEST = "aa" * 32
MODEL = model_of({}, {}, {})


def signed_by(folder, name, plan):
    """What a ledger signs of a run of this plan, bound as its owner binds it."""
    ledger = Ledger.open(folder / name, name, "members", Budget(40.0, 3e-5))
    ledger.reserve("run-1", plan)
    ledger.charge("run-1", "round-1", DIGEST, 1)
    receipt = ledger.close("run-1")
    statement = ledger.statement("run-1", {"torch": "2"}, attests_disjoint_units=False)
    ledger.close_file()
    return {
        "dataset_id": "members",
        "public_key": receipt.public_key,
        "public_record_count": plan.public_record_count,
        "receipt": receipt.model_dump(mode="json"),
        "statement": statement.model_dump(mode="json"),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ledgers")


@pytest.fixture(scope="module")
def sound(folder):
    facts = signed_by(folder, AGGREGATOR, CLIENTS.for_clients())
    return json.loads(json.dumps(certificate("run-1", CLIENTS, {AGGREGATOR: facts}, MODEL)))


@pytest.fixture(scope="module")
def of_records(folder):
    facts = signed_by(folder, "north", RECORDS.bind(5000))
    return json.loads(json.dumps(certificate("run-1", RECORDS, {"north": facts}, MODEL)))


def test_it_says_who_is_trusted_and_claims_one_mechanism_over_all_clients(sound):
    check_certificate(sound, "test")
    assert (sound["unit"], sound["relation"], sound["num_clients"]) == ("client", "zero_out", 50)
    assert sound["headline"]["epsilon"] == sound["epsilon"] == pytest.approx(CLIENTS.epsilon)
    assert sound["epsilon_sum"] == sound["epsilon"]
    assert sound["trusted"].startswith("the aggregator, which sees every client's update without noise")
    assert "WITHOUT noise of the silo's own" in sound["left_each_silo"]
    assert "silos" not in sound


def test_neither_kind_passes_for_the_other(sound, of_records):
    check_certificate(of_records, "test")
    for document, other in ((sound, of_records), (of_records, sound)):
        for field in ("unit", "relation", "plan", "trusted", "left_each_silo", "not_covered", "headline"):
            with pytest.raises(InputError, match=r"edited|replay gives"):
                check_certificate({**document, field: other.get(field)}, "test")
        with pytest.raises(InputError, match=r"signed|edited|missing"):
            plan = {"plan": other["plan"], "plan_digest": other["plan_digest"], "unit": other["unit"]}
            check_certificate({**document, **plan}, "test")
    # Made anew with everything consistent but what the ledgers have signed.
    facts = sound[AGGREGATOR]
    with pytest.raises(InputError, match=r"silos.aggregator.receipt.plan_digest"):
        check_certificate(certificate("run-1", RECORDS, {AGGREGATOR: facts}, MODEL), "test")
    with pytest.raises(InputError, match=r"aggregator.receipt.silo is 'north'"):
        check_certificate(certificate("run-1", CLIENTS, {AGGREGATOR: of_records["silos"]["north"]}, MODEL), "test")
    with pytest.raises(InputError, match="give the aggregator's alone"):
        certificate("run-1", CLIENTS, of_records["silos"], MODEL)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("num_clients",), 40, "num_clients is 40"),
        (("trusted",), "nobody", "trusted is 'nobody'"),
        (("epsilon",), 0.5, "epsilon is 0.5"),
        (("plan", "num_clients"), 500, "plan_digest"),
        (("aggregator", "public_record_count"), 60, "aggregator.receipt.public_record_count is 50"),
        (("aggregator", "statement", "rounds_charged"), 0, "aggregator.statement.signature"),
        (("aggregator", "statement", "seed_source"), "injected", "aggregator.statement.signature"),
        (("aggregator", "north"), {}, "aggregator.north: no such field"),
        (("silos",), {}, "silos: no such field"),
    ],
)
def test_edits_are_refused_with_the_field(sound, path, value, message):
    changed = copy.deepcopy(sound)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(InputError, match=message):
        check_certificate(changed, "test")


def test_without_the_aggregators_statement_it_is_refused(sound):
    changed = copy.deepcopy(sound)
    del changed[AGGREGATOR]["statement"]
    with pytest.raises(InputError, match="statement: missing"):
        check_certificate(changed, "test")
    with pytest.raises(InputError, match="aggregator: missing, with unit 'client'"):
        check_certificate({name: value for name, value in sound.items() if name != AGGREGATOR}, "test")


def test_a_ledger_that_binds_clients_to_another_number_certifies_nothing(tmp_path):
    plan = CLIENTS.for_clients().model_copy(update={"public_record_count": 49})
    document = certificate("run-1", CLIENTS, {AGGREGATOR: signed_by(tmp_path, AGGREGATOR, plan)}, MODEL)
    with pytest.raises(InputError, match="public_record_count is 49, the plan has 50 clients"):
        check_certificate(document, "test")


def test_the_run_is_looked_for_in_the_aggregators_ledger(sound, folder, siloweave, tmp_path):
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(sound))
    done = siloweave("ledger", "verify", str(folder / AGGREGATOR), "--certificate", str(path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "the aggregator's ledger holds; epsilon" in done.stdout
    other = Ledger.open(tmp_path / "other", AGGREGATOR, "members", Budget(40.0, 3e-5))
    bodies, hashes = verify_entries(other.entries(), "test"), [entry["hash"] for entry in other.entries()]
    with pytest.raises(InputError, match="none has the ledger's key"):
        check_in_ledger(sound, bodies, hashes, "test")
