"""Digests by which a certificate says of which model it speaks, and the look at a folder that claims to be it."""

import re
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from configs.errors import InputError
from configs.schema.base import Count, Digest
from configs.storage.files import digest_bytes, digest_file
from configs.storage.manifests import MANIFEST, damaged_file, read_manifest
from configs.storage.sealing import MasterKey, is_sealed, read_sealed
from privacy.declaration import declared_by

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")  # what peft reads
MODEL_FILES = ("config.json", "model.safetensors")  # what transformers reads of any model, beside its tokenizer
_PLAIN, _MOST_FILES = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}"), 50
_CARD = "README.md"  # for people
_LARGEST_SEALED = 2**33  # bytes of an encrypted file, which is opened in memory
ADAPTER, BASE_MODEL = "final adapter", "base model"


def _of_all_files(digests: dict[str, str]) -> dict[str, str]:
    """Requires all names and no others: a stranger's are no paths to look at, one left out would not be compared."""
    if set(digests) != set(ADAPTER_FILES) and not _of_a_model(digests):
        found = ", ".join(sorted(digests))[:100] or "no file"
        raise ValueError(
            f"model.adapter has {found}: expected {' and '.join(ADAPTER_FILES)}, and nothing else; or the plain names "
            f"of a whole model's files, {' and '.join(MODEL_FILES)} among them"
        )
    return digests


def _of_a_model(digests: dict[str, str]) -> bool:
    """Whether these are a whole model's files, all of them in one folder."""
    plain = all(_PLAIN.fullmatch(name) and name not in (_CARD, MANIFEST, ADAPTER_FILES[0]) for name in digests)
    return plain and len(digests) <= _MOST_FILES and set(MODEL_FILES) <= set(digests)


