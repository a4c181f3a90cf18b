"""The dossier of a real run: every sentence leads to a field, and no byte of it can be changed unseen."""

import json
import shutil
from pathlib import Path

import pytest
from client_plans import client_plan
from mandates import STUDY, signed, stated, terms
from model_parts import model_of
from typer.testing import CliRunner

import siloweave
from cluster.report.dossier.dossier import DOCUMENT, PAGE, REGISTRY, SUMS, _encoded, _page, _written, make, verify
from cluster.report.dossier.sources import AUDIT, COORDINATOR, CoordinatorWord, Traffic
from configs.errors import InputError
from configs.storage.files import digest_file
from configs.storage.layout import CERTIFICATE, RunFiles
from configs.storage.manifests import MANIFEST, Manifest, commit_manifest, read_manifest
from federated.audit.audit_silo import AuditSilo
from privacy.audit.bound import Finding
from privacy.certificate.certificate import AGGREGATOR, certificate
from privacy.ledger.chain import Budget
from privacy.ledger.client_runs import entrust
from privacy.ledger.ledger import Ledger
from privacy.ledger.limits import Limits
from privacy.plan import PlanTerms

FILES = (CERTIFICATE, COORDINATOR, DOCUMENT, PAGE, REGISTRY, SUMS)


@pytest.fixture(scope="module")
def settings(tiny_run):
    return tiny_run.config()


@pytest.fixture(scope="module")
def sound(tiny_run, settings, tmp_path_factory):
    folder, _ = make(settings, tiny_run.directory, tmp_path_factory.mktemp("made") / "dossier")
    return folder


