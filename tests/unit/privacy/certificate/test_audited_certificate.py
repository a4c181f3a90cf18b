"""The certificate of an audit's run: its bound follows from signed counts, and can't be carried by another run."""

import copy
import dataclasses
import json
from math import comb, exp

import pytest
from model_parts import model_of

from configs.errors import InputError, PolicyRefusal
from federated.audit.audit_silo import AuditSilo
from privacy.audit.bound import Finding
from privacy.certificate.certificate import certificate
from privacy.certificate.check import check_certificate, check_in_ledger
from privacy.ledger.chain import Budget, verify_entries
from privacy.ledger.ledger import Ledger
from privacy.ledger.statements import AuditStatement
from privacy.plan import PlanTerms
from privacy.signing import Signer

REQUEST = PlanTerms(
    sampling_rate=0.05, max_grad_norm=1.0, noise_multiplier=1.0, rounds=2, steps_per_round=5, delta=1e-5
)
PLAN = REQUEST.bind(5000)
DESIGN = "cd" * 32
GRADIENT = Finding("gradient_white_box", 2000, 250, 150, REQUEST.epsilon, REQUEST.delta, 0.9)
BLACK_BOX = Finding("example_black_box", 512, 64, 33, REQUEST.epsilon, REQUEST.delta, 0.1)


def audited(folder, *findings, run_id="audit-run-1"):
    """An audit's certificate by its real ledger, as its file holds it."""
    silo = AuditSilo.open(folder, PLAN, run_id, DESIGN)
    assert len({silo.seed(1), silo.seed(2)}) == 2
    with pytest.raises(PolicyRefusal):
        silo.seed(3)
    document = silo.certificate(findings, earlier_audits=1)
    silo.close()
    return json.loads(json.dumps(document))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("audit") / "silo"


@pytest.fixture(scope="module")
def sound(folder):
    return audited(folder, GRADIENT, BLACK_BOX)


def resigned(document, folder, **changes):
    """The same with another audit, signed by the silo's own key."""
    changed = copy.deepcopy(document)
    (silo,) = changed["silos"].values()
    statement = AuditStatement.model_validate({**silo["audit"], **changes})
    silo["audit"] = statement.signed(Signer(folder / "silo.key")).model_dump(mode="json")
    silos = {"audit": silo}
    return json.loads(json.dumps(certificate(changed["run_id"], REQUEST, silos, None, versions=changed["versions"])))


def chance_of_so_many(finding, epsilon):
    """Theorem 5.2 of Steinke et al. 2023, term by term in exact binomials."""
    right = 1 / (1 + exp(-epsilon))
    weights = [
        comb(finding.guesses, k) * right**k * (1 - right) ** (finding.guesses - k) for k in range(finding.guesses + 1)
    ]
    v = finding.correct
    worst = max(sum(weights[v - i : v]) / i for i in range(1, v + 1))
    return sum(weights[v:]) + 2 * finding.canaries * finding.delta * worst


def test_it_holds_the_bounds_that_the_counts_give_and_says_what_they_are_of(sound):
    check_certificate(sound, "test")
    shown = sound["audited"]
    gradient, black_box = shown["scores"]
    assert (gradient["canaries"], gradient["guesses"], gradient["correct"], gradient["box"]) == (
        2000,
        250,
        150,
        "white",
    )
    assert black_box["box"] == "black"
    for name, confidence in (("epsilon_lower_bound_95", 0.95), ("epsilon_lower_bound_99_9", 0.999)):
        error = (1 - confidence) * 0.9
        bound = gradient[name]
        if bound:
            assert chance_of_so_many(GRADIENT, bound + 1e-5) >= error > chance_of_so_many(GRADIENT, bound - 1e-5)
        else:
            assert chance_of_so_many(GRADIENT, 0.0) >= error
        assert shown[name] == max(gradient[name], black_box[name])
    assert 0 < shown["epsilon_lower_bound_95"] < sound["epsilon"]
    assert (shown["earlier_audits"], shown["design_digest"]) == (1, DESIGN)
    assert "canaries in public text" in shown["of"]
    assert sound["silos"]["audit"]["statement"]["rounds_charged"] == 2
    assert sound["seeds"].startswith("operating system")


