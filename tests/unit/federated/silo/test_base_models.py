"""Which base models a silo takes: one that was pretrained here, or one from elsewhere that its steward has listed."""

import json
import shutil

import pytest
from silo_requests import TRUSTED, ward

from configs.errors import InputError
from configs.storage.manifests import MANIFEST, Manifest, commit_manifest, read_manifest
from federated.silo.silo import Silo
from privacy.declaration import DECLARATION, Declaration, declaration_of, declare
from privacy.signing import Signer


@pytest.fixture
def declared(tiny_model, tmp_path):
    """A model from elsewhere, and its folder's manifest."""
    folder = shutil.copytree(tiny_model, tmp_path / "declared")
    before = read_manifest(folder, "model")
    facts = {"source": "hf:org/name@1", "revision": "1", "license": "mit"}
    files = {name: entry["sha256"] for name, entry in before.files.items()}
    document = declare({**facts, "files": files}, Signer(tmp_path / "key"))
    (folder / DECLARATION).write_bytes(document.encode())
    metadata = {**before.metadata, "trained_on": "declared public"}
    return folder, commit_manifest(folder, Manifest("model", before.config_digest, metadata=metadata))


def opened(folder, model, **policy):
    Silo(ward(folder, model, **policy), TRUSTED).close()


def test_somebodys_word_counts_where_the_steward_lists_the_model(declared, tmp_path):
    folder, manifest = declared
    with pytest.raises(InputError) as caught:
        opened(tmp_path, folder)
    key = declaration_of(folder, manifest).declared_public_by
    assert f'declared public by {key}; to accept that word, put base_models = ["{manifest.content_digest}"]' in str(
        caught.value
    )
    with pytest.raises(InputError, match="to accept that word"):
        opened(tmp_path, folder, base_models=["ab" * 32])
    assert not (tmp_path / "state").exists()
    opened(tmp_path, folder, base_models=[manifest.content_digest])


def test_a_model_that_only_says_so_itself_is_refused(declared, tmp_path):
    folder, manifest = declared
    (folder / DECLARATION).unlink()
    bare = commit_manifest(folder, Manifest("model", manifest.config_digest, metadata=manifest.metadata))
    with pytest.raises(InputError, match="does not say that it was trained on public text only"):
        opened(tmp_path, folder, base_models=[bare.content_digest])


def rewritten(folder, manifest, document):
    (folder / DECLARATION).write_bytes(document)
    return commit_manifest(folder, Manifest("model", manifest.config_digest, metadata=manifest.metadata))


@pytest.mark.parametrize("field", ["source", "license", "revision", "declared_public_by", "signature", "files"])
def test_an_edited_declaration_does_not_hold_even_where_it_is_listed(declared, tmp_path, field):
    folder, manifest = declared
    document = json.loads((folder / DECLARATION).read_bytes())
    other = {"declared_public_by": "cd" * 32, "signature": "00" * 64, "files": {**document["files"], "x": "ab" * 32}}
    edited = rewritten(folder, manifest, json.dumps({**document, field: other.get(field, "another")}).encode())
    with pytest.raises(InputError, match="import the model again"):
        opened(tmp_path, folder, base_models=[edited.content_digest])


@pytest.mark.parametrize("document", [b"{", b"[]", b'{"version": 2}', b"\xff", b'{"a": 1, "a": 2}'])
def test_a_file_that_is_no_declaration_is_named(declared, tmp_path, document):
    folder, manifest = declared
    edited = rewritten(folder, manifest, document)
    with pytest.raises(InputError, match=DECLARATION):
        opened(tmp_path, folder, base_models=[edited.content_digest])


def test_weights_that_were_swapped_under_a_declaration_are_noticed(declared, tmp_path):
    folder, manifest = declared
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x01")
    swapped = commit_manifest(folder, Manifest("model", manifest.config_digest, metadata=manifest.metadata))
    with pytest.raises(InputError, match="is not the file that was declared"):
        opened(tmp_path, folder, base_models=[swapped.content_digest])
    assert (folder / MANIFEST).exists()


def test_a_declaration_reads_as_it_was_written(declared):
    folder, manifest = declared
    found = declaration_of(folder, manifest)
    assert Declaration.model_validate_json(found.encode()) == found
    assert declaration_of(folder, Manifest("model", "")) is None
