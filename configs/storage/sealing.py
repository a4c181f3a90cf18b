"""Encryption at rest of weights: AES-256-GCM in chunks, with a key that the user keeps elsewhere.

A sealed file is a header (magic, version, id of the key, salt, what the file is), then chunks of 1 MiB, each with its
tag. The chunks follow the STREAM construction (Hoang, Reyhanitabar, Rogaway, Vizar 2015): a chunk's nonce holds its
number and whether it is the last, so that a chunk cut off, moved or doubled is found. The header's last field, the
context, says what the file is: the run or the settings that it belongs to, and its place among their files. Every file
has a key of its own, derived by HKDF-SHA256 from the user's key and 32 random bytes: no two files share a (key, nonce),
however many are written. The header is every chunk's associated data.

What it doesn't do: an older sealed file of the same settings put back in the place of a newer one of the same name is
not noticed.
"""

import base64
import binascii
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from configs.errors import InputError
from configs.storage.files import write_atomic
from configs.storage.secrets import read_secret

ENVIRONMENT = "SILOWEAVE_ENCRYPTION_KEY"
FROM_ENVIRONMENT = "env:"
MAGIC = b"SWSEALED"
CHUNK_BYTES = 2**20
SEALED_SUFFIXES = (".safetensors", ".pt")

_VERSION, _READABLE = 2, (1, 2)  # in version 1 a model's and a checkpoint's context was the place alone
_KEY_BYTES, _KEY_ID_BYTES, _SALT_BYTES, _PREFIX_BYTES, _TAG_BYTES = 32, 16, 32, 7, 16
_FIXED_HEADER = struct.Struct(f">{len(MAGIC)}sB{_KEY_ID_BYTES}s{_SALT_BYTES}sH")
_HOW_TO_MAKE = "make one with `(umask 077; openssl rand -hex 32 > FILE)`"


@dataclass(frozen=True)
class MasterKey:
    """The user's key.

    Attributes:
        secret: 32 random bytes; never shown, written or sent.
        origin: where it came from, for messages.
    """

    secret: bytes = field(repr=False)
    origin: str

    @property
    def key_id(self) -> bytes:
        """Tells one key from another without telling anything about it."""
        return _derive(self.secret, b"", b"siloweave sealed file: key id", _KEY_ID_BYTES)


def load_key(source: str) -> MasterKey | None:
    """The key that ``run.encryption_key_file`` names.

    Args:
        source: path of a file with 32 bytes, raw or in hexadecimal or base64; ``env:`` for the environment variable
            SILOWEAVE_ENCRYPTION_KEY, in hexadecimal or base64; empty for none.

    Raises:
        InputError: it is not 32 random bytes, or see ``read_secret``.
    """
    if not source:
        return None
    if source == FROM_ENVIRONMENT:
        text = os.environ.get(ENVIRONMENT, "")
        if not text:
            raise InputError(f"{ENVIRONMENT} is not set here, and run.encryption_key_file is {source!r}: set it")
        return MasterKey(_parse(text.encode(errors="replace"), ENVIRONMENT, allow_raw=False), ENVIRONMENT)
    missing = f"the encryption key can't be read (no such file); {_HOW_TO_MAKE}"
    return MasterKey(_parse(read_secret(Path(source), missing), source, allow_raw=True), source)


def _parse(content: bytes, origin: str, *, allow_raw: bool) -> bytes:
    if allow_raw and len(content) == _KEY_BYTES:
        key = content
    else:
        text = content.strip()
        try:
            key = bytes.fromhex(text.decode()) if len(text) == 2 * _KEY_BYTES else base64.b64decode(text, validate=True)
        except (ValueError, binascii.Error):
            key = b""
    # 32 random bytes are never all printable, nor few different ones: that is a password, or a placeholder.
    if len(key) != _KEY_BYTES or all(0x20 <= byte < 0x7F for byte in key) or len(set(key)) < 8:
        raise InputError(f"{origin}: not 32 random bytes, raw or in hexadecimal or base64; {_HOW_TO_MAKE}")
    return key


