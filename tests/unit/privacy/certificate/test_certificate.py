"""The certificate: made again from what the silos signed; any edited number is found and named."""

import copy
import json
import math
from pathlib import Path

import pytest
from edits import edited, leaves
from model_parts import model_of

from configs.errors import InputError
from configs.parse import json_object
from configs.storage.files import digest_bytes
from privacy.certificate.certificate import CERTIFICATE_VERSION, certificate
from privacy.certificate.check import check_certificate, check_in_ledger
from privacy.certificate.headline import everywhere
from privacy.ledger.chain import Budget, verify_entries
from privacy.ledger.ledger import Ledger
from privacy.metric_release import MetricRelease
from privacy.plan import PlanTerms
from privacy.secure_sum import SecureSum, SharedNoise

REQUEST = PlanTerms(
    sampling_rate=0.02, max_grad_norm=1.0, noise_multiplier=0.9, rounds=3, steps_per_round=4, delta=1e-5
)
PLAN = REQUEST.bind(5000)
DIGEST = "aa" * 32
SILOS = ("north", "south")
EARLIER = Path(__file__).with_name("certificates_of_version_3.json")


def reply_of(silo, number):
    return f"the whole reply of {silo} in round {number}".encode()


MODEL = model_of(*({silo: digest_bytes(reply_of(silo, n)) for silo in SILOS} for n in (1, 2)), {})


def close_run(folder, silo, *, attests=True, seed_source=None, statement=True):
    """One silo's part of a run, by its real ledger; what a coordinator keeps of it."""
    ledger = Ledger.open(folder / silo, silo, f"ward-{silo}", Budget(20.0, 3e-5), seed_source)
    ledger.reserve("run-1", PLAN)
    for number in (1, 2):
        charge = ledger.charge("run-1", f"round-{number}", DIGEST, number)
        ledger.release(charge.number, "run-1", reply_of(silo, number))
    found = {
        "dataset_id": f"ward-{silo}",
        "public_key": ledger.public_key,
        "public_record_count": 5000,
        "receipt": ledger.receipt("run-1").model_dump(mode="json"),
    }
    if statement:
        found["receipt"] = ledger.close("run-1").model_dump(mode="json")
        stated = ledger.statement("run-1", {"torch": "2"}, attests_disjoint_units=attests)
        found["statement"] = stated.model_dump(mode="json")
    ledger.close_file()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("silos")


@pytest.fixture(scope="module")
def sound(folder):
    return json.loads(json.dumps(certificate("run-1", REQUEST, {s: close_run(folder, s) for s in SILOS}, MODEL)))


def test_it_says_what_the_design_promises(sound):
    check_certificate(sound, "test")
    assert (sound["unit"], sound["relation"], sound["delta"]) == ("record", "add_or_remove_one", 1e-5)
    assert sound["epsilon_optimistic"] <= sound["epsilon"] < sound["epsilon_rdp"]
    assert sound["epsilon_sum"] == pytest.approx(2 * sound["epsilon"])
    assert sound["audited"] == "not audited"
    assert sound["seeds"].startswith("operating system")
    assert sound["silos"]["north"]["statement"]["rounds_charged"] == 2
    assert {"torch", "opacus", "dp-accounting"} <= set(sound["versions"])
    assert sound["not_covered"]


def test_it_names_the_certificate_of_the_run_that_it_continues(folder, sound):
    """A document of before says nothing of it, and is made again as it was."""
    silos = sound["silos"]
    model = MODEL.model_copy(update={"continues": "cd" * 32})
    document = json.loads(json.dumps(certificate("run-1", REQUEST, silos, model)))
    check_certificate(document, "test")
    assert document["model"]["continues"] == "cd" * 32
    assert "continues" not in sound["model"]
    before = json.loads(json.dumps(certificate("run-1", REQUEST, silos, MODEL, form=5)))
    check_certificate(before, "test")
    assert before["not_covered"] == sound["not_covered"][:-2]
    with pytest.raises(InputError, match="continues"):
        check_certificate(edited(document, ("model", "continues"), "no digest"), "test")


