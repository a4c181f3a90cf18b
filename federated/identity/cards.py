"""The public documents that coordinator and silos exchange and keep: small JSON files.

A document has a fingerprint over everything in it. Whoever takes one in compares the fingerprint with what the other
side's people read out over another channel, such as the telephone.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from configs.errors import InputError
from configs.parse import json_object, parse
from configs.schema.addresses import check_address
from configs.schema.base import Settings
from configs.storage.files import canonical_json, digest_bytes, write_atomic

FINGERPRINT_DIGITS = 40  # 160 bits: finding another document with the same ones is out of reach
Name = Annotated[str, Field(max_length=100)]
PublicKey = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$", max_length=64)]


Document = TypeVar("Document", bound=BaseModel)
LARGEST_DOCUMENT_BYTES = 100_000


def read_document(schema: type[Document], path: Path) -> Document:
    """A public document.

    Raises:
        InputError: it is missing, too large, not JSON, or another kind of document.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); give the file that the other side sent") from None
    if len(content) > LARGEST_DOCUMENT_BYTES:
        raise InputError(f"{path}: {len(content)} bytes, a public document has at most {LARGEST_DOCUMENT_BYTES}")
    return parse(schema, json_object(content, str(path)), str(path))


def write_document(path: Path, document: BaseModel) -> None:
    """Writes a public document."""
    write_atomic(path, json.dumps(document.model_dump(mode="json"), indent=2, sort_keys=True).encode() + b"\n")


def read_folder(schema: type[Document], folder: Path) -> dict[Path, Document]:
    """The public documents of a folder, in the order of their names; none where it is missing.

    Raises:
        InputError: as ``read_document``.
    """
    return {path: read_document(schema, path) for path in sorted(folder.glob("*.json"))}


def _proxy_address(text: str) -> str:
    host, _, port = text.rpartition(":")
    # Earlier versions wrote an IPv6 address without brackets, which Flower reads, too.
    check_address(f"[{host}]:{port}" if ":" in host and not host.startswith("[") else text, "address")
    return text


class CoordinatorCard(Settings):
    """What silos know a coordinator by: ``coordinator.json``."""

    kind: Literal["coordinator"] = "coordinator"
    version: Literal[1] = 1
    name: Annotated[str, Field(min_length=1, max_length=100)]
    """The federation's name."""
    public_key: PublicKey
    """Ed25519 key that signs requests, in hexadecimal."""
    address: Annotated[str, Field(max_length=300), AfterValidator(_proxy_address)]
    """``HOST:PORT`` of the coordinator's proxy."""
    root_certificate: Annotated[str, Field(max_length=20_000)]
    """Certificate of the coordinator's own authority, PEM: the only one that a relay trusts."""


class RelayCard(Settings):
    """The public halves of a relay's keys: ``relay.json``."""

    kind: Literal["relay"] = "relay"
    version: Literal[1] = 1
    supernode_key: Annotated[str, Field(pattern=r"^ecdsa-sha2-nistp384 [A-Za-z0-9+/=]+$", max_length=1000)]
    """ECDSA P-384 key in OpenSSH's format, by which the coordinator knows the SuperNode."""
    certificate_request: Annotated[str, Field(max_length=20_000)]
    """Request (PEM) for the certificate by which the silo service knows the relay, where they talk over TLS."""


def fingerprint(document: BaseModel) -> str:
    """What two people compare by telephone: ten groups of four hexadecimal digits."""
    digits = digest_bytes(canonical_json(document.model_dump(mode="json")))[:FINGERPRINT_DIGITS]
    return "-".join(digits[start : start + 4] for start in range(0, FINGERPRINT_DIGITS, 4))


def confirm(document: BaseModel, given: str | None, origin: str, ask: Callable[[str], bool]) -> str:
    """The document's fingerprint, confirmed by what was given or by a person.

    Args:
        document: a public document from elsewhere.
        given: the fingerprint that the other side read out; None asks.
        origin: the file, for the message.
        ask: shows the question and gives the answer.

    Raises:
        InputError: it is another one.
    """
    found = fingerprint(document)
    if given is None:
        if not ask(f"{origin}: fingerprint {found}. Is it the one that its owner reads out to you?"):
            raise InputError(f"{origin}: fingerprint {found} was not confirmed; nothing was changed")
    elif given.replace("-", "").replace(" ", "").lower() != found.replace("-", ""):
        raise InputError(f"{origin}: its fingerprint is {found}, not {given}; ask its owner for the file again")
    return found


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