def is_sealed(path: Path) -> bool:
    """Whether a file says that it is sealed."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def seal(content: bytes | memoryview, key: MasterKey, context: str) -> bytes:
    """Encrypts a whole file.

    Args:
        content: what to protect.
        key: the user's key.
        context: what the file is; ``unseal`` refuses a file that was sealed as something else.
    """
    salt, name = os.urandom(_SALT_BYTES), context.encode()
    header = _FIXED_HEADER.pack(MAGIC, _VERSION, key.key_id, salt, len(name)) + name
    cipher, prefix = _file_cipher(key, salt)
    view = memoryview(content).cast("B")
    starts = range(0, max(1, len(view)), CHUNK_BYTES)
    chunks = (
        cipher.encrypt(_nonce(prefix, number, number == len(starts) - 1), bytes(view[at : at + CHUNK_BYTES]), header)
        for number, at in enumerate(starts)
    )
    return b"".join([header, *chunks])


def unseal(sealed: bytes, key: MasterKey, context: str | None, origin: str, older: str | None = None) -> bytes:
    """Decrypts what ``seal`` made.

    Args:
        sealed: a whole sealed file.
        key: the user's key.
        context: what the file must be; None takes whatever it is.
        origin: the file's name, for messages.
        older: what a file of version 1 was sealed as, where that differs from ``context``.

    Raises:
        InputError: it was sealed with another key or as something else, or it was changed or cut.
    """
    header, version, key_id, salt, found = _read_header(sealed, origin)
    context = older if version == 1 and older is not None else context
    if key_id != key.key_id:
        raise InputError(f"{origin}: was encrypted with another key than {key.origin}; give the key it was made with")
    if context is not None and found != context:
        raise InputError(f"{origin}: is the encrypted {found!r}, not {context!r}; put the right file back")
    cipher, prefix = _file_cipher(key, salt)
    width, view = CHUNK_BYTES + _TAG_BYTES, memoryview(sealed)[len(header) :]
    starts = range(0, max(1, len(view)), width)
    try:
        return b"".join(
            cipher.decrypt(_nonce(prefix, number, number == len(starts) - 1), bytes(view[at : at + width]), header)
            for number, at in enumerate(starts)
        )
    except InvalidTag:
        raise _changed(origin) from None


def _read_header(sealed: bytes, origin: str) -> tuple[bytes, int, bytes, bytes, str]:
    """(header, version, id of the key, salt, context)."""
    if len(sealed) < _FIXED_HEADER.size:
        raise _changed(origin)
    magic, version, key_id, salt, length = _FIXED_HEADER.unpack_from(sealed)
    if magic != MAGIC:
        raise InputError(f"{origin}: is not encrypted by Siloweave")
    if version not in _READABLE:
        raise InputError(
            f"{origin}: encrypted in version {version}, this Siloweave reads up to {_VERSION}; upgrade, or put the "
            "file back"
        )
    end = _FIXED_HEADER.size + length
    try:
        return sealed[:end], version, key_id, salt, sealed[_FIXED_HEADER.size : end].decode()
    except UnicodeDecodeError:
        raise _changed(origin) from None


def _changed(origin: str) -> InputError:
    return InputError(f"{origin}: was changed or cut since it was encrypted; put its backup back or make it again")


def _file_cipher(key: MasterKey, salt: bytes) -> tuple[AESGCM, bytes]:
    """The cipher of one file, and the first bytes of its nonces."""
    derived = _derive(key.secret, salt, b"siloweave sealed file: content", _KEY_BYTES + _PREFIX_BYTES)
    return AESGCM(derived[:_KEY_BYTES]), derived[_KEY_BYTES:]


def _derive(secret: bytes, salt: bytes, purpose: bytes, length: int) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=salt or None, info=purpose).derive(secret)


def _nonce(prefix: bytes, number: int, is_last: bool) -> bytes:
    """12 bytes: prefix, number of the chunk, last or not. Struct refuses a number beyond 2^32 (4 PiB)."""
    return prefix + struct.pack(">IB", number, is_last)


def write_sealed(path: Path, content: bytes | memoryview, key: MasterKey | None, context: str) -> None:
    """Writes a file atomically, sealed where there is a key.

    Raises:
        SiloweaveError: the disk is full or not writable.
    """
    write_atomic(path, bytes(content) if key is None else seal(content, key, context))


def read_sealed(path: Path, key: MasterKey | None, context: str | None, older: str | None = None) -> bytes:
    """Reads what ``write_sealed`` wrote with the same key.

    Raises:
        InputError: see ``unseal``; or the file is sealed and there is no key; or there is a key and the file is not
            sealed: somebody without the key may have put it there.
    """
    _check_form(path, key)
    content = path.read_bytes()
    return content if key is None else unseal(content, key, context, str(path), older)


def _check_form(path: Path, key: MasterKey | None) -> None:
    if is_sealed(path) == (key is not None):
        return
    if key is None:
        raise InputError(f"{path}: is encrypted; set run.encryption_key_file, or {ENVIRONMENT}, to its key")
    raise InputError(
        f"{path}: is not encrypted, but a key is set ({key.origin}); choose another run.name, or run without a key"
    )


@contextmanager
def sealing(target: Path, key: MasterKey | None, context: str) -> Iterator[Path]:
    """A folder for libraries that write files themselves; their weights are sealed on the way into ``target``.

    Without a key it is ``target`` itself. With one it is a private folder below TMPDIR that is gone afterwards.
    """
    target.mkdir(parents=True, exist_ok=True)
    if key is None:
        yield target
        return
    with tempfile.TemporaryDirectory(prefix="siloweave-") as name:
        yield (folder := Path(name))
        for path, relative in _files(folder):
            write_sealed(
                target / relative, path.read_bytes(), key if _holds_weights(path) else None, f"{context}/{relative}"
            )


@contextmanager
def opened(source: Path, key: MasterKey | None, context: str, older: str | None = None) -> Iterator[Path]:
    """A folder for libraries that read files themselves, with the weights of ``source`` in the clear.

    Without a key it is ``source`` itself. With one it is a private copy below TMPDIR that is gone afterwards.

    Raises:
        InputError: see ``read_sealed``.
    """
    if key is None:
        for path, _ in _files(source):
            if _holds_weights(path):
                _check_form(path, key)
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="siloweave-") as name:
        folder = Path(name)
        for path, relative in _files(source):
            mine = key if _holds_weights(path) else None
            before = None if older is None else f"{older}/{relative}"
            _write_private(folder / relative, read_sealed(path, mine, f"{context}/{relative}", before))
        yield folder


def decrypt_tree(source: Path, target: Path, key: MasterKey) -> int:
    """Copies a file or a folder; what is sealed is written in the clear, mode 0600.

    Returns:
        How many sealed files there were.

    Raises:
        InputError: the target exists, there is nothing sealed, or see ``unseal``.
    """
    if target.exists():
        raise InputError(f"{target}: exists; give a path where nothing is yet")
    files = list(_files(source)) if source.is_dir() else [(source, "")]
    if not any(path.is_file() and is_sealed(path) for path, _ in files):
        raise InputError(f"{source}: nothing encrypted there")
    sealed = 0
    try:
        for path, relative in files:
            content = path.read_bytes()
            if is_sealed(path):
                content, sealed = unseal(content, key, None, str(path)), sealed + 1
            _write_private(target / relative, content)
    except BaseException:
        shutil.rmtree(target, ignore_errors=True)
        raise
    return sealed


def _write_private(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content, mode=0o600)


def _files(folder: Path) -> list[tuple[Path, str]]:
    return [(path, path.relative_to(folder).as_posix()) for path in sorted(folder.rglob("*")) if path.is_file()]


def _holds_weights(path: Path) -> bool:
    return path.suffix in SEALED_SUFFIXES