@pytest.mark.parametrize(
    ("options", "epsilons", "seeds"),
    [
        ({}, 1, "operating system, one a charge"),
        ({"attests": False}, 2, "operating system, one a charge"),
        ({"statement": False}, 2, "not stated by south"),
        ({"seed_source": lambda _: bytes(32)}, 1, "INJECTED in south"),
    ],
)
def test_attestation_and_seeds_are_those_of_the_signed_statements(tmp_path, options, epsilons, seeds):
    silos = {"north": close_run(tmp_path, "north"), "south": close_run(tmp_path, "south", **options)}
    document = certificate("run-1", REQUEST, silos, MODEL)
    check_certificate(document, "test")
    assert document["headline"]["epsilon"] == pytest.approx(epsilons * REQUEST.epsilon)
    assert document["seeds"].startswith(seeds)


def test_any_edited_number_is_found_and_its_place_is_named(sound):
    found = [(path, value) for path, value in leaves(sound) if isinstance(value, bool | int | float)]
    assert len(found) > 50
    for path, value in found:
        other = (
            (not value) if isinstance(value, bool) else value + 1 if isinstance(value, int) else (value or 0.5) * 0.9
        )
        with pytest.raises(InputError) as caught:
            check_certificate(edited(sound, path, other), "test")
        # Inside of what a silo signed, the signature tells only that one of its fields was edited.
        named = ".".join(map(str, path[:2] if path[0] == "silos" else path[:1]))
        assert named in str(caught.value), (path, caught.value)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("epsilon",), 1.0, "epsilon is 1.0, its replay gives"),
        (("headline", "epsilon"), 0.5, "headline.epsilon is 0.5"),
        (("headline", "rule"), "because", "headline.rule"),
        (("plan", "noise_multiplier"), 0.0, "noise_multiplier"),
        (("plan", "noise_multiplier"), 5.0, "plan_digest"),
        (("plan_digest",), "00" * 32, "plan_digest"),
        (("silos", "north", "statement", "rounds_charged"), 1, "silos.north.statement.signature"),
        (("silos", "north", "statement", "attests_disjoint_units"), False, "silos.north.statement.signature"),
        (("silos", "north", "statement", "seed_source"), "injected", "silos.north.statement.signature"),
        (("silos", "north", "public_record_count"), 9, "silos.north.receipt.public_record_count is 5000"),
        (("silos", "north", "public_key"), "00" * 32, "silos.north.receipt.public_key"),
        (("silos", "north", "receipt", "signature"), "", "silos.north.receipt.signature"),
        (("silos", "north", "receipt"), {}, "silos.north.receipt"),
        (("silos", "north", "statement"), [], "silos.north.statement"),
        (("silos", "north"), 3, "silos.north: int, expected an object"),
        (("silos", "west"), {}, "silos.west.receipt"),
        (("not_covered", 0), "nothing", "not_covered.0"),
        (("not_covered",), [], "not_covered"),
        (("seeds",), "dice", "seeds is 'dice'"),
        (("run_id",), "run-2", "silos.north.receipt.run is 'run-1', expected 'run-2'"),
        (("audited",), {"epsilon_lower_bound": 99.0}, "audited is {'epsilon_lower_bound': 99.0}"),
        (("audited",), {"epsilon_lower_bound": 0.1, "confidence": 0.999}, "its replay gives 'not audited'"),
        (("silos", "north", "epsilon_spent_in_all"), 0.001, "silos.north.epsilon_spent_in_all: no such field"),
        (("silos", "north", "receipt", "number"), "7", "silos.north.receipt.number is '7'"),
        (("not_covered",), {"0": "nothing"}, "not_covered is {'0': 'nothing'}"),
        (("headline", "epsilon"), True, "headline.epsilon is True"),
        (("silos",), {}, "silos: none"),
        (("versions",), {"torch": 2}, "versions: not all are strings"),
        (("audited",), "yes", "audited"),
        (("extra",), 1, "extra: no such field"),
        (("version",), 1, "version is 1"),
        (("version",), 12, "version is 12, this Siloweave reads 3 to 11; a newer one needs a newer Siloweave"),
        (("version",), True, "version is True"),
        (("version",), 3, "model: no such field"),
        (("model",), None, "model: NoneType, expected an object"),
        (("model", "base_model"), "", "model: base_model is ''"),
        (("model", "rounds"), [], "model.rounds: 0, the plan has 3"),
        (("model", "rounds", 2, "releases"), {"south": "aa" * 32}, "3 releases of 'south', which states 2 charged"),
        (
            ("model", "rounds", 2, "releases"),
            {"west": "aa" * 32},
            "release of 'west', which the certificate",
        ),
        (("versions",), None, "versions"),
    ],
)
def test_edits_are_refused_with_the_field(sound, path, value, message):
    with pytest.raises(InputError) as caught:
        check_certificate(edited(sound, path, value), "test")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_multiplier": 5.0}, r"silos.north.receipt.plan_digest"),
        ({"max_grad_norm": 2.0}, r"silos.north.receipt.plan_digest"),
        ({"rounds": 1, "steps_per_round": 12}, r"silos.north.receipt.plan_digest"),
    ],
)
def test_a_plan_that_is_exchanged_with_its_digest_is_not_what_the_silos_signed(sound, change, message):
    plan = REQUEST.model_copy(update=change)
    made = certificate("run-1", plan, sound["silos"], MODEL)
    with pytest.raises(InputError, match=message):
        check_certificate(made, "test")