class UpdateDigest(BaseModel):
    """One update that was folded into a server step of buffered rounds.

    Attributes:
        silo: whose it is.
        round: the silo's own round, as its ledger has charged it.
        version: after how many server steps the model was that it started from.
        weight: public: what it was multiplied by.
        digest: of the silo's whole reply, as its ledger holds it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    silo: Annotated[str, Field(min_length=1, max_length=255)]
    round: Count
    version: Annotated[int, Field(ge=0)]
    weight: Annotated[float, Field(gt=0, le=1)]
    digest: Digest


class RoundDigests(BaseModel):
    """The digests of one round.

    Attributes:
        adapter: of the shared adapter after the round, safetensors.
        releases: of what was folded into it, by ledger: of each silo's whole reply, or of the aggregator's noised mean,
            as the ledgers hold it. None for a round that was committed before certificates had any.
        updates: what was folded into a server step of buffered rounds, in the order in which it came; ``releases`` has
            nothing then.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    adapter: Digest
    releases: dict[str, Digest] | None
    updates: tuple[UpdateDigest, ...] = ()

    @model_validator(mode="after")
    def _one_kind(self) -> "RoundDigests":
        if self.releases and self.updates:
            raise ValueError("a round has releases, and updates of buffered rounds; it has either")
        return self

    @model_serializer(mode="wrap")
    def _as_before(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without what earlier versions had no field for, where there is nothing to say of it."""
        found: dict[str, Any] = write(self)
        return found if self.updates else {name: value for name, value in found.items() if name != "updates"}

    @property
    def counts(self) -> Counter[str]:
        """How many releases of each ledger were folded into it."""
        return Counter([*(self.releases or ()), *(update.silo for update in self.updates)])


class ModelDigests(BaseModel):
    """The digests in one certificate.

    Attributes:
        base_model: content digest of the base model's manifest, which requests and policies name.
        rounds: every round, the first one first.
        adapter: of the files that are published, in the clear, by name: an adapter's, or where parameters of the model
            itself have trained, the whole model's.
        declared_public_by: key of who declares that public text alone has made the base model; None where it was
            pretrained by Siloweave. The declaration is in the base model's folder, and its digest covers it.
        continues: digest of the certificate of an earlier run, where this one has started from what that one made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    base_model: Digest
    rounds: tuple[RoundDigests, ...]
    adapter: Annotated[dict[str, Digest], AfterValidator(_of_all_files)]
    declared_public_by: Digest | None = None
    continues: Digest | None = None

    @model_validator(mode="after")
    def _each_update_once(self) -> "ModelDigests":
        seen: set[tuple[str, int]] = set()
        for step, one in enumerate(self.rounds, 1):
            for update in one.updates:
                if (update.silo, update.round) in seen:
                    raise ValueError(f"round {update.round} of {update.silo!r} went into the model twice")
                if update.version >= step:
                    raise ValueError(f"step {step} has an update of a model that comes after it")
                seen.add((update.silo, update.round))
        return self

    def rounds_of(self, ledger: str) -> dict[int, str]:
        """Digests of what a ledger has released into the model, by the round that it was charged for."""
        found = {number: (one.releases or {}).get(ledger) for number, one in enumerate(self.rounds, 1)}
        buffered = {up.round: up.digest for one in self.rounds for up in one.updates if up.silo == ledger}
        return {number: digest for number, digest in found.items() if digest is not None} | buffered

    def contributors(self) -> set[str]:
        """Ledgers whose releases are in the model."""
        return {name for one in self.rounds for name in one.counts}


def published_digests(folder: Path) -> dict[str, str]:
    """Digests of what a federation publishes, in the clear: an adapter, or a whole model with its tokenizer."""
    whole = not (folder / ADAPTER_FILES[0]).is_file()
    names = sorted(path.name for path in folder.iterdir() if path.name != _CARD) if whole else ADAPTER_FILES
    return {name: digest_file(folder / name) for name in names}


def which_model(digests: ModelDigests, folder: Path, key: MasterKey | None) -> str:
    """Says which part of a certificate's model a folder is: its final adapter or its base model.

    Args:
        digests: those in the certificate.
        folder: an adapter as peft writes it or a whole model as transformers does, encrypted or not; or an exported
            base model with its manifest.
        key: of what is encrypted.

    Raises:
        InputError: it is neither; the message names the file and both digests.
    """
    mark = next(files[0] for files in (ADAPTER_FILES, MODEL_FILES) if files[0] in digests.adapter)
    if (folder / mark).is_file() and not (folder / MANIFEST).is_file():
        _nothing_else(folder, {*digests.adapter, _CARD})
        for name, expected in digests.adapter.items():
            _compare(folder / name, _digest(folder / name, key), expected, ADAPTER)
        return ADAPTER
    if not (folder / MANIFEST).is_file():
        raise InputError(
            f"{folder}: neither an adapter ({mark}) nor a base model ({MANIFEST}) lies there; give the folder of one"
        )
    try:
        manifest = read_manifest(folder, "model")
        damaged = damaged_file(folder, manifest) if manifest else MANIFEST
    except OSError as error:
        raise InputError(f"{folder}: can't be read ({error.strerror}); give the base model's whole folder") from None
    if manifest is None or damaged is not None:
        raise InputError(f"{folder}: {damaged} is not what its manifest says: this is another model")
    _compare(folder, manifest.content_digest, digests.base_model, BASE_MODEL)
    _nothing_else(folder, {*manifest.files, MANIFEST})
    by = declared_by(folder, manifest)
    if by != digests.declared_public_by:
        raise InputError(
            f"{folder}: declared public by {by or 'nobody'}, and the certificate says by "
            f"{digests.declared_public_by or 'nobody'}; do not trust it"
        )
    return BASE_MODEL


def _nothing_else(folder: Path, named: set[str]) -> None:
    """Refuses any other file: a library may read it, and then this is another model."""
    there = (path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir())
    for name in there:
        if name not in named:
            raise InputError(f"{folder / name}: no file of the certificate's model; take it away to compare the rest")


def _digest(path: Path, key: MasterKey | None) -> str:
    try:
        if not path.is_file():
            raise InputError(f"{path}: no such file, or not a plain one; give the adapter's whole folder")
        if not is_sealed(path):
            return digest_file(path)
        if path.stat().st_size > _LARGEST_SEALED:
            raise InputError(f"{path}: an encrypted file of more than {_LARGEST_SEALED} bytes; decrypt it first")
        return digest_bytes(read_sealed(path, key, None))
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); give the adapter's whole folder") from None


def _compare(path: Path, found: str, expected: str, what: str) -> None:
    if found != expected:
        raise InputError(
            f"{path}: its digest is {found[:16]}…, the certificate's {what} has {expected[:16]}…: this is another model"
        )
