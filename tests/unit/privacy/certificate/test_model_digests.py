"""Whether a folder is the model of a certificate: byte for byte, sealed or not, and said in one line where it isn't."""

import json
import os
import subprocess
import sys

import pytest

from configs.errors import InputError
from configs.parse import parse
from configs.storage.manifests import Manifest, commit_manifest, read_manifest
from configs.storage.sealing import load_key, write_sealed
from privacy.certificate.model_digests import (
    ADAPTER,
    ADAPTER_FILES,
    BASE_MODEL,
    ModelDigests,
    RoundDigests,
    published_digests,
    which_model,
)
from privacy.declaration import DECLARATION, declare
from privacy.signing import Signer


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / ADAPTER_FILES[0]).write_text(json.dumps({"r": 4, "lora_alpha": 8}))
    (folder / ADAPTER_FILES[1]).write_bytes(b"weights")
    (folder / "README.md").write_text("for people")
    return folder


@pytest.fixture
def base(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"base weights")
    commit_manifest(folder, Manifest("model", ""))
    return folder


@pytest.fixture
def digests(adapter, base):
    content = commit_manifest(base, Manifest("model", "")).content_digest
    return ModelDigests(base_model=content, rounds=(), adapter=published_digests(adapter))


def test_the_published_adapter_and_the_base_model_are_known(digests, adapter, base):
    assert which_model(digests, adapter, None) == ADAPTER
    assert which_model(digests, base, None) == BASE_MODEL
    (adapter / "README.md").write_text("other words")
    assert which_model(digests, adapter, None) == ADAPTER


