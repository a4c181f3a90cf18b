"""A silo with mandates: what none of them covers is refused before anything is written, and before data is touched."""

import json
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from client_plans import client_plan
from mandates import STUDY, signed, terms
from signed_silos import InProcess, coordinator
from signed_silos import adapter as shared
from silo_requests import COORDINATOR, TRUSTED, body_of, opened, signer_of, ward

from configs.errors import PolicyRefusal
from configs.storage.files import digest_bytes
from configs.storage.manifests import read_manifest
from federated.adapters.arrays import to_bytes
from federated.adapters.warm_model import initial_adapter
from federated.protocol import silo_pb2 as pb
from federated.protocol.envelope import seal_request
from federated.silo.mandates.folder import Mandates
from federated.silo.silo import Silo
from privacy.ledger.chain import verify_entries
from privacy.ledger.replay import replay
from privacy.ledger.statements import Receipt, RunStatement
from privacy.mandate import read_mandate
from privacy.plan import METRIC, MetricRelease, PlanTerms
from privacy.secure_sum import SecureSum, SharedNoise

PLAN = PlanTerms(sampling_rate=0.05, max_grad_norm=1.0, noise_multiplier=0.8, rounds=2, steps_per_round=2, delta=1e-5)
CLIENTS = client_plan(noise_multiplier=4.0, rounds=2, num_clients=10, delta=1e-6)
OTHER = signer_of(bytes(range(1, 33)))


class Untouchable:
    """In the workbench's place: whoever looks at records, task or model fails, which is no refusal."""

    def __getattr__(self, name):
        raise RuntimeError(f"{name} was touched")


@pytest.fixture(scope="module")
def adapter(tiny_run):
    return to_bytes(initial_adapter(tiny_run.config(), tiny_run.model))


@pytest.fixture
def silo(tmp_path, tiny_model):
    config = ward(tmp_path, tiny_model, units=["record", "client"], releases_metrics=True, max_rounds_per_run=50)
    silo = Silo(config, TRUSTED | {OTHER.public_key})
    yield silo
    silo.close()


def mandates(silo):
    return Mandates.of(silo.config, silo.ledger.public_key)


def mandated(silo, **changes):
    """Puts a mandate in force."""
    allowed = terms(silo.workbench.base_model.content_digest, **changes)
    return mandates(silo).add(allowed, silo.ledger.journal.signer)


def file_of(silo, study=STUDY):
    return mandates(silo).files.mandates / f"{study}.json"


def ask(silo, request_id, sender=COORDINATOR, study=STUDY, run_id="run-1", **kind):
    body = body_of(request_id, run_id, coordinator=sender.public_key, study=study, **kind)
    return opened(silo.handle(seal_request(sender, body)), silo)


def reserve(silo, plan=PLAN, **how):
    return ask(silo, "reserve", **how, reserve=pb.Reserve(plan=plan.model_dump_json()))


def train(silo, adapter=b"", number=1, plan=PLAN, how=None, **changes):
    given = {
        "round": number,
        "plan_digest": plan.digest,
        "base_model_digest": of_silo(silo),
        "task": "causal",
        "adapter_spec": pb.AdapterSpec(rank=4, alpha=8.0),
        "adapter": adapter,
        "learning_rate": 0.01,
        "optimizer": "adam",
    }
    return ask(silo, f"round-{number}", **(how or {}), train=pb.Train(**{**given, **changes}))


def rehearse(silo, plan=PLAN, base_model=None, **how):
    model = of_silo(silo) if base_model is None else base_model
    content = pb.Train(round=1, plan_digest=plan.digest, base_model_digest=model, task="causal")
    return ask(
        silo, "trial", **how, rehearse=pb.Rehearse(reserve=pb.Reserve(plan=plan.model_dump_json()), train=content)
    )


def of_silo(silo):
    """The base model that the mandate names, without a look at the workbench."""
    return read_manifest(Path(silo.config.silo.base_model), "model").content_digest


def ledger_bytes(silo):
    return [path.read_bytes() for path in sorted(silo.ledger.path.parent.glob("ledger.sqlite*"))]


