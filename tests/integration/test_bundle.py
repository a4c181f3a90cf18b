"""A bundle by what the session's wheel has installed: what install.sh refuses, and what it installs."""

import hashlib
import json
import shutil
import subprocess
from pathlib import Path
from urllib.parse import urljoin

import jsonschema
import pytest
from referencing import Registry, Resource

from configs.schema.deployment import FederationConfig
from federated.deployment.federation_folder import FederationFolder
from federated.identity.cards import fingerprint
from federated.identity.trust import coordinator_signer

# Siloweave's whole environment takes a minute to pack; benchmarks/bundle.py does that.
MAKE = """
import sys
from pathlib import Path
from federated.bundle.bundle import make_bundle
from federated.bundle.packages import required
from federated.deployment.federation_folder import FederationFolder
from importlib.metadata import distribution

packages = [distribution("siloweave"), *required("shellingham"), *required("six")]
make_bundle(FederationFolder(Path(sys.argv[1])), Path(sys.argv[2]), Path(sys.argv[3]), packages)
"""


def federation_at(folder):
    config = FederationConfig(name="net", hosts=("127.0.0.1",), port=9092, listen="127.0.0.1")
    return FederationFolder.create(folder, config)


@pytest.fixture(scope="module")
def bundle(tiny_run, tmp_path_factory):
    """The folder, and the fingerprint that its coordinator reads out."""
    root = tmp_path_factory.mktemp("bundle")
    federation = federation_at(root / "federation")
    model = shutil.copytree(tiny_run.model, root / "model")
    (model / "notes.txt").write_text("is no part of the model")
    (model / "elsewhere").symlink_to(root / "federation")
    command = [tiny_run.programs / "python", "-P", "-c", MAKE, root / "federation", model, root / "bundle"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return root / "bundle", fingerprint(federation.card)


@pytest.fixture
def copied(bundle, tmp_path):
    return shutil.copytree(bundle[0], tmp_path / "bundle"), bundle[1]


def install(folder, *arguments):
    command = ["sh", str(folder / "install.sh"), *map(str, arguments)]
    return subprocess.run(command, cwd=folder.parent, capture_output=True, text=True, timeout=300, check=False)


def refused(folder, *arguments):
    done = install(folder, *arguments)
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    return line.removeprefix("error: ")


def test_what_was_signed_is_installed_from_the_folder_alone(bundle, tmp_path):
    folder, code = bundle
    assert "files are as the coordinator" in install(folder, code).stdout
    done = install(folder, code.replace("-", "").upper(), tmp_path / "site")
    assert done.returncode == 0, done.stderr
    # Siloweave's own dependencies are not in this small bundle, so that it can't be started.
    pip = [tmp_path / "site" / "bin" / "python", "-m", "pip", "list", "--format=freeze"]
    listed = subprocess.run(pip, capture_output=True, text=True, check=True).stdout
    assert {"siloweave", "shellingham", "six"} <= {line.split("==")[0] for line in listed.split()}
    assert (
        refused(folder, code, tmp_path / "site") == f"{tmp_path / 'site'}: is there already; give a folder that is not"
    )


def test_it_holds_model_units_documents_and_a_valid_bill_of_materials(bundle, tiny_run):
    folder, _ = bundle
    same = {path.name: path.read_bytes() for path in tiny_run.model.iterdir() if path.is_file()}
    assert {path.name: path.read_bytes() for path in (folder / "model").iterdir() if path.is_file()} == same
    assert (folder / "deploy" / "siloweave-silo.service").is_file()
    assert "Deployment" in (folder / "docs" / "deployment.md").read_text()
    bill = json.loads((folder / "sbom.cdx.json").read_text())
    assert validated(bill) == []
    wheels = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "wheels").iterdir()}
    parts = [bill["metadata"]["component"], *bill["components"]]
    assert {part["hashes"][0]["content"] for part in parts if part["type"] != "machine-learning-model"} == wheels
    assert {part["name"] for part in parts} == {"siloweave", "shellingham", "six", "base model"}


