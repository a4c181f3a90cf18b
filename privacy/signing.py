"""Signatures, by keys that are made where they are used and never sent."""

from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from configs.storage.secrets import load_or_create_secret


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
