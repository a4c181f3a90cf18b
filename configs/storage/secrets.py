"""Secrets in files: drawn once, mode 0600, and refused where anyone but their owner can reach them.

A link is followed, since a key may be mounted or shared by one, and the mode of the file behind it is checked. Its
owner is not: a container's root reads the key of the user who mounts it, and the mode lets only the owner and root read
it.
"""

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from configs.errors import InputError
from configs.storage.files import unreadable, write_new

KEY_BYTES = 32
LARGEST_SECRET_BYTES = 4096

_LOST = "no such key, and a new one would not be the same; put its backup back"
_OTHERS = 0o077


def load_or_create_secret(path: Path) -> bytes:
    """A 32-byte secret, drawn from the operating system the first time.

    Raises:
        InputError: the file is not a secret of ours, or see ``read_secret``.
    """
    return _of_length(path, load_or_draw(path, lambda: os.urandom(KEY_BYTES)))


def load_secret(path: Path) -> bytes:
    """A 32-byte secret that was drawn before.

    Raises:
        InputError: it is not a secret of ours, or see ``read_secret``.
    """
    return _of_length(path, read_secret(path))


def _of_length(path: Path, content: bytes) -> bytes:
    if len(content) != KEY_BYTES:
        raise InputError(f"{path}: {len(content)} bytes, a key has {KEY_BYTES}; put the key's backup back")
    return content


def load_or_draw(path: Path, draw: Callable[[], bytes]) -> bytes:
    """A secret's file, written with what ``draw`` returns where there is none; all who draw at once get the same one.

    Raises:
        InputError: see ``read_secret``.
        SiloweaveError: it can't be written.
    """
    if not os.path.lexists(path):  # a link that leads nowhere is a lost secret
        with contextlib.suppress(FileExistsError):  # another process was first: its secret counts
            write_new(path, draw(), mode=0o600)
    return read_secret(path)


def read_secret(path: Path, missing: str = _LOST) -> bytes:
    """What a secret's file holds.

    Args:
        path: the file.
        missing: what to say where there is none.

    Raises:
        InputError: it is missing, no file, too large, this process may not read it, or others than its owner may read
            or change it.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe would keep us waiting
    except FileNotFoundError:
        raise InputError(f"{path}: {missing}") from None
    except PermissionError:
        raise InputError(unreadable(path)) from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}); put the key's file there") from None
    try:  # the file that is checked is the one that is read, even if the name leads elsewhere by now
        _check_private(path, os.fstat(handle).st_mode)
        content = os.read(handle, LARGEST_SECRET_BYTES + 1)
    finally:
        os.close(handle)
    if len(content) > LARGEST_SECRET_BYTES:
        raise InputError(f"{path}: more than {LARGEST_SECRET_BYTES} bytes, and so no key; put the key's file there")
    return content


def _check_private(path: Path, mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise InputError(f"{path}: is no regular file; put the key's file there")
    if mode & _OTHERS:
        raise InputError(
            f"{path}: mode {mode & 0o777:o} lets others read it or change it; `chmod 600` it if it is still a secret"
        )
