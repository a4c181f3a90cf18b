"""Private keys, made where they are used, and the public half of one in OpenSSH's format."""

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from configs.errors import InputError
from configs.storage.secrets import load_or_draw


def load_or_create_key(path: Path, curve: ec.EllipticCurve) -> ec.EllipticCurvePrivateKey:
    """An elliptic-curve key in OpenSSH's or OpenSSL's format by the file's name, drawn the first time; mode 0600.

    Raises:
        InputError: the file is no such key, or others than its owner may read it.
    """
    is_ssh = path.suffix == ".ssh"
    style = serialization.PrivateFormat.OpenSSH if is_ssh else serialization.PrivateFormat.PKCS8
    plain = serialization.NoEncryption()
    content = load_or_draw(
        path, lambda: ec.generate_private_key(curve).private_bytes(serialization.Encoding.PEM, style, plain)
    )
    load = serialization.load_ssh_private_key if is_ssh else serialization.load_pem_private_key
    try:
        key = load(content, None)
    except ValueError:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InputError(f"{path}: no elliptic-curve key; put the key's backup back")
    return key


def ssh_public_key(key: ec.EllipticCurvePrivateKey) -> str:
    """The public half in OpenSSH's format."""
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return public.decode()
