"""Whose word it is that a base model from elsewhere was made from public text alone.

No computation can show that. So somebody says it, signed, in a file beside the weights: the model's content digest
covers it, and silos take such a model only where their steward lists that digest.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from configs.errors import InputError
from configs.parse import json_object, parse
from configs.schema.base import Digest
from configs.storage.files import canonical_json
from configs.storage.manifests import Manifest
from privacy.signing import Signer, signature_holds

DECLARATION = "declaration.json"
_LARGEST_BYTES = 2**20


class Declaration(BaseModel):
    """What somebody says of a model's origin.

    Attributes:
        source: where the model came from, as in the settings.
        revision: of the repository; empty where it came from a file.
        license: as the model's card or its file names it; "not stated" where neither does.
        files: SHA-256 of the weights' and tokenizer's files, by name.
        declared_public_by: public key of who says that public text alone has made the model.
        signature: theirs, over all of the above.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: Literal[1] = 1
    statement: Literal["trained on public text only"] = "trained on public text only"
    source: Annotated[str, Field(max_length=4096)]
    revision: Annotated[str, Field(max_length=256)]
    license: Annotated[str, Field(max_length=256)]
    files: dict[str, Digest]
    declared_public_by: Digest
    signature: str

    def encode(self) -> bytes:
        """The declaration's file."""
        return self.model_dump_json(indent=2).encode() + b"\n"

    @property
    def signed(self) -> bytes:
        """What the signature is over."""
        return _signed(self.model_dump(mode="json"))


def declare(facts: Mapping[str, Any], signer: Signer) -> Declaration:
    """Signs a declaration.

    Args:
        facts: ``source``, ``revision``, ``license`` and ``files``.
        signer: who declares.
    """
    draft = Declaration(**facts, declared_public_by=signer.public_key, signature="")
    return draft.model_copy(update={"signature": signer.sign(draft.signed)})


def declaration_of(folder: Path, manifest: Manifest) -> Declaration | None:
    """The declaration of a model; None for a model that was pretrained here.

    Args:
        folder: of the model, undamaged.
        manifest: the folder's.

    Raises:
        InputError: it can't be read, is of other files, or its signature does not hold.
    """
    if DECLARATION not in manifest.files:
        return None
    path = folder / DECLARATION
    if manifest.files[DECLARATION]["size_bytes"] > _LARGEST_BYTES:
        raise InputError(f"{path}: larger than any declaration; import the model again")
    found = parse(Declaration, json_object(path.read_bytes(), str(path)), str(path))
    there = {name: entry["sha256"] for name, entry in manifest.files.items() if name != DECLARATION}
    if found.files != there:
        name = sorted(set(found.files.items()) ^ set(there.items()))[0][0]
        raise InputError(f"{path}: {name!r} is not the file that was declared; import the model again")
    if not signature_holds(found.declared_public_by, found.signed, found.signature):
        raise InputError(f"{path}: the signature is not {found.declared_public_by}'s over it; import the model again")
    return found


def declared_by(folder: Path, manifest: Manifest) -> str | None:
    """Whose word it is; None for a model that was pretrained here. Raises as ``declaration_of`` does."""
    found = declaration_of(folder, manifest)
    return found.declared_public_by if found else None


def _signed(document: Mapping[str, Any]) -> bytes:
    return canonical_json({name: value for name, value in document.items() if name != "signature"})
