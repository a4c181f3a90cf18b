"""Mandates for clients as units, for noise that silos make together, and of before there were either."""

import json
import time
from copy import deepcopy
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from client_plans import client_plan
from mandates import STUDY, signed, terms
from model_parts import FILES
from signed_silos import InProcess
from silo_requests import COORDINATOR, TRUSTED, body_of, opened, ward

from configs.errors import InputError
from configs.events import EventLog
from configs.load import load
from configs.storage.files import canonical_json
from configs.storage.layout import SiloFiles
from federated.adapters.arrays import to_bytes
from federated.adapters.warm_model import initial_adapter
from federated.coordinator.parties import Parties
from federated.coordinator.rounds import Coordinator
from federated.coordinator.trusted_aggregator import open_ledger
from federated.identity.trust import COORDINATOR_KEY
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_request
from federated.silo.mandates.folder import Mandates
from federated.silo.silo import Silo
from privacy.certificate.check import check_certificate
from privacy.ledger.chain import Budget, verify_entries
from privacy.ledger.journal import Journal, default_anchor_dir
from privacy.ledger.limits import Limits, spent_by
from privacy.ledger.reconcile import reconcile
from privacy.ledger.replay import replay
from privacy.mandate import Mandate, UnsoundMandateError, read_mandate
from privacy.plan import PlanTerms
from privacy.secure_sum import SecureSum, SharedNoise
from privacy.signing import signature_holds

CLIENTS = client_plan(noise_multiplier=4.0, rounds=2, num_clients=10, delta=1e-6)
RECORDS = PlanTerms(
    sampling_rate=0.05, max_grad_norm=1.0, noise_multiplier=0.8, rounds=2, steps_per_round=1, delta=1e-5
)
FOR_CLIENTS = {"unit": "client", "min_noise_multiplier": 4.0}


@pytest.fixture(scope="module")
def adapter(tiny_run):
    return to_bytes(initial_adapter(tiny_run.config(), tiny_run.model))


@pytest.fixture
def silo(tmp_path, tiny_model):
    config = ward(tmp_path, tiny_model, units=["record", "client"], max_rounds_per_run=50)
    silo = Silo(config, TRUSTED)
    yield silo
    silo.close()


def mandated(silo, **changes):
    allowed = terms(silo.workbench.base_model.content_digest, **{**FOR_CLIENTS, **changes})
    return mandates(silo).add(allowed, silo.ledger.journal.signer)


def mandates(silo):
    return Mandates.of(silo.config, silo.ledger.public_key)


def ask(silo, request_id, run_id="run-1", study=STUDY, **kind):
    body = body_of(request_id, run_id, study=study, **kind)
    return opened(silo.handle(seal_request(COORDINATOR, body)), silo)


def reserve(silo, plan=CLIENTS, **how):
    return ask(silo, "reserve", **how, reserve=pb.Reserve(plan=plan.model_dump_json()))


def train(silo, adapter=b"", plan=CLIENTS, number=1, **changes):
    given = {
        "round": number,
        "plan_digest": plan.digest,
        "base_model_digest": silo.workbench.base_model.content_digest,
        "task": "causal",
        "adapter_spec": pb.AdapterSpec(rank=4, alpha=8.0),
        "adapter": adapter,
        "learning_rate": 0.01,
        "optimizer": "adam",
    }
    return pb.Train(**{**given, **changes})


def contribute(silo, adapter=b"", number=1, how=None, of=None, **work):
    given = {"local_steps": 2, "sampling_rate": 0.05, **work}
    content = train(silo, adapter, number=number, **(of or {}))
    return ask(silo, f"round-{number}", **(how or {}), contribute=pb.Contribute(train=content, **given))


def bodies(silo):
    return verify_entries(silo.ledger.entries(), "test", silo.ledger.public_key)


def refused(silo, reply):
    """The rule of a refusal, after which the ledger has nothing that it had not before."""
    before = silo.ledger.entries()
    found = reply(silo)
    assert found.WhichOneof("kind") == "refusal", found
    assert silo.ledger.entries() == before
    return found.refusal.rule