def test_one_that_an_earlier_version_has_made_verifies_as_it_was():
    """Files of the version before this one, of records and of clients. They speak of no model."""
    for name, document in json.loads(EARLIER.read_text()).items():
        assert document["version"] == 3
        check_certificate(document, name)
        assert "model" not in document
        with pytest.raises(InputError, match=r"epsilon is 1\.0"):
            check_certificate(edited(document, ("epsilon",), 1.0), name)
        with pytest.raises(InputError, match="model: no such field"):
            check_certificate({**document, "model": MODEL.model_dump(mode="json")}, name)


def test_one_of_before_secure_aggregation_verifies_as_it_was(sound):
    document = json.loads(json.dumps(certificate("run-1", REQUEST, sound["silos"], MODEL, form=7)))
    check_certificate(document, "test")
    assert {**document, "version": CERTIFICATE_VERSION} == sound and "secure_sum" not in sound


def test_secure_aggregation_is_claimed_with_what_it_rests_on(tmp_path, monkeypatch):
    request = REQUEST.model_copy(update={"secure_sum": SecureSum(colluders=1, min_survivors=4)})
    monkeypatch.setitem(globals(), "PLAN", request.bind(5000))
    names = ("a", "b", "c", "d")
    silos = {name: close_run(tmp_path, name) for name in names}
    model = model_of(*({silo: digest_bytes(reply_of(silo, n)) for silo in names} for n in (1, 2)), {})
    document = json.loads(json.dumps(certificate("run-1", request, silos, model)))
    check_certificate(document, "test")
    assert "sum of 4 or more silos', at least 3 of them honest: as long as at most 1 silos" in document["secure_sum"]
    assert "under masks" in document["left_each_silo"]
    for path, value, said in (
        (("secure_sum",), "nobody sees anything", "secure_sum is 'nobody sees anything'"),
        (("plan", "secure_sum", "colluders"), 0, "plan_digest"),
        (("version",), 7, "secure_sum: no such field"),
    ):
        with pytest.raises(InputError, match=said):
            check_certificate(edited(document, path, value), "test")
    few = model_of(*({s: digest_bytes(reply_of(s, 1)) for s in names[:count]} for count in (3, 4)), {})
    with pytest.raises(
        InputError, match=r"model\.rounds\.0: 3 releases, and with secure aggregation there are none or"
    ):
        check_certificate(certificate("run-1", request, silos, few), "test")
    plain = REQUEST.model_dump()
    with pytest.raises(InputError, match="plan_digest"):
        check_certificate({**document, "plan": plain}, "test")
    with pytest.raises(InputError, match=r"silos\.a\.receipt\.plan_digest"):  # no silo has signed the other plan
        check_certificate({**document, "plan": plain, "plan_digest": REQUEST.digest}, "test")


def test_one_of_before_silos_made_noise_together_verifies_as_it_was(sound):
    document = json.loads(json.dumps(certificate("run-1", REQUEST, sound["silos"], MODEL, form=8)))
    check_certificate(document, "test")
    assert {**document, "version": CERTIFICATE_VERSION} == sound


def test_evaluations_are_said_to_be_under_masks_since_they_are(tmp_path, monkeypatch):
    """Until version 9 each silo of such a run released its noised sums by itself, and its certificate says no more."""
    metric = MetricRelease(name="held_out", releases=2, noise_multiplier=8.0)
    plain = REQUEST.model_copy(update={"metric_releases": (metric,)})
    request = plain.model_copy(update={"secure_sum": SecureSum(colluders=1, min_survivors=4)})
    monkeypatch.setitem(globals(), "PLAN", request.bind(5000))
    silos = {name: close_run(tmp_path, name) for name in ("a", "b", "c", "d")}
    model = model_of(*({s: digest_bytes(reply_of(s, n)) for s in silos} for n in (1, 2)), {})
    left = {}
    for form in (9, 10):
        document = json.loads(json.dumps(certificate("run-1", request, silos, model, form=form)))
        check_certificate(document, "test")
        left[form] = document["left_each_silo"].partition("count; ")[2]
    assert left[10] == "at most 2 times, under masks (secure_sum), the noised sums of the metric held_out"
    assert left[9] == "at most 2 times the noised sums of the metric held_out"
    assert certificate("run-1", plain, silos, None)["left_each_silo"].endswith(left[9])


