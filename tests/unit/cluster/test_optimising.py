"""From a finished run to a smaller model beside it: the digests that lead back, the figures, and what is refused."""

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from repository import REPOSITORY
from served_models import a_federation, a_model
from transformers import AutoModelForCausalLM

from cluster.commands.optimise import _table
from cluster.finished import finished_model
from cluster.optimising import OPTIMISATION, Order, optimise, refuse_existing
from cluster.serving.models import find
from configs.errors import InputError
from configs.storage.files import digest_file
from configs.storage.layout import CERTIFICATE
from configs.storage.manifests import MANIFEST, Manifest, commit_manifest, require_manifest
from configs.storage.sealing import is_sealed
from federated.adapters.merged import merge
from trainer.data.packing import train_tokens


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    a_federation(folder, a_model(tmp_path_factory.mktemp("base") / "model"), 1)
    text = (REPOSITORY / "configs" / "tiny.toml").read_text()
    (folder / "config.toml").write_text(
        text.replace("public = true\n", "public = false\n").replace("without_dp = true", "without_dp = false")
    )
    merge(folder, None, None)
    return folder


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    path = tmp_path_factory.mktemp("records") / "records.jsonl"
    path.write_text("".join(json.dumps({"text": f"the old ship sails to island {n}"}) + "\n" for n in range(9)))
    return path


@pytest.mark.parametrize("method", ["prune", "neurons", "heads"])
def test_a_smaller_model_leads_back_to_its_run(method, run, records):
    output = run / f"smaller-{method}"
    found = finished_model(run / "merged")
    done, manifest = optimise(found, Order(method, 0.5), output, records)
    merged = require_manifest(run / "merged", "merged", "merge")
    assert manifest.inputs == {**merged.inputs, "merged": merged.content_digest}
    assert manifest.inputs["model"] == require_manifest(run / "model", "model", "export").content_digest
    written = json.loads((output / OPTIMISATION).read_text())
    assert (written["method"], written["records"], written["read"]) == (method, 9, "the file")
    assert written["before"]["bits_per_char"] != written["after"]["bits_per_char"]
    assert all(written[when]["seconds_a_batch"] > 0 for when in ("before", "after"))
    smaller = written["after"]["bytes"] < written["before"]["bytes"]
    assert (smaller, written["after"]["zeros"] > 0.1) == (method != "prune", method == "prune")
    assert _table(done).row_count == len(written["before"])

    again = finished_model(output)
    ids = torch.arange(3, 19).view(2, 8)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(output).eval()(ids).logits
        assert torch.allclose(again.model(ids).logits, plain, atol=1e-3)
        assert not torch.allclose(found.model(ids).logits, plain, atol=1e-2)
    assert find(str(output), None).manifest.content_digest == manifest.content_digest
    twice, last = optimise(again, Order("prune", 0.9), run / f"twice-{method}", records)
    assert last.inputs["merged"] == manifest.content_digest
    assert last.inputs.items() >= {(name, merged.inputs[name]) for name in merged.inputs}
    assert twice.before["bits_per_char"] == pytest.approx(done.after["bits_per_char"])


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_a_quantised_model_answers_the_same_once_it_is_loaded(method, run, records):
    output = run / f"quantised-{method}"
    done, manifest = optimise(finished_model(run / "merged"), Order(method), output, records)
    assert done.after["bytes"] < done.before["bytes"]
    ids = torch.arange(3, 19).view(2, 8)
    again = finished_model(output)
    with torch.no_grad():
        same = again.model.config._attn_implementation
        plain = AutoModelForCausalLM.from_pretrained(output, attn_implementation=same).eval()(ids).logits
        assert torch.equal(again.model(ids).logits, plain)
    assert find(str(output), None).manifest.content_digest == manifest.content_digest
    with pytest.raises(InputError, match="its weights are quantised already"):
        optimise(again, Order("prune"), run / "never", None)


