"""Whom each side knows: a steward the coordinators and other silos of the federation, a coordinator the enrolled ones.

One small file each, read again for every request and every round, so that one is added or dropped without a restart.
"""

from pathlib import Path

from configs.storage.files import canonical_json, digest_bytes, private_folder, write_atomic
from configs.storage.layout import SiloFiles
from federated.identity.cards import EnrolledSilo, TrustedCoordinator, read_folder
from privacy.signing import Signer

ENROLLED = "silos"
COORDINATOR_KEY = "coordinator.key"


def key_file_stem(public_key: str) -> str:
    """SHA-256 of a public key, by which the file of its owner is named."""
    return digest_bytes(bytes.fromhex(public_key))


def trust(state_dir: Path, coordinator: TrustedCoordinator) -> Path:
    """Adds a coordinator, and returns its file."""
    folder = SiloFiles(state_dir).trusted
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{key_file_stem(coordinator.public_key)}.json"
    write_atomic(path, canonical_json(coordinator.model_dump()))
    return path


def trusted_coordinators(state_dir: Path) -> frozenset[str]:
    """Public keys of the coordinators that may ask this silo.

    Raises:
        InputError: a file there is not one of ours.
    """
    found = read_folder(TrustedCoordinator, SiloFiles(state_dir).trusted).values()
    return frozenset(coordinator.public_key for coordinator in found)


def enrolled_silos(coordinator: Path) -> dict[str, str]:
    """Public keys of the enrolled silos by name.

    Raises:
        InputError: a file there is not one of ours.
    """
    found = read_folder(EnrolledSilo, coordinator / ENROLLED).values()
    return {silo.silo: silo.public_key for silo in found}


def confirmed_silos(state_dir: Path) -> dict[str, EnrolledSilo]:
    """The other silos whose keys a silo's steward has confirmed, by name.

    Raises:
        InputError: a file there is not one of ours.
    """
    found = read_folder(EnrolledSilo, SiloFiles(state_dir).roster).values()
    return {silo.silo: silo for silo in found}


def coordinator_signer(coordinator: Path) -> Signer:
    """The key of a coordinator's directory, made there the first time."""
    return Signer(private_folder(coordinator) / COORDINATOR_KEY)