def test_noise_that_silos_made_together_is_claimed_with_the_silos_that_it_rests_on(tmp_path, monkeypatch):
    noise = SharedNoise(min_honest=2, reach=50.0, values=2**20)
    secure = {"secure_sum": SecureSum(colluders=1, noise=noise), "steps_per_round": 1}
    request = REQUEST.model_copy(update=secure)
    monkeypatch.setitem(globals(), "PLAN", request.bind(5000))
    names = ("a", "b", "c", "d")
    silos = {name: close_run(tmp_path, name) for name in names}
    model = model_of(*({silo: digest_bytes(reply_of(silo, n)) for silo in names[:3]} for n in (1, 2)), {})
    document = json.loads(json.dumps(certificate("run-1", request, silos, model)))
    check_certificate(document, "test")
    assert "epsilon rests on it that at least 2 of them were honest" in document["secure_sum"]
    assert "noised sum of 3 or more silos'" in document["secure_sum"]
    assert "with this silo's share of the noise alone, under masks" in document["left_each_silo"]
    assert document["headline"]["epsilon"] == document["epsilon"] == request.epsilon
    for path, value, said in (
        (("secure_sum",), "epsilon does not rest on it", "secure_sum is 'epsilon does not rest on it'"),
        (("plan", "secure_sum", "noise", "min_honest"), 3, "plan_digest"),
        (("version",), 8, "version is 8, and silos make noise together since 9: edited"),
    ):
        with pytest.raises(InputError, match=said):
            check_certificate(edited(document, path, value), "test")
    few = model_of(*({s: digest_bytes(reply_of(s, n)) for s in names[:2]} for n in (1, 2)), {})
    with pytest.raises(InputError, match=r"model\.rounds\.0: 2 releases, .* at least 3"):
        check_certificate(certificate("run-1", request, silos, few), "test")


def test_a_unit_in_several_silos_is_a_group_in_a_sum_that_has_the_noise_once(tmp_path, monkeypatch):
    """What every steward attests, or else the group's delta, by its recursion: adding one silo's unit after another."""
    noise = SharedNoise(min_honest=2, reach=50.0, values=2**20)
    request = REQUEST.model_copy(update={"secure_sum": SecureSum(colluders=1, noise=noise), "steps_per_round": 1})
    monkeypatch.setitem(globals(), "PLAN", request.bind(5000))
    silos = {name: close_run(tmp_path, name, attests=name != "b") for name in ("a", "b", "c")}
    model = model_of(*({silo: digest_bytes(reply_of(silo, n)) for silo in silos} for n in (1, 2)), {})
    document = json.loads(json.dumps(certificate("run-1", request, silos, model)))
    check_certificate(document, "test")
    epsilon, delta = request.epsilon, request.delta
    claim = document["headline"]
    assert claim["epsilon"] == document["epsilon_sum"] == pytest.approx(3 * epsilon)
    grown = min(1.0, delta * (1 + math.exp(epsilon) + math.exp(2 * epsilon)))
    assert claim["delta"] == document["delta_sum"] == pytest.approx(grown)
    assert "as a group" in claim["rule"] and claim["rule"].endswith(
        "rests on 2 honest silos of each sum, whose noise it is"
    )
    one = {name: silos[name] for name in ("a", "b")}
    with pytest.raises(InputError, match="2 silos, and each sum had the noise of 3 or more"):
        check_certificate(certificate("run-1", request, one, model_of({}, {}, {})), "test")


@pytest.mark.parametrize(("epsilon", "delta", "silos"), [(0.5, 1e-6, 3), (8.0, 1e-5, 3), (1e4, 1e-9, 40)])
def test_a_groups_delta_is_that_of_the_lemma_and_never_above_1(epsilon, delta, silos):
    whole, grown = everywhere(epsilon, delta, silos, one_sum=True)
    assert whole == epsilon * silos and delta * silos <= grown <= 1
    if epsilon < 5:
        assert grown == pytest.approx(delta * math.expm1(silos * epsilon) / math.expm1(epsilon))
    assert everywhere(epsilon, delta, silos, one_sum=False) == (epsilon * silos, delta * silos)


