"""The certificate of a run with clients as units: the aggregator's ledger stands for it, and no silo's can."""

import copy
import json

import pytest
from client_plans import client_plan
from edits import another, edited, leaves
from mandates import STUDY, signed, terms
from model_parts import model_of

from configs.errors import InputError
from privacy.certificate.certificate import AGGREGATOR, certificate
from privacy.certificate.check import check_certificate, check_in_ledger
from privacy.ledger.chain import Budget, verify_entries
from privacy.ledger.client_runs import entrust
from privacy.ledger.ledger import Ledger
from privacy.ledger.limits import Limits
from privacy.plan import PlanTerms

CLIENTS = client_plan(noise_multiplier=2.0, rounds=3, num_clients=50)
RECORDS = PlanTerms(
    sampling_rate=0.02, max_grad_norm=1.0, noise_multiplier=0.9, rounds=3, steps_per_round=4, delta=1e-5
)
DIGEST = "aa" * 32
MODEL = model_of({}, {}, {})
WIDE = {"unit": "client", "budget_epsilon": 40.0, "min_noise_multiplier": 1.0}


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
    with pytest.raises(InputError, match=message):
        check_certificate(edited(sound, path, value), "test")


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


def part_of(folder, name, coordinator, plan=CLIENTS, run="run-1", **changes):
    """What a silo signs of a run for clients, whose mandate says these terms."""
    ledger = Ledger.open(folder / name, name, "ward", Budget(20.0, 3e-5))
    allowed = terms(coordinator=coordinator, **{**WIDE, **changes})
    mandate = signed(ledger.journal.signer, allowed, silo=name)
    entrust(ledger.journal, run, plan, coordinator, Limits(study=mandate.limit))
    receipt = ledger.receipt(run, coordinator)
    ledger.close_file()
    documents = {"mandate": mandate.model_dump(mode="json"), "receipt": receipt.model_dump(mode="json")}
    return {"dataset_id": "ward", "public_key": receipt.public_key, **documents}


def with_mandates(sound, mandated):
    return json.loads(
        json.dumps(certificate("run-1", CLIENTS, {AGGREGATOR: sound[AGGREGATOR]}, MODEL, mandated=mandated))
    )


@pytest.fixture(scope="module")
def mandated(sound, folder):
    return with_mandates(sound, {"east": part_of(folder, "east", sound[AGGREGATOR]["public_key"])})


def test_the_mandates_of_its_silos_are_in_it_and_no_field_of_them_can_be_changed(mandated):
    check_certificate(mandated, "test")
    east = mandated["mandates"]["east"]
    assert east["mandate"]["terms"]["study"] == STUDY
    assert east["receipt"]["plan_digest"] == mandated["plan_digest"]
    assert any("mandate that the coordinator leaves out" in line for line in mandated["not_covered"])
    found = list(leaves(east))
    assert len(found) > 30
    for path, value in found:
        with pytest.raises(InputError, match=r"mandates\.east"):
            check_certificate(edited(mandated, ("mandates", "east", *path), another(value)), "test")


def test_a_mandate_that_does_not_cover_the_run_stands_in_no_certificate(sound, tmp_path, mandated):
    key, east = sound[AGGREGATOR]["public_key"], mandated["mandates"]["east"]
    beyond = {
        r"terms\.unit": {"unit": "record"},
        r"terms\.max_rounds_per_run": {"max_rounds_per_run": 2},
        r"terms\.min_noise_multiplier": {"min_noise_multiplier": 2.1},
        r"terms\.budget_epsilon": {"budget_epsilon": CLIENTS.epsilon * 0.99},
        r"terms\.coordinator is '(ab)+', and the run is": {"coordinator": "ab" * 32},
        "plan_digest": {"plan": CLIENTS.model_copy(update={"noise_multiplier": 2.5})},
        r"receipt\.run is 'run-2'": {"run": "run-2"},
    }
    for number, (said, changes) in enumerate(beyond.items()):
        given = {"coordinator": key, **changes}
        part = signed_anew(tmp_path / str(number), given)
        with pytest.raises(InputError, match=rf"mandates\.east\..*{said}"):
            check_certificate(with_mandates(sound, {"east": part}), "test")
    for part in ({**east, "statement": {}}, {name: east[name] for name in ("dataset_id", "public_key", "receipt")}):
        with pytest.raises(InputError, match=r"mandates\.east\.(statement: no such field|mandate: missing)"):
            check_certificate({**mandated, "mandates": {"east": part}}, "test")
    with pytest.raises(InputError, match=r"mandates\.west\.mandate: silo is 'east'"):
        check_certificate({**mandated, "mandates": {"west": east}}, "test")
    with pytest.raises(InputError, match="mandates: no such field"):
        check_certificate({**mandated, "mandates": {}}, "test")


def signed_anew(folder, changes):
    """A part whose signatures all hold, though the silo itself would have refused the run."""
    given = dict(changes)
    coordinator, plan, run = given.pop("coordinator"), given.pop("plan", CLIENTS), given.pop("run", "run-1")
    part = part_of(folder, "east", coordinator, plan, run)
    if not given:
        return part
    ledger = Ledger.open(folder / "east", "east", "ward", Budget(20.0, 3e-5))
    signer = ledger.journal.signer
    mandate = signed(signer, terms(coordinator=coordinator, **{**WIDE, **given}), silo="east")
    receipt = ledger.receipt(run, coordinator).model_copy(update={"mandate": mandate.digest, "signature": ""})
    ledger.close_file()
    documents = {"mandate": mandate, "receipt": receipt.signed(signer)}
    return {**part, **{name: one.model_dump(mode="json") for name, one in documents.items()}}


def test_a_version_before_had_no_mandates_of_clients(mandated):
    earlier = {**mandated, "version": 10}
    earlier["not_covered"] = [line for line in mandated["not_covered"] if "leaves out: only that client" not in line]
    with pytest.raises(InputError, match="mandates: no such field"):
        check_certificate(earlier, "test")
    del earlier["mandates"]
    check_certificate(earlier, "test")
