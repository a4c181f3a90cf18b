"""A silo's own secrets: made where they are used, mode 0600, never sent."""

import contextlib
import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from configs.errors import InputError
from configs.storage.files import sync_directory, write_atomic

KEY_BYTES = 32


def load_or_create_secret(path: Path) -> bytes:
    """A 32-byte secret, drawn from the operating system the first time.

    Raises:
        InputError: the file is not a secret of ours, or others than its owner may read it.
    """
    if not path.exists():
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        write_atomic(fresh, os.urandom(KEY_BYTES), mode=0o600)
        with contextlib.suppress(FileExistsError):  # another process was first: its key is the key
            os.link(fresh, path)
        fresh.unlink()
        sync_directory(path.parent)
    return load_secret(path)


def load_secret(path: Path) -> bytes:
    """A 32-byte secret that was drawn before.

    Raises:
        InputError: it is missing, not a secret of ours, or others than its owner may read it.
    """
    try:
        content, mode = path.read_bytes(), path.stat().st_mode
    except FileNotFoundError:
        raise InputError(f"{path}: no such key, and a new one would not be the same; put its backup back") from None
    if mode & 0o077:
        raise InputError(f"{path}: mode {mode & 0o777:o} lets others read it; `chmod 600` it if it is still a secret")
    if len(content) != KEY_BYTES:
        raise InputError(f"{path}: {len(content)} bytes, a key has {KEY_BYTES}; put the key's backup back")
    return content


class Signer:
    """Signs with a silo's Ed25519 key."""

    def __init__(self, key_path: Path) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(load_or_create_secret(key_path))

    @property
    def public_key(self) -> str:
        """The public half, in hexadecimal."""
        return self._key.public_key().public_bytes_raw().hex()

    def sign(self, message: bytes) -> str:
        """Signature in hexadecimal."""
        return self._key.sign(message).hex()


def signature_holds(public_key: str, message: bytes, signature: str) -> bool:
    """Whether a signature was made over the message by the key's owner."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True
