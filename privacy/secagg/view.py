"""What one party has been told in a secure sum: the same for all silos, or nothing is unmasked."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256

from privacy.secagg.failures import MalformedMessage
from privacy.secagg.masks import KEY_BYTES
from privacy.secagg.messages import pack, unpack


@dataclass(frozen=True)
class AdvertisedKeys:
    """A silo's public part of one sum.

    Attributes:
        cipher: X25519 key under which shares travel to it.
        mask: X25519 key from which masks with others follow.
        seed_commitment: what it promises its own mask's seed by.
    """

    cipher: bytes
    mask: bytes
    seed_commitment: bytes

    @classmethod
    def parse(cls, body: bytes) -> "AdvertisedKeys":
        """Of a message of phase 1.

        Raises:
            MalformedMessage: it has other fields.
        """
        fields = unpack(body, 3)
        if any(len(one) != KEY_BYTES for one in fields):
            raise MalformedMessage(f"an advertised key has not {KEY_BYTES} bytes")
        return cls(*fields)


@dataclass
class View:
    """Who advertised which keys, who of them shared, and whose vectors have come."""

    keys: Mapping[str, AdvertisedKeys]
    shared: list[str] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)

    def digest(self) -> bytes:
        """What a silo signs before it reveals anything."""
        keys = (
            pack(name.encode(), one.cipher, one.mask, one.seed_commitment) for name, one in sorted(self.keys.items())
        )
        lists = (pack(*(name.encode() for name in names)) for names in (self.shared, self.survivors))
        return sha256(b"siloweave secure aggregation view 1\n" + pack(pack(*keys), *lists)).digest()
