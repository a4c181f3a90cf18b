"""Digests by which a certificate says of which model it speaks, and the look at a folder that claims to be it."""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from configs.artifacts import MANIFEST, digest_bytes, require_manifest
from configs.encryption import MasterKey, is_sealed, read_sealed
from configs.errors import InputError

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # what peft reads; the rest is for people
ADAPTER, BASE_MODEL = "final adapter", "base model"
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class RoundDigests(BaseModel):
    """One round's.

    Attributes:
        adapter: of the shared adapter after the round, safetensors.
        releases: of what was folded into it, by ledger: of each silo's whole reply, or of the aggregator's noised mean,
            as the ledgers hold it. None for a round that was committed before certificates had any.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapter: Digest
    releases: dict[str, Digest] | None


class ModelDigests(BaseModel):
    """A certificate's.

    Attributes:
        base_model: content digest of the base model's manifest, which requests and policies name.
        rounds: every round, the first one first.
        adapter: of the files of the published adapter, in the clear, by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: Digest
    rounds: tuple[RoundDigests, ...]
    adapter: dict[str, Digest]

    def rounds_of(self, ledger: str) -> dict[int, str]:
        """Digests of what a ledger has released into the model, by round."""
        found = {number: (one.releases or {}).get(ledger) for number, one in enumerate(self.rounds, 1)}
        return {number: digest for number, digest in found.items() if digest is not None}

    def contributors(self) -> set[str]:
        """Ledgers whose releases are in the model."""
        return {name for one in self.rounds for name in one.releases or ()}


def adapter_digests(folder: Path) -> dict[str, str]:
    """Digests of a published adapter's files, as they are in the clear."""
    return {name: digest_bytes((folder / name).read_bytes()) for name in ADAPTER_FILES}


def which_model(digests: ModelDigests, folder: Path, key: MasterKey | None) -> str:
    """Says which part of a certificate's model a folder is: its final adapter or its base model.

    Args:
        digests: the certificate's.
        folder: an adapter as peft writes it, encrypted or not, or an exported base model with its manifest.
        key: of an encrypted adapter.

    Raises:
        InputError: it is neither; the message names the file and both digests.
    """
    if (folder / ADAPTER_FILES[0]).is_file():
        for name, expected in digests.adapter.items():
            _compare(folder / name, _digest(folder / name, key), expected, ADAPTER)
        return ADAPTER
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"{folder}: neither an adapter ({ADAPTER_FILES[0]}) nor a base model ({MANIFEST}) lies there; give the "
            "folder of one"
        )
    _compare(folder, require_manifest(folder, "model", "export").content_digest, digests.base_model, BASE_MODEL)
    return BASE_MODEL


def _digest(path: Path, key: MasterKey | None) -> str:
    try:
        return digest_bytes(read_sealed(path, key if is_sealed(path) else None, None))
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); give the adapter's whole folder") from None


def _compare(path: Path, found: str, expected: str, what: str) -> None:
    if found != expected:
        raise InputError(
            f"{path}: its digest is {found[:16]}…, the certificate's {what} has {expected[:16]}…: this is another model"
        )