def test_a_base_model_from_elsewhere_is_declared_by_whom_the_certificate_says(adapter, base, tmp_path):
    signer = Signer(tmp_path / "key")
    files = {name: entry["sha256"] for name, entry in read_manifest(base, "model").files.items()}
    (base / DECLARATION).write_bytes(
        declare({"source": "hf:a/b@1", "revision": "1", "license": "mit", "files": files}, signer).encode()
    )
    content = commit_manifest(base, Manifest("model", "")).content_digest
    claims = {"base_model": content, "rounds": (), "adapter": published_digests(adapter)}
    said = ModelDigests(**claims, declared_public_by=signer.public_key)
    assert which_model(said, base, None) == BASE_MODEL
    for other in (ModelDigests(**claims), ModelDigests(**claims, declared_public_by="ab" * 32)):
        with pytest.raises(InputError, match=f"declared public by {signer.public_key}, and the certificate says by"):
            which_model(other, base, None)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (ADAPTER_FILES[1], b"weightt"),
        (ADAPTER_FILES[0], b'{"r": 4, "lora_alpha": 800}'),  # the same weights on another scale are another model
    ],
)
def test_another_adapter_is_said_to_be_one(digests, adapter, name, content):
    (adapter / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: its digest is \w{{16}}…, .* has \w{{16}}…: this is another model"):
        which_model(digests, adapter, None)


def test_a_folder_that_is_not_whole_is_said_to_be_so(digests, adapter, base, tmp_path):
    (adapter / ADAPTER_FILES[1]).unlink()
    with pytest.raises(InputError, match=r"adapter_model.safetensors: no such file"):
        which_model(digests, adapter, None)
    (base / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(InputError, match=r"model.safetensors is not what its manifest says: this is another model"):
        which_model(digests, base, None)
    commit_manifest(base, Manifest("model", ""))
    with pytest.raises(InputError, match="base model has"):
        which_model(digests, base, None)
    for folder in (tmp_path / "nothing", tmp_path):
        with pytest.raises(InputError, match=r"neither an adapter .* nor a base model"):
            which_model(digests, folder, None)


def test_a_file_more_makes_another_model(digests, adapter, base):
    """transformers reads generation_config.json where there is one."""
    for folder in (adapter, base):
        (folder / "generation_config.json").write_text("{}")
        with pytest.raises(InputError, match=r"generation_config.json: no file of the certificate's model"):
            which_model(digests, folder, None)


def test_what_is_no_plain_file_is_not_read(digests, adapter):
    """A FIFO would be waited for for ever, and /dev/zero read until memory is gone."""
    path = adapter / ADAPTER_FILES[1]
    path.unlink()
    for make in (os.mkfifo, lambda place: place.symlink_to("/dev/zero")):
        make(path)
        with pytest.raises(InputError, match="not a plain one"):
            which_model(digests, adapter, None)
        path.unlink()


@pytest.mark.parametrize(
    "names", [[], ADAPTER_FILES[:1], [*ADAPTER_FILES, "/etc/hostname"], ["a\0b", ADAPTER_FILES[0]]]
)
def test_a_certificate_has_digests_of_the_adapters_two_files_and_of_nothing_else(names):
    """With none of them every folder was the certificate's final adapter."""
    with pytest.raises(InputError, match=r"adapter.*adapter_config.json and adapter_model.safetensors"):
        parse(ModelDigests, {"base_model": "aa" * 32, "rounds": [], "adapter": dict.fromkeys(names, "bb" * 32)}, "c")


WHOLE = {"config.json": "aa" * 32, "model.safetensors": "bb" * 32, "tokenizer.json": "cc" * 32}


@pytest.mark.parametrize(
    "more", ["../model", "a/b", ".hidden", "README.md", "manifest.json", ADAPTER_FILES[0], "a\nb", "x" * 101]
)
def test_a_whole_models_files_have_plain_names(more):
    """They are a stranger's words, and are looked for in a folder."""
    claims = {"base_model": "aa" * 32, "rounds": []}
    assert parse(ModelDigests, {**claims, "adapter": WHOLE}, "c").adapter == WHOLE
    for names in ({**WHOLE, more: "dd" * 32}, {name: WHOLE[name] for name in ("config.json", "tokenizer.json")}):
        with pytest.raises(InputError, match=r"plain names of a whole model's files, config.json and model.safeten"):
            parse(ModelDigests, {**claims, "adapter": names}, "c")


@pytest.mark.parametrize(
    "change",
    [{"files": []}, {"files": {"a": 3}}, {"files": {"a": {"sha256": "00"}}}, {"version": "1"}, {"metadata": 1}],
)
def test_a_manifest_of_other_types_is_one_line(digests, base, change):
    manifest = json.loads((base / "manifest.json").read_text())
    (base / "manifest.json").write_text(json.dumps({**manifest, **change}))
    with pytest.raises(InputError, match="not a readable manifest"):
        which_model(digests, base, None)


def test_a_sealed_adapter_is_known_by_what_is_in_it(digests, adapter, tmp_path):
    path = tmp_path / "key"
    path.write_bytes(bytes(range(7, 39)))
    path.chmod(0o600)
    key = load_key(str(path))
    write_sealed(adapter / ADAPTER_FILES[1], b"weights", key, "federated/adapter/adapter_model.safetensors")
    assert which_model(digests, adapter, key) == ADAPTER
    with pytest.raises(InputError, match="is encrypted"):
        which_model(digests, adapter, None)


SAVES = """
import sys
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
from privacy.certificate.model_digests import published_digests
from trainer.models.adapters import add_adapter

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
add_adapter(LlamaForCausalLM(LlamaConfig(**sizes)), 4, 8.0, 0).save_pretrained(sys.argv[1], save_embedding_layers=False)
print(published_digests(Path(sys.argv[1])))
"""


def test_an_adapter_that_is_saved_again_has_the_same_digests(tmp_path):
    """Before: peft wrote its target modules as a set has them, in an order of each process's own."""
    found = [
        subprocess.run(
            [sys.executable, "-c", SAVES, str(tmp_path / seed)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            timeout=120,
        ).stdout
        for seed in ("1", "2")
    ]
    assert found[0] == found[1] != ""


def update(silo, number, version, weight=1.0):
    return {"silo": silo, "round": number, "version": version, "weight": weight, "digest": "ab" * 32}


def of_steps(*steps):
    """A model whose server steps are made of these updates."""
    rounds = [{"adapter": "cd" * 32, "releases": {}, "updates": list(found)} for found in steps]
    return {"base_model": "ef" * 32, "rounds": rounds, "adapter": dict.fromkeys(ADAPTER_FILES, "aa" * 32)}


def test_updates_of_buffered_rounds_count_by_the_round_that_their_ledger_has_charged():
    model = ModelDigests.model_validate(of_steps([update("a", 1, 0), update("b", 1, 0)], [update("a", 2, 0, 0.5)]))
    assert model.rounds_of("a") == {1: "ab" * 32, 2: "ab" * 32}
    assert model.contributors() == {"a", "b"}
    assert [dict(one.counts) for one in model.rounds] == [{"a": 1, "b": 1}, {"a": 1}]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (([update("a", 1, 0)], [update("a", 1, 1)]), "round 1 of 'a' went into the model twice"),
        (([update("a", 1, 0), update("a", 1, 0)],), "round 1 of 'a' went into the model twice"),
        (([update("a", 1, 1)],), "step 1 has an update of a model that comes after it"),
        (([update("a", 1, 0, 1.5)],), "less than or equal to 1"),
        (([update("a", 1, 0, 0.0)],), "greater than 0"),
        (([update("a", 0, 0)],), "greater than or equal to 1"),
    ],
)
def test_updates_that_no_buffered_rounds_make_are_refused(steps, message):
    with pytest.raises(InputError, match=message):
        parse(ModelDigests, of_steps(*steps), "test")


def test_rounds_without_updates_are_written_as_before():
    """Certificates of before have no such field, and checking one makes it again."""
    one = RoundDigests(adapter="cd" * 32, releases={"a": "ab" * 32})
    assert one.model_dump(mode="json") == {"adapter": "cd" * 32, "releases": {"a": "ab" * 32}}
    with pytest.raises(InputError, match="it has either"):
        parse(RoundDigests, {**one.model_dump(), "updates": [update("a", 1, 0)]}, "test")