HOSTILE = {
    "a plan about records": (lambda silo: reserve(silo, RECORDS), "unit"),
    "to train on records": (lambda silo: ask(silo, "t", train=train(silo, plan=RECORDS)), "unit"),
    "to evaluate records": (
        lambda silo: ask(
            silo, "e", evaluate=pb.Evaluate(number=1, base_model_digest=silo.workbench.base_model.content_digest)
        ),
        "unit",
    ),
    "to unmask a sum that it is in none of": (
        lambda silo: ask(silo, "a", aggregate=pb.Aggregate(round=1)),
        "secure_aggregation",
    ),
    "less noise": (
        lambda silo: reserve(silo, CLIENTS.model_copy(update={"noise_multiplier": 3.9})),
        "min_noise_multiplier",
    ),
    "more rounds": (lambda silo: reserve(silo, CLIENTS.model_copy(update={"rounds": 5})), "max_rounds_per_run"),
    "a larger delta": (
        lambda silo: reserve(silo, CLIENTS.model_copy(update={"delta": 1e-4, "num_clients": 10})),
        "plan",
    ),
    "more steps than allowed": (lambda silo: contribute(silo, local_steps=5), "max_steps_per_round"),
    "larger batches": (lambda silo: contribute(silo, sampling_rate=0.051), "max_sampling_rate"),
    "batches of no size": (lambda silo: contribute(silo, sampling_rate=float("nan")), "max_sampling_rate"),
    "another base model": (lambda silo: contribute(silo, of={"base_model_digest": "cd" * 32}), "base_models"),
    "another task": (lambda silo: contribute(silo, of={"task": "qa"}), "task"),
    "in no study": (lambda silo: contribute(silo, how={"study": ""}), "study"),
    "in another study": (lambda silo: reserve(silo, study="other"), "study"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_a_mandate_for_clients_does_not_cover_is_refused_before_anything_is_written(silo, name):
    mandated(silo)
    reserve(silo)
    reply, field = HOSTILE[name]
    assert refused(silo, reply) == (field if field in ("plan", "secure_aggregation") else f"mandate.{field}")


def test_a_mandate_widens_no_policy(tmp_path, tiny_model):
    silo = Silo(ward(tmp_path, tiny_model), TRUSTED)
    mandated(silo)
    assert refused(silo, reserve) == "units"
    silo.close()


def test_a_run_for_clients_under_its_mandate(silo, adapter):
    """The silo's own ledger says in which study, and what of its budget, the updates without noise left."""
    mandate = mandated(silo)
    assert read_mandate(reserve(silo).reserved.mandate, "reply") == mandate
    assert contribute(silo, adapter).WhichOneof("kind") == "trained"
    (entry,) = (body for body in bodies(silo) if body["kind"] == "entrust")
    assert (entry["study"], entry["mandate"]) == (STUDY, mandate.digest)
    assert (entry["study_epsilon"], entry["study_delta"]) == (CLIENTS.epsilon, CLIENTS.delta)
    assert silo.ledger.left().epsilon == 20  # of the dataset's budget it takes nothing
    replay(bodies(silo), "test")
    mandates(silo).revoke(STUDY)
    assert refused(silo, lambda one: contribute(one, adapter, 2)) == "mandate.study"
    mandated(silo)
    assert refused(silo, lambda one: contribute(one, adapter, 2)) == "mandate.run"
    assert ask(silo, "close", close=pb.Close()).WhichOneof("kind") == "closed"


def test_a_run_that_was_entrusted_before_all_mandates_ends_with_the_first(silo, adapter):
    reserve(silo, study="")
    assert contribute(silo, adapter, how={"study": ""}).WhichOneof("kind") == "trained"
    mandated(silo)
    assert refused(silo, lambda one: contribute(one, adapter, 2)) == "mandate.run"


def test_the_studys_budget_counts_what_plans_for_clients_claim(silo):
    once = CLIENTS.epsilon
    mandated(silo, budget_epsilon=2.5 * once)
    for number in (1, 2):
        assert reserve(silo, run_id=f"run-{number}").WhichOneof("kind") == "reserved"
    assert reserve(silo, run_id="run-2").WhichOneof("kind") == "reserved"  # the same again counts nothing
    assert refused(silo, lambda one: reserve(one, run_id="run-3")) == "mandate.budget_epsilon"
    mandates(silo).revoke(STUDY)
    mandated(silo, budget_epsilon=2.5 * once)  # another mandate of the study is no other budget
    assert refused(silo, lambda one: reserve(one, run_id="run-3")) == "mandate.budget_epsilon"
    mandated(silo, study="another", budget_delta=1.5 * CLIENTS.delta)
    assert reserve(silo, study="another", run_id="run-3").WhichOneof("kind") == "reserved"
    assert refused(silo, lambda one: reserve(one, study="another", run_id="run-4")) == "mandate.budget_delta"


def test_a_whole_run_for_clients_that_a_mandate_covers(silo, tiny_run, tiny_model, tmp_path):
    """The run's certificate is of the coordinator's own ledger, and has the mandate that the silo's receipt names."""
    overrides = (
        *("federated.study=ward-notes", "federated.rounds=2", "federated.local_steps=2", "federated.min_silos=1"),
        *("privacy.unit=client", "privacy.num_clients=10", "privacy.epsilon=1"),
        *("privacy.delta=1e-6", "privacy.sampling_rate=0.05", "evaluate.without_dp=false"),
    )
    config = load("tiny", [*overrides, f"run.storage={tmp_path / 'runs'}"])
    home = tmp_path / "coordinator"
    home.mkdir()
    (home / COORDINATOR_KEY).write_bytes(bytes(range(32)))
    (home / COORDINATOR_KEY).chmod(0o600)
    parties = Parties(COORDINATOR, 1, open_ledger=lambda: open_ledger(home, home / "ledger", "members", config.privacy))
    mandate, log = mandated(silo), EventLog(tmp_path / "run" / "events.jsonl")
    run = Coordinator(InProcess([silo]), config, tiny_model, tmp_path / "run", parties, log)
    run.run(lambda: initial_adapter(config, tiny_model))
    document = run.certify_model(FILES)
    check_certificate(document, "test")
    north = document["mandates"]["north"]
    assert north["mandate"] == mandate.model_dump(mode="json")
    assert (north["receipt"]["mandate"], north["receipt"]["plan_digest"]) == (mandate.digest, document["plan_digest"])
    assert north["receipt"]["spends"] == []
    kinds = [body["kind"] for body in bodies(silo)]
    assert kinds == ["open", "entrust", "unnoised", "unnoised", "close"]


def put_back(silo, content):
    """The silo again, with a ledger of before, reconciled with all that there is: no receipt tells of clients."""
    receipt = silo.ledger.receipt("run-1", COORDINATOR.public_key)
    silo.close()
    place = SiloFiles(Path(silo.config.silo.state_dir)).ledger
    for path in place.parent.glob("ledger.sqlite-*"):
        path.unlink()
    place.write_bytes(content)
    journal = Journal(place.parent, default_anchor_dir(place.parent), "north", "ward")
    done = reconcile(journal, Budget(20.0, 1e-4), [receipt])
    assert (done.doubt is None, done.spends) == (False, ())
    journal.db.close()
    return Silo(silo.config, TRUSTED)


@pytest.mark.parametrize(
    ("clock", "there"),
    [
        ("right", "as it was"),
        ("right", "brought back later"),
        ("ahead when the mandate was issued", "as it was"),
    ],
)
def test_a_ledger_that_is_put_back_gives_a_study_for_clients_nothing_back(
    tmp_path, tiny_model, monkeypatch, clock, there
):
    """What such runs claim is in no receipt. So no mandate that they may have used covers another one."""
    silo = Silo(ward(tmp_path, tiny_model, units=["record", "client"], max_rounds_per_run=50), TRUSTED)
    reserve(silo, study="", run_id="before")
    silo.ledger.journal.scrub()
    content = SiloFiles(Path(silo.config.silo.state_dir)).ledger.read_bytes()
    with monkeypatch.context() as patched:
        if clock != "right":
            patched.setattr("federated.silo.mandates.folder.datetime", Ahead)
        mandated(silo, budget_epsilon=1.5 * CLIENTS.epsilon)
    assert reserve(silo).WhichOneof("kind") == "reserved"
    assert refused(silo, lambda one: reserve(one, run_id="run-2")) == "mandate.budget_epsilon"
    path = mandates(silo).files.mandates / f"{STUDY}.json"
    kept = path.read_bytes()
    if there != "as it was":
        path.unlink()
    silo = put_back(silo, content)
    path.write_bytes(kept)
    if (clock, there) == ("right", "as it was"):
        found = reserve(silo, run_id="run-2").refusal.message
        assert "was reconciled at" in found and "revoke it, and to issue a new one" in found and "\n" not in found
    assert refused(silo, lambda one: reserve(one, run_id="run-2")) == "mandate.issued"
    assert spent_by(silo.ledger.journal.bodies(), STUDY).epsilon == 0  # which is why
    mandates(silo).revoke(STUDY)
    while time.time() <= silo.ledger.journal.bodies()[-1]["time"]:
        time.sleep(0.001)
    mandated(silo, budget_epsilon=1.5 * CLIENTS.epsilon)
    assert reserve(silo, run_id="run-2").WhichOneof("kind") == "reserved"
    replay(bodies(silo), "test")
    silo.close()


class Ahead(datetime):
    """A clock that is a day fast."""

    @classmethod
    def now(cls, tz=None):
        return datetime.now(tz) + timedelta(days=1)


@pytest.mark.parametrize("claimed", [{"study_epsilon": 0.0}, {"study_delta": 0.0}])
def test_a_ledger_that_counts_less_for_a_study_is_not_believed(silo, claimed):
    mandated(silo)
    reserve(silo)
    forged = [{**body, **claimed} if body["kind"] == "entrust" else body for body in deepcopy(bodies(silo))]
    with pytest.raises(InputError, match="for its study"):
        replay(forged, "test")


def test_no_other_entry_counts_something_else_for_its_study(silo):
    """What a study has left is by what its entries spend, whatever else is written into them."""
    mandate = mandated(silo, unit="record", min_noise_multiplier=0.8)
    reserve(silo, RECORDS)
    forged = deepcopy(bodies(silo))
    forged[-1] |= {"study_epsilon": 0.0, "study_delta": 0.0}
    assert forged[-1]["mandate"] == mandate.digest
    assert spent_by(forged, STUDY) == Budget(RECORDS.epsilon, RECORDS.delta)
    with pytest.raises(InputError, match="entry 2: counts something else for its study than it spends"):
        replay(forged, "test")


# Noise that silos make together


def shared(min_honest):
    noise = SharedNoise(min_honest=min_honest, reach=2.0, values=9000)
    return RECORDS.model_copy(update={"noise_multiplier": 4.0, "secure_sum": SecureSum(colluders=1, noise=noise)})


def test_a_mandate_says_on_how_many_honest_silos_epsilon_may_rest(silo):
    signer = silo.ledger.journal.signer
    assert signed(signer).beyond(shared(2))[0] == "honest_silos"  # not named: not allowed
    two = signed(signer, terms(honest_silos=2))
    assert two.beyond(shared(2)) is None
    assert two.beyond(shared(3)) == ("honest_silos", "3", "at most 2")
    assert two.beyond(RECORDS) is None


def test_a_run_that_a_version_before_opened_under_a_mandate_of_its_time_ends_with_its_consent(silo):
    """Until version 2 silence on honest silos was taken for consent, so such runs are open in silos' ledgers."""
    content = first_version(silo.ledger.journal.signer, base_models=[silo.workbench.base_model.content_digest])
    path = mandates(silo).files.mandates / f"{STUDY}.json"
    path.parent.mkdir()
    path.write_bytes(content)
    limits = Limits(study=read_mandate(content, "file").limit)
    silo.ledger.reserve("run-1", shared(2).bind(100), limits, COORDINATOR.public_key)
    for number in (1, 2):
        asked = train(silo, plan=shared(2), number=number)
        assert refused(silo, lambda one, asked=asked: ask(one, "train", train=asked)) == "mandate.honest_silos"
    assert refused(silo, lambda one: ask(one, "a", aggregate=pb.Aggregate(round=1))) == "mandate.honest_silos"
    assert ask(silo, "close", close=pb.Close()).WhichOneof("kind") == "closed"


# Mandates of version 1


def first_version(signer, **changes):
    """What Siloweave wrote before, by hand: canonical JSON, signed over all but the signature."""
    allowed = terms().model_dump(mode="json")
    for name in ("unit", "honest_silos"):
        del allowed[name]
    fields = {
        "version": 1,
        "kind": "mandate",
        "silo": "north",
        "dataset": "ward",
        "public_key": signer.public_key,
        "issued": "2026-11-30T12:00:00Z",
        "terms": {**allowed, **changes},
    }
    return canonical_json({**fields, "signature": signer.sign(canonical_json(fields))})


def test_a_mandate_of_before_is_read_byte_for_byte_and_covers_what_it_did():
    content = first_version(COORDINATOR)
    mandate = read_mandate(content, "file")
    assert mandate.to_bytes() == content
    tree = json.loads(content)
    signature = tree.pop("signature")
    assert signature_holds(COORDINATOR.public_key, canonical_json(tree), signature)
    assert mandate.beyond(RECORDS) is None
    assert mandate.beyond(CLIENTS) == ("unit", "client", "record")
    assert mandate.beyond(shared(2))[0] == "honest_silos"


@pytest.mark.parametrize("more", [{"unit": "client"}, {"honest_silos": 2}, {"unit": "record"}])
def test_a_mandate_of_before_has_no_field_of_later(more):
    with pytest.raises(UnsoundMandateError):
        read_mandate(first_version(COORDINATOR, **more), "file")


def test_a_mandate_of_a_later_version_is_refused():
    content = signed(COORDINATOR).to_bytes()
    assert content.count(b'"version":2') == 1
    with pytest.raises(UnsoundMandateError, match="version is 3, this Siloweave reads 1 to 2; a newer one needs"):
        read_mandate(content.replace(b'"version":2', b'"version":3'), "file")
    assert Mandate.model_fields["version"].default == 2
