"""Private keys, made where they are used, and the public halves that coordinator and silos exchange.

A public document has a fingerprint over everything in it. Whoever takes one in compares the fingerprint with what the
other side's people read out, on another way than the file came.
"""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from pydantic import BaseModel, Field

from configs.artifacts import canonical_json, digest_bytes, sync_directory, write_atomic
from configs.errors import InputError
from configs.settings import Settings
from federated.trust import PublicKey

FINGERPRINT_DIGITS = 40  # 160 bits: finding another document with the same ones is out of reach


class CoordinatorCard(Settings):
    """What silos know a coordinator by: ``coordinator.json``."""

    kind: Literal["coordinator"] = "coordinator"
    version: Literal[1] = 1
    name: Annotated[str, Field(min_length=1, max_length=100)]
    """The federation's name."""
    public_key: PublicKey
    """Ed25519 key that signs requests, in hexadecimal."""
    address: Annotated[str, Field(max_length=300)]
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


def private_folder(path: Path) -> Path:
    """A folder that is its owner's alone, made where it is missing."""
    path.mkdir(parents=True, exist_ok=True)
    path.chmod(0o700)
    return path


def load_or_create_key(path: Path, curve: ec.EllipticCurve) -> ec.EllipticCurvePrivateKey:
    """An elliptic-curve key in OpenSSH's or OpenSSL's format by the file's name, drawn the first time; mode 0600.

    Raises:
        InputError: the file is no such key, or others than its owner may read it.
    """
    if not path.exists():
        style = serialization.PrivateFormat.OpenSSH if path.suffix == ".ssh" else serialization.PrivateFormat.PKCS8
        plain = serialization.NoEncryption()
        content = ec.generate_private_key(curve).private_bytes(serialization.Encoding.PEM, style, plain)
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        write_atomic(fresh, content, mode=0o600)
        with contextlib.suppress(FileExistsError):  # another process was first: its key is the key
            os.link(fresh, path)
        fresh.unlink()
        sync_directory(path.parent)
    return _load_key(path)


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    mode = path.stat().st_mode
    if mode & 0o077:
        raise InputError(f"{path}: mode {mode & 0o777:o} lets others read it; `chmod 600` it if it is still a secret")
    load = serialization.load_ssh_private_key if path.suffix == ".ssh" else serialization.load_pem_private_key
    try:
        key = load(path.read_bytes(), None)
    except ValueError:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"{path}: no elliptic-curve key; put the key's backup back")
    return key


def ssh_public_key(key: ec.EllipticCurvePrivateKey) -> str:
    """The public half in OpenSSH's format."""
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return public.decode()
