"""What a bundle is made of, as CycloneDX 1.6 writes it (https://cyclonedx.org/specification/overview/)."""

from collections.abc import Iterable, Mapping
from importlib.metadata import Distribution
from typing import TYPE_CHECKING

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from configs.errors import InputError

if TYPE_CHECKING:
    from cyclonedx.model.component import Component


def check_installed() -> None:
    """Refuses before anything is packed.

    Raises:
        InputError: the library that writes it is not there.
    """
    try:
        import cyclonedx  # noqa: F401
    except ImportError:
        raise InputError(
            "cyclonedx-python-lib is not installed, which writes the bill of materials; pip install 'siloweave[bundle]'"
        ) from None


def bill_of_materials(packages: Iterable[Distribution], digests: Mapping[str, str], model_digest: str) -> str:
    """The document, as JSON.

    Args:
        packages: what the bundle installs, Siloweave among it.
        digests: SHA-256 of each wheel by its package's canonical name.
        model_digest: of the base model's manifest.
    """
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.output.json import JsonV1Dot6

    by_name = {str(canonicalize_name(package.name)): package for package in packages}
    parts = {name: _component(package, digests[name]) for name, package in by_name.items()}
    bom = Bom(components=[part for name, part in parts.items() if name != "siloweave"])
    bom.metadata.component = parts["siloweave"]
    digest = HashType(alg=HashAlgorithm.SHA_256, content=model_digest)
    bom.components.add(Component(name="base model", type=ComponentType.MACHINE_LEARNING_MODEL, hashes=[digest]))
    for name, package in by_name.items():
        asked = {str(canonicalize_name(Requirement(line).name)) for line in package.requires or []}
        bom.register_dependency(parts[name], [parts[each] for each in sorted(asked & set(parts))])
    return JsonV1Dot6(bom).output_as_string(indent=2) + "\n"


def _component(package: Distribution, digest: str) -> "Component":
    from cyclonedx.factory.license import LicenseFactory
    from cyclonedx.model import HashAlgorithm, HashType
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    license_ = _license(package)
    return Component(
        name=package.name,
        version=package.version,
        type=ComponentType.APPLICATION if package.name == "siloweave" else ComponentType.LIBRARY,
        licenses=[LicenseFactory().make_from_string(license_)] if license_ else [],
        hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
        purl=PackageURL("pypi", name=canonicalize_name(package.name), version=package.version),
        bom_ref=canonicalize_name(package.name),
    )


def _license(package: Distribution) -> str:
    """As its maker declares it: an expression, else a short name, else the classifiers'."""
    described = package.metadata
    for field in ("License-Expression", "License"):
        if field in described and len(described[field]) < 100:  # some put the whole text there
            return described[field].strip()
    classified = (line.split(" :: ") for line in described.get_all("Classifier") or [])
    return " OR ".join(parts[-1] for parts in classified if parts[0] == "License" and len(parts) > 2)
