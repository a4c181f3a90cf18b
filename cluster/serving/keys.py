"""Who may ask: API keys from a file that only its owner can read."""

import hmac
from hashlib import sha256
from pathlib import Path

from configs.errors import InputError
from configs.storage.secrets import read_secret

LOOPBACK = ("127.0.0.1", "::1", "localhost")  # where a service may listen without keys
_SHORTEST = 16
_HOW_TO_MAKE = "no such file; make one with `(umask 077; openssl rand -hex 32 > FILE)`, one key a line"


class ApiKeys:
    """The keys, of which only digests are kept.

    Args:
        path: a file with one key a line; lines that start with ``#`` are comments.

    Raises:
        InputError: it holds no key, or one that is too short or has other signs than letters, digits and the like; or
            see ``read_secret``.
    """

    def __init__(self, path: Path) -> None:
        lines = [line.strip() for line in read_secret(path, _HOW_TO_MAKE).splitlines()]
        keys = [line for line in lines if line and not line.startswith(b"#")]
        if not keys:
            raise InputError(f"{path}: holds no key; {_HOW_TO_MAKE.partition('; ')[2]}")
        for number, key in enumerate(keys, 1):
            if len(key) < _SHORTEST or not all(0x21 <= byte < 0x7F for byte in key):
                raise InputError(
                    f"{path}: key {number} has fewer than {_SHORTEST} characters, or blanks, or signs beyond ASCII; "
                    "make it with `openssl rand -hex 32`"
                )
        self._digests = [sha256(key).digest() for key in keys]

    def allow(self, header: bytes) -> bool:
        """Whether an Authorization header has one of the keys. Takes as long whichever it has, and if it has none."""
        kind, _, key = header.partition(b" ")
        digest = sha256(key.strip()).digest()
        found = [hmac.compare_digest(digest, other) for other in self._digests]
        return kind.lower() == b"bearer" and any(found)