@pytest.fixture
def secretive(tmp_path):
    """A run with a public corpus, whose silos' records lie in a file that nobody may read."""
    base = a_model(tmp_path / "base")
    run = tmp_path / "run"
    (run / "corpus").mkdir(parents=True)
    tokens = np.random.default_rng(0).integers(1, 250, 4096).astype(np.uint16)
    tokens.tofile(run / "corpus" / train_tokens("public"))
    corpus = commit_manifest(run / "corpus", Manifest("corpus", "made-up"))
    (base / MANIFEST).unlink()
    metadata = {"context_length": 64}
    commit_manifest(base, Manifest("model", "made-up", inputs={"corpus": corpus.content_digest}, metadata=metadata))
    a_federation(run, base, 1)
    private = tmp_path / "private.jsonl"
    private.write_text('{"text": "a secret"}\n')
    text = (REPOSITORY / "configs" / "tiny.toml").read_text().replace("embedded:plays", str(private))
    text = text.replace("public = true\n", "public = false\n").replace("without_dp = true", "without_dp = false")
    (run / "config.toml").write_text(text)
    merge(run, None, None)
    return run, private, corpus


def test_a_student_learns_from_public_text_and_opens_no_private_record(secretive):
    run, private, corpus = secretive
    opened, watching = [], [True]
    sys.addaudithook(lambda event, args: opened.append(str(args[0])) if watching and event == "open" else None)
    done, manifest = optimise(finished_model(run / "merged"), Order("distil", steps=3), run / "student", None)
    watching.clear()
    assert any(str(run / "corpus") in path for path in opened), "it looks where files are opened"
    assert not [path for path in opened if str(private) in path]
    assert (done.share, done.steps, done.records) == (0.5, 3, 0)
    assert done.after["bytes"] < done.before["bytes"]
    assert manifest.inputs["corpus"] == corpus.content_digest
    again = finished_model(run / "student")
    assert again.model.config.num_hidden_layers == 1
    with torch.no_grad():
        assert again.model(torch.arange(3, 19).view(2, 8)).logits.isfinite().all()


def test_without_records_that_may_be_read_there_are_no_figures(run):
    done, _ = optimise(finished_model(run / "merged"), Order("prune", 0.1), run / "no-figures", None)
    assert (done.read, done.records, list(done.before)) == ("", 0, ["bytes", "zeros", "seconds_a_batch"])


def test_a_merged_models_certificate_comes_along(run, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    merged, manifest = merge(copied, copied / "again", None)
    found = finished_model(merged)
    (merged / CERTIFICATE).write_text('{"a": 1}')
    _, made = optimise(found, Order("prune"), copied / "smaller", None)
    assert (
        made.inputs["certificate"] == digest_file(merged / CERTIFICATE) == digest_file(copied / "smaller" / CERTIFICATE)
    )
    assert made.inputs.items() >= {("merged", manifest.content_digest), *manifest.inputs.items()}


def test_an_encrypted_runs_model_stays_encrypted(run, tmp_path):
    (tmp_path / "key").write_bytes(bytes(range(32)))
    (tmp_path / "key").chmod(0o600)
    found = finished_model(run / "merged")
    settings = found.config.run.model_copy(update={"encryption_key_file": str(tmp_path / "key")})
    sealed = SimpleNamespace(
        **{**vars(found), "config": found.config.model_copy(update={"run": settings}), "digest": found.digest}
    )
    optimise(sealed, Order("prune"), tmp_path / "out", None)
    assert is_sealed(tmp_path / "out" / "model.safetensors")


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (
            ("int2",),
            "--method 'int2': there is none of that name; give one of prune, neurons, heads, int8, int4, distil",
        ),
        (("prune", 0.0), "--share 0.0: give a share between 0 and 1"),
        (("prune", 1.0), "--share 1.0: give a share"),
        (("distil", float("nan")), "--share nan: give a share"),
        (("int8", 0.5), "--share 0.5: --method int8 takes all weights; leave it out"),
        (("heads", 0.5, 10), "--steps 10: --method heads trains nothing; leave it out"),
        (("distil", 0.5, 1), "--steps 1: give 2 or more"),
    ],
)
def test_what_cannot_be_done_is_refused(order, message):
    with pytest.raises(InputError, match=message) as refused:
        Order(*order)
    assert "\n" not in str(refused.value)


def test_nothing_is_written_over(tmp_path):
    with pytest.raises(InputError, match="exists; give a path where nothing is yet"):
        refuse_existing(tmp_path)


def test_bad_records_leave_nothing_behind(run, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"words": "a"}\n')
    for records, message in ((tmp_path / "none.jsonl", "no such file"), (tmp_path / "bad.jsonl", "text")):
        with pytest.raises(InputError, match=message):
            optimise(finished_model(run / "merged"), Order("prune"), tmp_path / "out", records)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]
