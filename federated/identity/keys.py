"""Private keys, made where they are used, and the public halves that coordinator and silos exchange.

A public document has a fingerprint over everything in it. Whoever takes one in compares the fingerprint with what the
other side's people read out, on another way than the file came.
"""

import contextlib
import os
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from configs.errors import InputError
from configs.storage.files import sync_directory, write_atomic


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
