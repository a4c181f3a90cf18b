"""Whom each side knows: the coordinators that a silo's steward trusts, and the silos that a coordinator has enrolled.

One small file each, read again for every request and every round, so that one is added or dropped without a restart.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from configs.artifacts import canonical_json, digest_bytes, write_atomic
from federated.documents import read_folder
from privacy.signing import Signer

TRUSTED, ENROLLED = "trusted", "silos"
COORDINATOR_KEY = "coordinator.key"
PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", max_length=64)]
Name = Annotated[str, Field(max_length=100)]


class TrustedCoordinator(BaseModel):
    """A coordinator as its steward's file names it.

    Attributes:
        name: for people.
        public_key: Ed25519, hexadecimal.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["coordinator"] = "coordinator"
    version: Literal[1] = 1
    name: Name
    public_key: PublicKey


class EnrolledSilo(BaseModel):
    """A silo as it enrolled with a coordinator.

    Attributes:
        silo: its id.
        public_key: Ed25519, hexadecimal: signs its replies, receipts and ledger.
        node_key: the public half of its SuperNode's key, as OpenSSH writes it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["silo"] = "silo"
    version: Literal[1] = 1
    silo: Name
    public_key: PublicKey
    node_key: Annotated[str, Field(max_length=1000)]


def fingerprint(public_key: str) -> str:
    """SHA-256 of a public key, for people to compare."""
    return digest_bytes(bytes.fromhex(public_key))


def trust(state_dir: Path, coordinator: TrustedCoordinator) -> Path:
    """Adds a coordinator, and returns its file."""
    folder = state_dir / TRUSTED
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{fingerprint(coordinator.public_key)}.json"
    write_atomic(path, canonical_json(coordinator.model_dump()))
    return path


def trusted_coordinators(state_dir: Path) -> frozenset[str]:
    """Public keys of the coordinators that may ask this silo.

    Raises:
        InputError: a file there is not one of ours.
    """
    found = read_folder(TrustedCoordinator, state_dir / TRUSTED).values()
    return frozenset(coordinator.public_key for coordinator in found)


def enrolled_silos(coordinator: Path) -> dict[str, str]:
    """Public keys of the enrolled silos by name.

    Raises:
        InputError: a file there is not one of ours.
    """
    found = read_folder(EnrolledSilo, coordinator / ENROLLED).values()
    return {silo.silo: silo.public_key for silo in found}


def coordinator_signer(coordinator: Path) -> Signer:
    """The key of a coordinator's directory, made there the first time."""
    coordinator.mkdir(parents=True, exist_ok=True)
    return Signer(coordinator / COORDINATOR_KEY)
