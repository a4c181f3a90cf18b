"""Which prompts a run's page has, and what a model answers to one; a prompt that can't be answered ends nothing."""

import json
import shutil
from types import SimpleNamespace

import pytest
from model_parts import model_of
from served_models import a_labelling_run, a_model
from shown_pages import PLAN
from taught_models import CONTEXT, a_taught_federation, a_taught_model

from cluster.serving.models import find
from cluster.showing import _answer, _explained, _federations, _privacy, _prompts, _write
from configs.errors import InputError, SiloweaveError
from configs.load import load
from configs.storage.files import digest_bytes
from configs.storage.layout import CERTIFICATE, RunFiles
from configs.storage.manifests import Manifest, commit_manifest, require_manifest
from privacy.certificate.certificate import certificate
from privacy.certificate.model_digests import published_digests
from privacy.ledger.chain import Budget
from privacy.ledger.ledger import Ledger
from trainer.data.tokenizer import load_tokenizer
from trainer.inference.decoding import Decoding
from trainer.models.load import load_model
from trainer.tasks.task import task_of


def run_of(*overrides):
    return SimpleNamespace(config=load("tiny", overrides))


def task(name, head=None):
    return SimpleNamespace(name=name, head=head)


def test_prompts_are_the_settings_own_and_no_text_is_labelled_that_nobody_gave():
    assert _prompts(run_of(), task("causal")) == ["What is"]
    assert _prompts(run_of('evaluate.prompts=["a", " ", "b", "a"]'), task("causal")) == ["a", "b"]
    assert _prompts(run_of(), task("classification", head=1)) == []
    assert _prompts(run_of('evaluate.prompts=["a"]'), task("classification", head=1)) == ["a"]
    assert _prompts(run_of('evaluate.prompts=["a"]'), task("qa", head=1)) == []


@pytest.fixture(scope="module")
def writer(tmp_path_factory):
    folder = a_taught_model(tmp_path_factory.mktemp("model"))
    return task_of(load("tiny").federated.task_spec, folder), load_tokenizer(folder), load_model(folder).eval()


def test_a_model_goes_on_from_a_prompt_and_says_why(writer):
    said = _answer(*writer, "old:", Decoding(CONTEXT))
    assert said.split()
    explained, missing = _explained(*writer, ["old: ship"])
    assert [one["text"] for one in explained] == ["old: ship"]
    assert missing == ""


def test_a_prompt_that_does_not_fit_is_said_and_ends_nothing(writer):
    assert _answer(*writer, "ship " * 100, Decoding(4)).startswith("(the prompt has ")
    explained, missing = _explained(*writer, [""])
    assert (explained, missing) == ([], "the text is empty; give one")


def test_a_text_is_labelled(tmp_path):
    run, model, spec = a_labelling_run(tmp_path / "run", a_model(tmp_path / "model"), "classification", ("bad", "good"))
    labelling = task_of(spec, run / "model")
    said = _answer(labelling, load_tokenizer(run / "model"), model, "the old ship", Decoding(4))
    assert said in ("bad", "good")


def certified(run, folder, **changes):
    """A certificate of what the run's federation has published, from a real ledger."""
    ledger = Ledger.open(folder / "north", "north", "ward", Budget(20.0, 3e-5))
    ledger.reserve("run-1", PLAN)
    for number in range(1, PLAN.terms.rounds + 1):
        charge = ledger.charge("run-1", f"round-{number}", "aa" * 32, number)
        ledger.release(charge.number, "run-1", b"reply")
    part = {"dataset_id": "ward", "public_key": ledger.public_key, "public_record_count": PLAN.public_record_count}
    part["receipt"] = ledger.close("run-1").model_dump(mode="json")
    part["statement"] = ledger.statement("run-1", {}, attests_disjoint_units=True).model_dump(mode="json")
    ledger.close_file()
    (shared,) = (path for path in (run / "federated").iterdir() if path.is_dir())
    base = require_manifest(run / "model", "model", "export").content_digest
    made = model_of(*[{"north": digest_bytes(b"reply")}] * PLAN.terms.rounds)
    made = made.model_copy(update={"base_model": base, "adapter": published_digests(shared), **changes})
    document = certificate("run-1", PLAN.terms, {"north": part}, made)
    (run / "federated" / CERTIFICATE).write_text(json.dumps(document))
    return base


def test_the_page_says_of_privacy_what_whoever_serves_the_model_says(tmp_path):
    run = a_taught_federation(tmp_path / "run", a_taught_model(tmp_path / "model"))
    base = certified(run, tmp_path, continues="cd" * 32)
    said = _privacy(load("tiny"), run / "federated", base)
    assert ", on top of what an earlier run spent; certificate " in said["line"]
    assert said == {**find(str(run), None).claim.document(), "model": "federated/adapter"}
    weights = run / "federated" / "adapter" / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match="this is another model"):
        _privacy(load("tiny"), run / "federated", base)


def test_a_whole_model_is_named_where_it_lies(tmp_path):
    run = a_taught_federation(tmp_path / "run", a_taught_model(tmp_path / "model"))
    shutil.rmtree(run / "federated" / "adapter")
    shutil.copytree(run / "model", run / "federated" / "model", ignore=shutil.ignore_patterns("manifest.json"))
    base = certified(run, tmp_path)
    said = _privacy(load("tiny", ['federated.train="full"']), run / "federated", base)
    assert said["model"] == "federated/model"
    assert "earlier" not in said["line"]


def test_a_run_without_dp_is_shown_only_where_it_is_asked_for_now(tmp_path):
    files = RunFiles(tmp_path)
    for folder in (files.federated, files.no_dp):
        commit_manifest(folder, Manifest(folder.name, "made-up"))

    def names(asked):
        config = load("tiny", [f"evaluate.without_dp={asked}"])
        return [name for name, _ in _federations(SimpleNamespace(config=config, files=files))]

    assert (names("true"), names("false")) == (["dp", "no_dp"], ["dp"])
    (files.federated / "manifest.json").unlink()
    assert names("true") == ["no_dp"]


def test_the_page_is_there_before_what_leads_to_it(tmp_path):
    files = RunFiles(tmp_path)
    files.showcase.mkdir()
    document = {"name": "n", "prompts": [], "answers": {}, "privacy": {"line": ""}, "explanations": [], "missing": ""}
    with pytest.raises(SiloweaveError, match=r"showcase\.json"):
        _write(files, document)
    assert files.showcase_page.is_file()