def test_a_field_that_was_taken_out_is_missed(sound):
    for name in sound:
        changed = {key: value for key, value in sound.items() if key != name}
        with pytest.raises(InputError, match=name):
            check_certificate(changed, "test")


def test_a_name_with_a_dot_never_stands_for_what_is_inside(sound):
    for part in ("headline", "plan"):
        forged = {**copy.deepcopy(sound), **{f"{part}.{name}": value for name, value in sound[part].items()}}
        with pytest.raises(InputError, match=rf"{part}.\w+: no such field"):
            check_certificate(forged, "test")
    forged = {**sound, "headline": {**sound["headline"], "epsilon": 0.01}, "headline.epsilon": sound["epsilon"]}
    with pytest.raises(InputError, match=r"headline.epsilon"):
        check_certificate(forged, "test")
    listed = {str(number): line for number, line in enumerate(sound["not_covered"])}
    with pytest.raises(InputError, match="not_covered"):
        check_certificate({**sound, "not_covered": listed}, "test")


def test_a_name_that_is_there_twice_is_refused(sound):
    text = json.dumps(sound)
    assert json_object(text, "test") == sound
    for twice in (text[:-1] + ', "epsilon": 0.01}', text.replace('"rule": ', '"rule": "maximum", "rule": ')):
        with pytest.raises(InputError, match="is there twice"):
            json_object(twice, "test")


def test_taking_a_statement_out_never_hides_that_its_seeds_may_be_injected(tmp_path):
    silos = {
        "north": close_run(tmp_path, "north", seed_source=lambda _: bytes(32)),
        "south": close_run(tmp_path, "south"),
    }
    del silos["north"]["statement"]
    document = certificate("run-1", REQUEST, silos, MODEL)
    check_certificate(document, "test")
    assert document["seeds"].startswith("not stated by north, where they may be INJECTED")


def test_the_run_is_looked_for_in_a_silos_ledger(sound, folder, tmp_path):
    def chain(silo_folder, silo):
        ledger = Ledger.open(silo_folder / silo, silo, f"ward-{silo}", Budget(20.0, 3e-5))
        entries = ledger.entries()
        ledger.close_file()
        return verify_entries(entries, "test"), [entry["hash"] for entry in entries]

    bodies, hashes = chain(folder, "north")
    assert check_in_ledger(sound, bodies, hashes, "test") == "north"
    with pytest.raises(InputError, match=r"silos.north.receipt.head: not in the ledger's chain"):
        check_in_ledger(sound, bodies[:6], hashes[:6], "test")
    close_run(tmp_path, "north")
    with pytest.raises(InputError, match="none has the ledger's key"):
        check_in_ledger(sound, *chain(tmp_path, "north"), "test")
    for change, found in (((0, "north"), "ee" * 32), ((2, "north"), "ee" * 32)):
        other = edited(sound, ("model", "rounds", change[0], "releases", change[1]), found)
        with pytest.raises(InputError, match=rf"the release of north in round {change[0] + 1} is eeee"):
            check_in_ledger(other, bodies, hashes, "test")
    fewer = [body for body in bodies if (body["kind"], body.get("round")) != ("charge", 2)]
    with pytest.raises(InputError, match=r"silos.north.statement.rounds_charged is 2, the ledger has 1"):
        check_in_ledger(sound, fewer, hashes, "test")


def test_the_verify_command_replays_certificates_with_and_without_a_ledger(sound, folder, tmp_path, siloweave):
    path = tmp_path / "certificate.json"
    path.write_text(json.dumps(sound))
    both = siloweave("ledger", "verify", str(folder / "south"), "--certificate", str(path), "--json", cwd=tmp_path)
    assert both.returncode == 0, both.stderr
    assert json.loads(both.stdout)["silo"] == "south"
    path.write_text(json.dumps(edited(sound, ("epsilon_sum",), 3.0)))
    broken = siloweave("ledger", "verify", "--certificate", str(path), cwd=tmp_path)
    assert broken.returncode == 2
    assert "epsilon_sum is 3.0" in broken.stderr
    nothing = siloweave("ledger", "verify", cwd=tmp_path)
    assert (nothing.returncode, "nothing to verify" in nothing.stderr) == (2, True)