@pytest.fixture
def folder(sound, tmp_path):
    """A copy that a test may change."""
    shutil.copytree(sound, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def run(tiny_run, tmp_path):
    """What a dossier reads of a run, to be changed."""
    for name in ("config.toml", "federated"):
        source = tiny_run.directory / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    return tmp_path


def dossier(*arguments):
    return CliRunner().invoke(siloweave.app, ["dossier", *map(str, arguments)])


def failed(*arguments):
    error = dossier(*arguments).exception
    assert isinstance(error, InputError), error
    assert "\n" not in str(error)
    return str(error)


def sentences(folder):
    document = json.loads((folder / DOCUMENT).read_bytes())
    return [one for section in document["sections"] for one in section["sentences"]]


def looked_up(folder, sentence):
    found = json.loads((folder / sentence["file"]).read_bytes())
    for part in sentence["at"].split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        found = found[int(key)] if isinstance(found, list) else found[key]
    return found


def test_the_command_writes_one_folder_that_holds(tiny_run, sound, tmp_path):
    done = dossier(tiny_run.directory, "--output", tmp_path / "mine", "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / "mine" / name).read_bytes() == (sound / name).read_bytes()
    checked = json.loads(dossier("--verify", tmp_path / "mine", "--json").stdout)
    assert (checked["run"], checked["digest"]) == ("tiny", said["digest"])
    assert "is there already" in failed(tiny_run.directory, "--output", tmp_path / "mine")


def test_every_sentence_leads_to_a_field_and_says_whose_word_it_is(sound):
    found = sentences(sound)
    assert len(found) > 60
    for one in found:
        looked_up(sound, one)
        assert one["text"].endswith(".")
        assert one["text"].count(". ") < 2
    standings = {one["standing"] for one in found}
    assert {"signed by roman", "computed again from what is signed"} <= standings
    for one in found:
        if one["at"].startswith("/model"):  # nobody signs the whole of it
            assert one["standing"].startswith("a digest that the coordinator states")
            assert one["standing"].endswith("signed ledger holds") == ("/releases/" in one["at"])
    page = (sound / PAGE).read_text()
    assert all(f"{one['file']}{one['at']}" in page for one in found)


def test_what_a_committee_asks_is_in_it(tiny_run, sound):
    certificate = json.loads((tiny_run.directory / "federated" / CERTIFICATE).read_bytes())
    texts = " ".join(one["text"] for one in sentences(sound))
    for digest in certificate["model"]["adapter"].values():
        assert digest in texts
    for name, silo in certificate["silos"].items():
        assert f"{name} trained on its dataset {silo['dataset_id']}" in texts
        assert f"with key {silo['public_key']}" in texts
        assert f"{name} has signed no mandate" in texts
    for line in certificate["not_covered"]:
        assert line[1:] in texts
    for releases in (one["releases"] for one in certificate["model"]["rounds"]):
        assert all(digest in texts for digest in releases.values())
    assert "Round 2 ended at 20" in texts
    assert "No audit of this run" in texts
    entry = json.loads((sound / REGISTRY).read_bytes())
    loss = entry["deployment"]["privacy_loss"]["privacy_parameters"]
    assert loss == {"epsilon": certificate["headline"]["epsilon"], "delta": certificate["headline"]["delta"]}


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_byte_anywhere_in_a_file_is_found(folder, name):
    path, content = folder / name, (folder / name).read_bytes()
    step = max(1, len(content) // 12)
    for place in [*range(0, len(content), step), len(content) - 1]:
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(InputError) as error:
            verify(folder)
        assert str(error.value).startswith(str(folder))
        assert "\n" not in str(error.value)


def sums_again(folder):
    """What somebody does who knows of the sums."""
    names = sorted(set(FILES) - {SUMS})
    (folder / SUMS).write_text("".join(f"{digest_file(folder / name)}  {name}\n" for name in names))


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (PAGE, b"is not covered", b"is covered too"),
        (DOCUMENT, b"The run satisfies", b"The run surpasses"),
        (REGISTRY, b"Approximate DP", b"Perfect DP"),
        (CERTIFICATE, b'"rounds_charged": 2', b'"rounds_charged": 1'),
        (CERTIFICATE, b"\n", b"\n\n"),
        (COORDINATOR, b'"task": "causal"', b'"task": "qa"'),
        (COORDINATOR, b'"form": 1', b'"form": 2'),
    ],
)
def test_whoever_mends_the_sums_as_well_is_found(folder, name, old, new):
    content = (folder / name).read_bytes()
    assert old in content
    (folder / name).write_bytes(content.replace(old, new, 1))
    sums_again(folder)
    with pytest.raises(InputError, match=str(folder)):
        verify(folder)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_is_named(folder, name):
    (folder / name).unlink()
    assert f"{folder / name}: missing" in failed("--verify", folder)


def test_a_file_that_was_added_is_named(folder):
    (folder / "more.txt").write_text("approved")
    assert f"{folder / 'more.txt'}: no file of a dossier" in failed("--verify", folder)


def test_a_run_that_did_not_finish_has_no_dossier(run):
    (run / "federated" / "manifest.json").unlink()
    assert "federate" in failed(run)
    assert not RunFiles(run).dossier.exists()


def manifest_again(run):
    """What somebody does who knows of the manifest."""
    folder = run / "federated"
    found = read_manifest(folder, "federated")
    (folder / MANIFEST).unlink()
    commit_manifest(folder, Manifest(found.kind, found.config_digest, inputs=found.inputs, metadata=found.metadata))


def test_a_run_whose_certificate_does_not_hold_has_no_dossier(run):
    path = run / "federated" / CERTIFICATE
    document = json.loads(path.read_bytes())
    document["epsilon"] /= 2
    path.write_text(json.dumps(document))
    assert "is not the manifest's" in failed(run)
    manifest_again(run)
    assert failed(run).startswith(f"{path}: epsilon is ")
    assert not RunFiles(run).dossier.exists()


def test_a_run_that_has_published_another_model_has_no_dossier(run):
    path = run / "federated" / "adapter" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\0\1")
    assert "is not the manifest's" in failed(run)
    manifest_again(run)
    assert "this is another model" in failed(run)
    assert not RunFiles(run).dossier.exists()


@pytest.mark.parametrize("arguments", [(), ("run", "--verify", "x"), ("--verify", "x", "--output", "y")])
def test_one_thing_at_a_time_is_asked_for(arguments):
    assert "give a run's directory, or --verify" in failed(*arguments)


def test_what_is_no_dossier_and_no_run_is_said_so(tmp_path):
    assert "no such folder" in failed("--verify", tmp_path / "none")
    assert f"{tmp_path / CERTIFICATE}: missing" in failed("--verify", tmp_path)
    assert "lies in no run" in failed(tmp_path)


PLAN = PlanTerms(sampling_rate=0.02, max_grad_norm=1.0, noise_multiplier=0.9, rounds=2, steps_per_round=4, delta=1e-5)
CLIENTS = client_plan(noise_multiplier=2.0, rounds=2, num_clients=50)
NAME = "north/~1"


def written(folder, certificate, audit=None):
    """The dossier of a certificate, in a folder."""
    word = CoordinatorWord(
        run="study",
        task="classification",
        labels=("yes", "no"),
        train="lora",
        published=certificate["model"]["adapter"],
        rounds=(Traffic(round=1, ended="2026-11-30T09:00:00Z", answered=(NAME,), moved_bytes=12345),),
    )
    given = {CERTIFICATE: certificate, COORDINATOR: word.model_dump(mode="json"), **({AUDIT: audit} if audit else {})}
    folder.mkdir()
    for name, content in _written({name: _encoded(tree) for name, tree in given.items()}, "test").items():
        (folder / name).write_bytes(content)
    return folder


def test_a_study_and_its_audit_are_told_in_the_words_of_what_was_signed(tmp_path):
    ledger = Ledger.open(tmp_path / "north", NAME, "ward", Budget(20.0, 3e-5))
    mandate = signed(ledger.journal.signer, silo=NAME)
    north = stated(ledger, PLAN.bind(5000), mandate)
    ledger.close_file()
    audit = AuditSilo.open(tmp_path / "audit", PLAN.bind(5000), "audit-run-1", "cd" * 32)
    found = Finding("gradient_white_box", 2000, 250, 150, PLAN.epsilon, PLAN.delta, 0.9)
    audited = audit.certificate([found], earlier_audits=0)
    audit.close()
    made = written(
        tmp_path / "dossier", certificate("run-1", PLAN, {NAME: north}, model_of({NAME: "ab" * 32}, {})), audited
    )
    assert verify(made)["run"] == "study"
    texts = {one["text"]: one for one in sentences(made)}
    for one in texts.values():
        looked_up(made, one)
    purpose = f"{NAME} was asked in the name of the study {STUDY}, whose purpose is: {terms().purpose}."
    assert texts[purpose]["standing"] == f"signed by {NAME}"
    assert looked_up(made, texts[purpose]) == terms().purpose
    (agreed,) = (one for text, one in texts.items() if "may be given the model" in text)
    assert looked_up(made, agreed) == list(terms().recipients)
    (bound,) = (one for text, one in texts.items() if text.startswith("Attacks on canaries show"))
    assert bound["file"] == AUDIT
    assert "The task is classification with the labels yes, no." in texts
    assert json.loads((made / REGISTRY).read_bytes())["deployment"]["basic"]["intended_use"] == terms().purpose
    other = json.loads((made / AUDIT).read_bytes())
    shutil.rmtree(made)
    with pytest.raises(InputError, match="is of another plan"):
        written(made, certificate("run-1", CLIENTS, {AGGREGATOR: aggregated(tmp_path)}, model_of({}, {})), other)


def aggregated(folder):
    """What an aggregator's ledger signs of a run over clients."""
    ledger = Ledger.open(folder / "aggregator", AGGREGATOR, "members", Budget(40.0, 3e-5))
    ledger.reserve("run-1", CLIENTS.for_clients())
    receipt = ledger.close("run-1")
    statement = ledger.statement("run-1", {"torch": "2"}, attests_disjoint_units=False)
    ledger.close_file()
    signed_parts = {"receipt": receipt.model_dump(mode="json"), "statement": statement.model_dump(mode="json")}
    return {"dataset_id": "members", "public_key": receipt.public_key, "public_record_count": 50, **signed_parts}


def test_with_clients_as_units_the_aggregator_is_named_as_trusted(tmp_path):
    document = certificate("run-1", CLIENTS, {AGGREGATOR: aggregated(tmp_path)}, model_of({}, {}))
    made = written(tmp_path / "dossier", document)
    verify(made)
    texts = {one["text"]: one for one in sentences(made)}
    for one in texts.values():
        looked_up(made, one)
    assert any(text.startswith("The trust model: trusted is the aggregator") for text in texts)
    assert not any("has its noise already" in text for text in texts)
    assert "50 clients took part; the ledger is the aggregator's." in texts


def test_the_mandates_of_a_run_over_clients_are_told(tmp_path):
    of_ledger = aggregated(tmp_path)
    north = Ledger.open(tmp_path / "north", NAME, "ward", Budget(20.0, 3e-5))
    allowed = {"unit": "client", "budget_epsilon": 40.0, "coordinator": of_ledger["public_key"]}
    mandate = signed(north.journal.signer, terms(**allowed), silo=NAME)
    entrust(north.journal, "run-1", CLIENTS, of_ledger["public_key"], Limits(study=mandate.limit))
    receipt = north.receipt("run-1", of_ledger["public_key"])
    north.close_file()
    documents = {"mandate": mandate.model_dump(mode="json"), "receipt": receipt.model_dump(mode="json")}
    part = {"dataset_id": "ward", "public_key": receipt.public_key, **documents}
    document = certificate("run-1", CLIENTS, {AGGREGATOR: of_ledger}, model_of({}, {}), mandated={NAME: part})
    made = written(tmp_path / "dossier", document)
    verify(made)
    texts = {one["text"]: one for one in sentences(made)}
    for one in texts.values():
        looked_up(made, one)
    purpose = f"{NAME} was asked in the name of the study {STUDY}, whose purpose is: {terms().purpose}."
    assert texts[purpose]["standing"] == f"signed by {NAME}"
    assert any(text.startswith(f"{NAME} signed its receipt, mandate with key {receipt.public_key}") for text in texts)
    assert any(text.startswith(f"The third one, at {NAME}: its steward's mandate covers") for text in texts)
    assert json.loads((made / REGISTRY).read_bytes())["deployment"]["basic"]["intended_use"] == terms().purpose


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"published": {"a": "ab" * 32}}, "published: not the files of the certificate"),
        ({"rounds": "x"}, "rounds is 'x'"),
        ({"rounds": [{"round": 0}]}, "rounds.0.round is 0"),
        ({"more": 1}, "more: no such setting"),
        ({"task": "x" * 3000}, "task is "),
    ],
)
def test_a_coordinators_word_that_is_something_else_is_one_line(folder, changes, said):
    path = folder / COORDINATOR
    path.write_bytes(_encoded({**json.loads(path.read_bytes()), **changes}))
    sums_again(folder)
    message = failed("--verify", folder)
    assert said in message
    assert len(message) < 1000


def test_a_name_that_a_stranger_chose_is_text_on_the_page(folder):
    document = json.loads((folder / DOCUMENT).read_bytes())
    document["sections"][0]["sentences"][0]["text"] = "<script>\x1b[31m</script>"
    page = _page({**document, "run": "<b>"}, b"{}")
    assert "<script>" not in page
    assert "\x1b" not in page
    assert "&lt;b&gt;" in page


def test_the_folder_needs_nothing_from_elsewhere(sound):
    page = Path(sound / PAGE).read_text()
    assert "http" not in page
    assert "src=" not in page