def refused(silo, reply_of):
    """The rule by which a request is refused that writes nothing and touches nothing."""
    bench, before, entries = silo.workbench, ledger_bytes(silo), silo.ledger.entries()
    silo.workbench = Untouchable()
    try:
        reply = reply_of(silo)
    finally:
        silo.workbench = bench
    assert reply.WhichOneof("kind") == "refusal", reply
    assert (ledger_bytes(silo), silo.ledger.entries()) == (before, entries)
    assert reply.refusal.message.startswith(f"{reply.refusal.rule}: ")
    assert "\n" not in reply.refusal.message
    return reply.refusal.rule


def put(silo, content):
    path = file_of(silo)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def in_its_place(**changes):
    """Puts a mandate in place that this silo's key has signed, or the key that is given, with other fields."""

    def place(silo):
        signer = changes.get("signer", silo.ledger.journal.signer)
        fields = {name: value for name, value in changes.items() if name != "signer"}
        put(silo, signed(signer, **fields).to_bytes())

    return place


def edited(old, new):
    def place(silo):
        content = mandated(silo).to_bytes()
        assert content.count(old) == 1
        put(silo, content.replace(old, new))

    return place


def foreign_signature(silo):
    own = mandated(silo)
    put(silo, own.model_copy(update={"signature": OTHER.sign(own._message())}).to_bytes())


def revoked(silo):
    mandated(silo)
    mandates(silo).revoke(STUDY)


def put_back(silo):
    content = mandated(silo).to_bytes()
    mandates(silo).revoke(STUDY)
    put(silo, content)


def pipe(silo):
    file_of(silo).parent.mkdir()
    os.mkfifo(file_of(silo))


def folder(silo):
    file_of(silo).mkdir(parents=True)


def noisy(**changes):
    return lambda silo: reserve(silo, PLAN.model_copy(update=changes))


def metric(**changes):
    given = {"name": METRIC, "noise_multiplier": 2.0, "releases": 1}
    return noisy(metric_releases=(MetricRelease(**{**given, **changes}),))


EXPIRED = {"expires": datetime.fromtimestamp(0, tz=UTC).date()}

FILES = {
    "of another silo": (in_its_place(silo="south"), "silo"),
    "of another dataset": (in_its_place(dataset="lab"), "dataset"),
    "of another key": (in_its_place(signer=OTHER), "public_key"),
    "signed with another key": (foreign_signature, "signature"),
    "of another study": (in_its_place(allowed=terms(study="other")), "study"),
    "expired": (in_its_place(allowed=terms(**EXPIRED)), "expires"),
    "of a later version": (edited(b'"version":2', b'"version":3'), "version"),
    "with a larger budget": (edited(b'"budget_epsilon":10.0', b'"budget_epsilon":90.0'), "signature"),
    "with a blank more": (edited(b'"version":2', b'"version": 2'), "content"),
    "with a field more": (edited(b'"version":2', b'"more":1,"version":2'), "content"),
    "cut short": (lambda silo: put(silo, mandated(silo).to_bytes()[:-1]), "content"),
    "empty": (lambda silo: put(silo, b""), "content"),
    "too long": (lambda silo: put(silo, mandated(silo).to_bytes() + b" " * 2**20), "size"),
    "a pipe": (pipe, "file"),
    "a folder": (folder, "file"),
    "revoked": (revoked, "study"),
    "revoked and put back": (put_back, "study"),
}