def test_its_ledger_holds_its_run_and_no_seed(sound, folder):
    ledger = Ledger.open(folder, "audit", "canaries in public text", Budget(REQUEST.epsilon, REQUEST.delta))
    entries = ledger.entries()
    assert ledger.journal.db.execute("SELECT count(*) FROM seeds").fetchone() == (0,)
    ledger.close_file()
    bodies = verify_entries(entries, "test")
    assert check_in_ledger(sound, bodies, [entry["hash"] for entry in entries], "test") == "audit"


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("audited", "epsilon_lower_bound_95"), 0.0, "audited.epsilon_lower_bound_95 is 0.0, its replay gives"),
        (("audited", "scores", 0, "epsilon_lower_bound_99_9"), 3.0, "audited.scores.0.epsilon_lower_bound_99_9"),
        (("audited", "scores", 0, "box"), "black", "audited.scores.0.box"),
        (("audited",), "not audited", "audited is 'not audited', its replay gives"),
        (("silos", "audit", "audit", "scores", 0, "correct"), 130, "silos.audit.audit.signature doesn't hold"),
        (("silos", "audit", "audit", "earlier_audits"), 0, "silos.audit.audit.signature doesn't hold"),
        (("silos", "audit", "audit", "run"), "run-2", "audit.run is 'run-2', expected 'audit-run-1'"),
        (("silos", "audit", "dataset_id"), "ward", "dataset is 'canaries in public text', expected 'ward'"),
    ],
)
def test_what_was_edited_is_found(sound, path, value, message):
    changed = copy.deepcopy(sound)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(InputError) as caught:
        check_certificate(changed, "test")
    assert message in str(caught.value)


SCORE = {"mode": "gradient_white_box", "canaries": 2000, "guesses": 250, "correct": 150, "share": 0.9}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scores": [SCORE, {**SCORE, "share": 0.2}]}, "add up to more than 1"),
        ({"scores": [{**SCORE, "correct": 250}]}, r"audited: epsilon is at least .* \(99.9% confidence\)"),
        ({"plan_digest": "ab" * 32}, "audit.plan_digest"),
        ({"run": "audit-run-2"}, "audit.run is 'audit-run-2'"),
        ({"silo": "north"}, "audit.silo is 'north'"),
    ],
)
def test_what_its_own_key_signed_is_checked_too(sound, folder, changes, message):
    document = resigned(sound, folder, **changes)
    with pytest.raises(InputError, match=message):
        check_certificate(document, "test")


def test_counts_that_no_audit_can_have_are_refused(sound, folder):
    changed = copy.deepcopy(sound)
    silo = changed["silos"]["audit"]
    statement = AuditStatement.model_validate({**silo["audit"], "scores": [{**SCORE, "correct": 251}]})
    silo["audit"] = statement.signed(Signer(folder / "silo.key")).model_dump(mode="json")
    with pytest.raises(InputError, match="counts that don't fit together"):
        check_certificate(changed, "test")


def test_another_run_can_not_carry_the_audit(sound, tmp_path):
    """Not an ordinary run of the same plan, nor another audit: each part names run, silo, key and dataset."""
    ledger = Ledger.open(tmp_path / "north", "north", "ward", Budget(20.0, 3e-5))
    ledger.reserve("run-1", PLAN)
    receipt = ledger.close("run-1").model_dump(mode="json")
    statement = ledger.statement("run-1", {}, attests_disjoint_units=True).model_dump(mode="json")
    north = {
        "dataset_id": "ward",
        "public_key": ledger.public_key,
        "public_record_count": 5000,
        "receipt": receipt,
        "statement": statement,
    }
    ledger.close_file()
    check_certificate(certificate("run-1", REQUEST, {"north": north}, model_of({}, {})), "test")
    borrowed = sound["silos"]["audit"]
    with pytest.raises(InputError, match=r"silos.north.audit.silo is 'audit', expected 'north'"):
        check_certificate(certificate("run-1", REQUEST, {"north": {**north, "audit": borrowed["audit"]}}, None), "test")
    with pytest.raises(InputError, match="and one has an audit, which is of one silo"):
        check_certificate(certificate("run-1", REQUEST, {"north": north, "audit": borrowed}, None), "test")
    weaker = audited(tmp_path / "silo", dataclasses.replace(GRADIENT, correct=90), run_id="audit-run-2")
    weaker["silos"]["audit"]["audit"] = borrowed["audit"]
    with pytest.raises(InputError, match=r"silos\.audit\.audit"):
        check_certificate(weaker, "test")
