"""The bundle: one folder that a coordinator signs, and that a site installs from without any network."""

import json
import platform
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import Distribution
from pathlib import Path

from packaging.utils import parse_wheel_filename

import configs
from configs.errors import InputError
from configs.storage.files import digest_file, sync_tree, write_failure
from configs.storage.layout import RunFiles
from configs.storage.manifests import MANIFEST, Manifest, require_manifest
from federated.bundle.packages import check_packable, write_wheel
from federated.bundle.sbom import bill_of_materials, check_installed
from federated.deployment.federation_folder import FederationFolder
from federated.identity.cards import write_document
from federated.identity.trust import coordinator_signer

SUMS, SIGNATURE = "SHA256SUMS", "SHA256SUMS.sig"
_FIRST_LINE = "# siloweave bundle 1\n"  # a comment to sha256sum; no other text that this key signs begins so
_DOCUMENTS = "share/doc/siloweave"  # where our own wheel has its pages

Packages = Sequence[Distribution]


def make_bundle(
    federation: FederationFolder,
    model: Path,
    output: Path,
    packages: Packages,
    track: Callable[[Packages], Iterable[Distribution]] = iter,
) -> None:
    """Writes the folder, whole or not at all.

    Args:
        federation: whose key signs it, and whose ``coordinator.json`` is in it.
        model: an exported base model.
        output: the folder; nothing may be there yet.
        packages: what it installs: Siloweave and all that it needs.
        track: passes them on one by one, and shows how far it is.

    Raises:
        InputError: something is there, the model is not whole, or a package is not as it was installed.
    """
    if output.exists() or output.is_symlink():
        raise InputError(f"{output}: is there already; give a folder that is not")
    check_installed()
    manifest = require_manifest(model, "model", "export")
    for package in packages:
        check_packable(package)
    try:
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.absolute().parent) as scratch:
            made = Path(scratch) / "bundle"
            made.mkdir()
            _fill(made, model, manifest, track(packages))
            _describe(made, federation, manifest.content_digest, packages)
            _sign(made, federation)
            sync_tree(made)
            made.rename(output)
    except OSError as error:
        raise write_failure(output, error) from None


def _fill(made: Path, model: Path, manifest: Manifest, packages: Iterable[Distribution]) -> None:
    wheels = made / "wheels"
    wheels.mkdir()
    for package in packages:
        wheel = write_wheel(package, wheels)
        if package.name == "siloweave":
            _unpack_documents(wheel, made / "docs")
    _copy_model(model, manifest, RunFiles(made).model)  # by the name that it has in a run
    shutil.copytree(Path(configs.__path__[0]) / "deploy", made / "deploy", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(Path(__file__).with_name("install.sh"), made / "install.sh")


def _copy_model(model: Path, manifest: Manifest, target: Path) -> None:
    """The files that its manifest names, and nothing else that may lie there; the copy has to be that model, whole."""
    target.mkdir()
    for name in (MANIFEST, *manifest.files):
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(
                f"{model / MANIFEST}: names {name!r}, which is not below the folder; export the model again"
            )
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(model / name, target / name)
    if require_manifest(target, "model", "export") != manifest:
        raise InputError(f"{model}: became another model while it was packed; give the command again")


def _unpack_documents(wheel: Path, docs: Path) -> None:
    docs.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if f".data/data/{_DOCUMENTS}/" in name:
                (docs / Path(name).name).write_bytes(archive.read(name))


def _describe(made: Path, federation: FederationFolder, model_digest: str, packages: Packages) -> None:
    write_document(made / "coordinator.json", federation.card)
    digests, pins = dict[str, str](), list[str]()
    for wheel in sorted((made / "wheels").iterdir()):
        name, version, _, _ = parse_wheel_filename(wheel.name)
        digests[str(name)] = digest_file(wheel)
        pins.append(f"{name}=={version} --hash=sha256:{digests[name]}\n")
    (made / "requirements.txt").write_text("".join(pins))
    (made / "sbom.cdx.json").write_text(bill_of_materials(packages, digests, model_digest))
    described = {
        "kind": "siloweave bundle",
        "version": 1,
        "coordinator": federation.config.name,
        "machine": platform.machine(),
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": model_digest,
        "packages": len(packages),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        "siloweave": next(package.version for package in packages if package.name == "siloweave"),
    }
    (made / "bundle.json").write_text(json.dumps(described, indent=2) + "\n")


def _sign(made: Path, federation: FederationFolder) -> None:
    files = sorted(path for path in made.rglob("*") if path.is_file())
    sums = "".join(f"{digest_file(path)}  {path.relative_to(made).as_posix()}\n" for path in files)
    content = (_FIRST_LINE + sums).encode()
    (made / SUMS).write_bytes(content)
    (made / SIGNATURE).write_bytes(bytes.fromhex(coordinator_signer(federation.folder).sign(content)))