def validated(bill):
    """What the published schema, which comes with the library, finds wrong."""
    import cyclonedx.schema

    folder = Path(cyclonedx.schema.__file__).parent / "_res"
    schemas = {path.name: json.loads(path.read_text()) for path in folder.glob("*.schema.json")}
    bom = schemas["bom-1.6.SNAPSHOT.schema.json"]
    each = [(urljoin(bom["$id"], name), Resource.from_contents(schema)) for name, schema in schemas.items()]
    validator = jsonschema.Draft7Validator(bom, registry=Registry().with_resources(each))
    return [error.message for error in validator.iter_errors(bill)]


@pytest.mark.parametrize(
    "part", ["docs/index.md", "install.sh", "requirements.txt", "sbom.cdx.json", "wheels", "model"]
)
def test_a_flipped_byte_is_named(copied, part):
    folder, code = copied
    path = folder / part if "." in part else sorted((folder / part).iterdir())[0]
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    assert refused(folder, code, folder / "site").startswith(f"{path.relative_to(folder)}: not as it was signed")
    assert not (folder / "site").exists()


@pytest.mark.parametrize("part", ["SHA256SUMS", "SHA256SUMS.sig"])
def test_a_flipped_byte_of_what_is_signed_or_of_the_signature(copied, part):
    folder, code = copied
    content = bytearray((folder / part).read_bytes())
    content[30] ^= 1
    (folder / part).write_bytes(content)
    assert refused(folder, code).startswith("SHA256SUMS: not signed by this coordinator")


def test_what_another_has_signed_is_refused(copied, tmp_path):
    folder, code = copied
    other = federation_at(tmp_path / "other")
    content = (folder / "SHA256SUMS").read_bytes()
    (folder / "SHA256SUMS.sig").write_bytes(bytes.fromhex(coordinator_signer(other.folder).sign(content)))
    assert "not signed by this coordinator" in refused(folder, code)
    shutil.copyfile(other.card_file, folder / "coordinator.json")
    said = refused(folder, code)
    assert said.startswith("coordinator.json: its fingerprint is ") and fingerprint(other.card) in said and code in said


def test_more_fewer_and_other_than_files(copied):
    folder, code = copied
    (folder / "wheels" / "more.whl").touch()
    assert refused(folder, code).startswith("./wheels/more.whl: not of the bundle")
    (folder / "wheels" / "more.whl").unlink()
    (folder / "docs" / "link.md").symlink_to("/etc/passwd")
    assert refused(folder, code).startswith("./docs/link.md: neither a file nor a folder")
    (folder / "docs" / "link.md").unlink()
    (folder / "docs" / "index.md").unlink()
    assert refused(folder, code).startswith("./docs/index.md: missing")
    (folder / "bundle.json").unlink()
    assert refused(folder, code).startswith("bundle.json: missing")


def test_what_else_lies_in_the_models_folder_stays_there(bundle):
    folder, _ = bundle
    named = json.loads((folder / "model" / "manifest.json").read_text())["files"]
    there = {path.relative_to(folder / "model").as_posix() for path in (folder / "model").rglob("*") if path.is_file()}
    assert there == {*named, "manifest.json"}


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("python", "3.99", "this bundle is for Python 3.99, which is not installed"),
        ("machine", "riscv64", "this bundle is for processors of the kind riscv64, not"),
        ("python", "3.11; reboot", "bundle.json: not as siloweave writes it"),
    ],
)
def test_another_python_or_processor(copied, field, value, said):
    folder, code = copied
    described = json.loads((folder / "bundle.json").read_text())
    (folder / "bundle.json").write_text(json.dumps({**described, field: value}, indent=2))
    assert refused(folder, code).startswith(said)


@pytest.mark.parametrize("arguments", [(), ("a", "b", "c")])
def test_a_wrong_call(bundle, arguments):
    assert refused(bundle[0], *arguments).startswith("usage: sh install.sh FINGERPRINT [TARGET]")


def test_the_command_refuses_what_it_cannot_bundle(siloweave, tiny_run, tmp_path):
    federation_at(tmp_path / "federation")
    given = ("bundle", "federation", "out", "--model", str(tiny_run.model))
    for arguments, said in {
        (*given[:3], "--model", "nowhere"): "nowhere: no finished model here",
        (*given, "--extra", "more"): "siloweave: has no extra 'more'",
        given: "runs from a working folder",
        ("bundle", "nowhere", *given[2:]): "nowhere: no federation.toml there",
    }.items():
        done = siloweave(*arguments, cwd=tmp_path)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr.splitlines()[-1]
        assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["federation"], "something half-written was left"
