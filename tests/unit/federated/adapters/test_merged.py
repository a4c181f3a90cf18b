"""A merged model: base plus adapter in the same weights, which loads without our code; written whole or not at all."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from configs.errors import InputError
from configs.storage.layout import CERTIFICATE
from configs.storage.manifests import MANIFEST, commit_manifest, read_manifest
from configs.storage.sealing import ENVIRONMENT, MasterKey, is_sealed, write_sealed
from federated.adapters.merged import merge
from privacy.certificate.model_digests import ADAPTER_FILES

KEY = MasterKey(bytes(range(32)), "the test")
LOGITS = """
import sys
import numpy as np, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, merged, target = sys.argv[1:]
ids = AutoTokenizer.from_pretrained(merged)("The merged model says", return_tensors="pt").input_ids
plain = AutoModelForCausalLM.from_pretrained(base)
with torch.no_grad():
    before = plain(ids).logits.numpy()
    both = PeftModel.from_pretrained(plain, adapter).eval()(ids).logits.numpy()
    one = AutoModelForCausalLM.from_pretrained(merged).eval()(ids).logits.numpy()
assert not [name for name in sys.modules if name.split(".")[0] in ("trainer", "federated", "configs", "siloweave")]
np.savez(target, before=before, both=both, one=one)
"""


@pytest.fixture
def run(tiny_run, tmp_path):
    """A finished run of one's own to merge, and to damage."""
    for name in ("model", "federated"):
        shutil.copytree(tiny_run.directory / name, tmp_path / "run" / name)
    return tmp_path / "run"


def test_plain_peft_and_plain_transformers_say_the_same(run, siloweave, tmp_path):
    done = siloweave("merge", str(run), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    merged, said = run / "merged", json.loads(done.stdout)
    script = [sys.executable, "-c", LOGITS, str(run / "model"), str(run / "federated" / "adapter"), str(merged)]
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run([*script, str(tmp_path / "logits.npz")], env=bare, cwd=tmp_path, check=True, timeout=120)
    found = np.load(tmp_path / "logits.npz")
    largest = np.abs(found["both"]).max()
    assert np.abs(found["one"] - found["both"]).max() < 1e-5 * largest
    assert np.abs(found["both"] - found["before"]).max() > 1e-2 * largest  # the adapter says something
    certificate = json.loads((run / "federated" / CERTIFICATE).read_text())["model"]
    files = {f"adapter/{name}": digest for name, digest in certificate["adapter"].items()}
    manifest = read_manifest(merged, "merged")
    assert manifest.inputs == {"model": certificate["base_model"], **files} == said["inputs"]
    assert (merged / CERTIFICATE).read_bytes() == (run / "federated" / CERTIFICATE).read_bytes()
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", CERTIFICATE} <= set(manifest.files)
    again = siloweave("merge", str(run / "federated" / "adapter"), cwd=tmp_path)
    assert (again.returncode, f"{merged}: exists; give a path where nothing is yet" in again.stderr) == (2, True)


def refused(run, message, **given):
    before = sorted(run.rglob("*"))
    with pytest.raises(InputError, match=message) as caught:
        merge(given.get("place", run), given.get("output"), given.get("key"))
    assert "\n" not in str(caught.value)
    assert sorted(run.rglob("*")) == before


def recommit(folder, kind, **changes):
    manifest = replace(read_manifest(folder, kind), **changes)
    return commit_manifest(folder, manifest)


def test_an_adapter_of_another_base_is_refused_by_both_digests(run):
    (run / "model" / "LICENSE").write_text("another model")
    other = recommit(run / "model", "model")
    refused(run, rf"federated/adapter: is of the base model \w{{16}}…, and .*model is {other.content_digest[:16]}…")


def test_what_is_not_finished_or_damaged_is_refused(run, tmp_path):
    weights = run / "federated" / "adapter" / ADAPTER_FILES[1]
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    refused(run, f"{ADAPTER_FILES[1]}: its digest is not the manifest's")
    weights.write_bytes(whole)
    (run / "federated" / MANIFEST).unlink()
    refused(run, "no finished federated here; run `siloweave federate` first")
    refused(run, "no finished federated here", place=run / "federated" / "adapter")
    refused(run, "no finished federated here", place=tmp_path / "nothing")


def test_a_whole_model_needs_no_merge(run):
    (run / "federated" / "adapter").rename(run / "federated" / "model")
    recommit(run / "federated", "federated")
    refused(run, "federated/model: the whole model was trained, so nothing has to be merged")


def sealed(run):
    """The same run as one that was encrypted from its start."""
    owner = read_manifest(run / "model", "model").config_digest
    for path, context in (
        (run / "model" / "model.safetensors", f"{owner}/model/model.safetensors"),
        (run / "federated" / "adapter" / ADAPTER_FILES[1], f"federated/adapter/{ADAPTER_FILES[1]}"),
    ):
        write_sealed(path, path.read_bytes(), KEY, context)
    base = recommit(run / "model", "model")
    recommit(run / "federated", "federated", inputs={"model": base.content_digest})


def test_an_encrypted_run_needs_its_key_and_stays_encrypted(run, tmp_path):
    clear, _ = merge(run, tmp_path / "clear", None)
    sealed(run)
    refused(run, f"{ADAPTER_FILES[1]}: is encrypted; set run.encryption_key_file, or {ENVIRONMENT}, to its key")
    refused(run, "was encrypted with another key", key=MasterKey(bytes(reversed(range(32))), "another"))
    target, manifest = merge(run, None, KEY)
    assert is_sealed(target / "model.safetensors")
    digests = json.loads((run / "federated" / CERTIFICATE).read_text())["model"]["adapter"]
    assert {name: manifest.inputs[f"adapter/{name}"] for name in ADAPTER_FILES} == digests
    assert (target / "config.json").read_bytes() == (clear / "config.json").read_bytes()