REQUESTS = {
    "no study": (lambda silo: reserve(silo, study=""), "study"),
    "no study, to describe": (lambda silo: ask(silo, "who", study="", describe=pb.Describe()), "study"),
    "no study, to close": (lambda silo: ask(silo, "close", study="", close=pb.Close()), "study"),
    "an unknown study": (lambda silo: reserve(silo, study="other"), "study"),
    "a path": (lambda silo: reserve(silo, study=f"../mandates/{STUDY}"), "study"),
    "two lines": (lambda silo: reserve(silo, study=f"{STUDY}\n"), "study"),
    "another coordinator": (lambda silo: reserve(silo, sender=OTHER), "coordinator"),
    "another coordinator, to train": (lambda silo: train(silo, how={"sender": OTHER}), "coordinator"),
    "less noise": (noisy(noise_multiplier=0.79), "min_noise_multiplier"),
    "larger batches": (noisy(sampling_rate=0.051), "max_sampling_rate"),
    "more steps": (noisy(steps_per_round=5), "max_steps_per_round"),
    "more rounds": (noisy(rounds=5), "max_rounds_per_run"),
    "a larger delta": (lambda silo: reserve(silo, PLAN.model_copy(update={"delta": 6e-5})), "plan"),
    "more evaluations": (metric(releases=6), "max_rounds_per_run"),
    "evaluations with less noise": (metric(noise_multiplier=0.5), "min_noise_multiplier"),
    "clients as units": (lambda silo: reserve(silo, CLIENTS), "unit"),
    "another base model": (lambda silo: train(silo, base_model_digest="cd" * 32), "base_models"),
    "no base model": (lambda silo: train(silo, base_model_digest=""), "base_models"),
    "another task": (lambda silo: train(silo, task="qa"), "task"),
    "labels": (lambda silo: train(silo, task_spec=pb.TaskSpec(labels=("yes", "no"))), "labels"),
    "to contribute, without noise": (
        lambda silo: ask(silo, "c", contribute=pb.Contribute(train=pb.Train(base_model_digest=of_silo(silo)))),
        "unit",
    ),
    "noise that silos make together": (
        noisy(
            noise_multiplier=4.0,
            steps_per_round=1,
            secure_sum=SecureSum(colluders=1, noise=SharedNoise(min_honest=2, reach=2.0, values=9000)),
        ),
        "honest_silos",
    ),
    "to evaluate another base model": (lambda silo: ask(silo, "e", evaluate=pb.Evaluate(number=1)), "base_models"),
    "to rehearse in no study": (lambda silo: rehearse(silo, study=""), "study"),
    "to rehearse for another coordinator": (lambda silo: rehearse(silo, sender=OTHER), "coordinator"),
    "to rehearse with less noise": (
        lambda silo: rehearse(silo, PLAN.model_copy(update={"noise_multiplier": 0.79})),
        "min_noise_multiplier",
    ),
    "to rehearse with another base model": (lambda silo: rehearse(silo, base_model="cd" * 32), "base_models"),
    "to go on with a run of another name": (lambda silo: train(silo, how={"study": "other"}), "study"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_mandate_that_does_not_hold_covers_nothing(silo, name, caplog):
    place, field = FILES[name]
    place(silo)
    for reply_of in (reserve, train, lambda one: ask(one, "who", describe=pb.Describe())):
        assert refused(silo, reply_of) == f"mandate.{field}"


@pytest.mark.parametrize("name", REQUESTS)
def test_what_no_mandate_covers_is_refused_before_anything_is_done(silo, name):
    mandated(silo)
    reply_of, field = REQUESTS[name]
    assert refused(silo, reply_of) == (field if field == "plan" else f"mandate.{field}")


@pytest.mark.parametrize("place", range(0, 700, 23))
def test_no_byte_of_a_mandate_can_be_changed(silo, place):
    content = bytearray(mandated(silo).to_bytes())
    content[place] ^= 1
    put(silo, bytes(content))
    assert refused(silo, reserve).startswith("mandate.")


@pytest.mark.parametrize(("study", "said"), [("", "asked none"), ("other", "asked other")])
def test_a_run_that_no_mandate_covers_ends_with_its_own_status_in_one_line(silo, tmp_path, study, said):
    mandated(silo)
    overrides = (f"federated.study={study}", "federated.round_timeout_s=0.3")
    with pytest.raises(PolicyRefusal, match=rf"silo north refuses: mandate\.study: {said}, allowed a study") as refusal:
        coordinator(InProcess([silo]), tmp_path / "run", *overrides).run(shared)
    assert refusal.value.exit_status == 3
    assert "\n" not in str(refusal.value)


def test_a_silo_without_mandates_answers_as_before_whatever_study_it_is_told(silo):
    assert Receipt.from_bytes(reserve(silo).reserved.receipt, "reply").mandate == ""
    assert reserve(silo, study="", run_id="run-2").reserved.mandate == b""
    assert b"mandate" not in reserve(silo).reserved.receipt
    assert all("study" not in json.loads(entry["body"]) for entry in silo.ledger.entries())


def test_a_policy_may_ask_for_a_mandate_before_there_is_one(silo):
    policy = silo.config.policy.model_copy(update={"requires_mandate": True})
    silo.config = silo.config.model_copy(update={"policy": policy})
    assert refused(silo, reserve) == "mandate.study"


def test_a_whole_run_under_a_mandate_names_it_in_all_that_the_silo_signs(silo, adapter):
    mandate = mandated(silo)
    reserved = reserve(silo).reserved
    assert read_mandate(reserved.mandate, "reply") == mandate
    trained = train(silo, adapter).trained
    closed = ask(silo, "close", close=pb.Close()).closed
    for receipt in (reserved.receipt, trained.receipt, closed.receipt):
        assert Receipt.from_bytes(receipt, "reply").mandate == mandate.digest == digest_bytes(reserved.mandate)
    assert RunStatement.from_bytes(closed.statement, "reply").mandate == mandate.digest
    bodies = verify_entries(silo.ledger.entries(), "test", silo.ledger.public_key)
    replay(bodies, "test")
    (reservation,) = (body for body in bodies if body["kind"] == "reserve")
    assert (reservation["study"], reservation["mandate"]) == (STUDY, mandate.digest)


def test_a_round_after_the_mandate_was_revoked_is_refused_and_so_is_what_is_stored(silo, adapter):
    mandated(silo)
    reserve(silo)
    assert train(silo, adapter).WhichOneof("kind") == "trained"
    mandates(silo).revoke(STUDY)
    assert refused(silo, lambda one: train(one, adapter, 2)) == "mandate.study"
    assert refused(silo, lambda one: train(one, adapter)) == "mandate.study"
    assert refused(silo, reserve) == "mandate.study"
    # A mandate that comes later covers no run of before; to close it needs none.
    mandated(silo)
    assert refused(silo, lambda one: train(one, adapter, 2)) == "mandate.run"
    assert refused(silo, reserve) == "mandate.run"
    closed = ask(silo, "close", close=pb.Close())
    assert RunStatement.from_bytes(closed.closed.statement, "reply").rounds_charged == 1


def test_a_rehearsal_is_told_what_its_study_has_left(silo):
    mandated(silo, budget_epsilon=1.5 * PLAN.epsilon)
    told = rehearse(silo)
    assert told.WhichOneof("kind") == "rehearsed"
    assert not any("mandate" in line for line in told.rehearsed.refusals)
    reserve(silo)
    assert [
        line for line in rehearse(silo, run_id="run-2").rehearsed.refusals if line.startswith("mandate.budget_epsilon")
    ]


def test_a_run_from_before_all_mandates_is_not_covered_by_the_first_one(silo, adapter):
    reserve(silo, study="")
    mandated(silo)
    assert refused(silo, lambda one: train(one, adapter)) == "mandate.run"
    assert refused(silo, lambda one: train(one, adapter, how={"study": ""})) == "mandate.study"
    assert ask(silo, "close", study="", close=pb.Close()).WhichOneof("kind") == "closed"


def test_the_studys_budget_is_for_all_its_runs_together(silo):
    """Whatever the dataset has left, and under whichever mandate of the study the runs were reserved."""
    once = PLAN.epsilon
    mandated(silo, budget_epsilon=2.5 * once)
    assert reserve(silo, run_id="run-1").WhichOneof("kind") == "reserved"
    mandates(silo).revoke(STUDY)
    mandated(silo, budget_epsilon=2.5 * once)
    mandated(silo, study="another", budget_epsilon=1.5 * once)
    assert reserve(silo, run_id="run-2").WhichOneof("kind") == "reserved"
    assert reserve(silo, run_id="run-2").WhichOneof("kind") == "reserved"  # the same again spends nothing
    assert refused(silo, lambda one: reserve(one, run_id="run-3")) == "mandate.budget_epsilon"
    assert reserve(silo, study="another", run_id="run-3").WhichOneof("kind") == "reserved"
    assert refused(silo, lambda one: reserve(one, study="another", run_id="run-4")) == "mandate.budget_epsilon"
