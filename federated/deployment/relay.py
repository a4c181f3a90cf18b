"""A silo's relay: a SuperNode between coordinator and silo service. It sees serialized requests and replies.

It runs as a user of its own, with an environment of its own: nothing that the service's shell holds reaches it.
"""

import os
import ssl
import sys
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from configs.errors import InputError
from configs.schema.deployment import RelayConfig
from configs.storage.files import private_folder, write_atomic
from federated.deployment.flower_programs import LOOPBACK, flower_environment
from federated.deployment.ports import free_port
from federated.deployment.supervisor import Program
from federated.identity.cards import CoordinatorCard, RelayCard, confirm, read_document, write_document
from federated.identity.keys import load_or_create_key, ssh_public_key
from federated.identity.x509 import CURVE, certificate_request, check_x509, read_certificate
from federated.transport.health import is_serving
from federated.transport.service_client import AUTHORITY, CERTIFICATE, KEY

SUPERNODE_CURVE = ec.SECP384R1()
CONNECT_S = 5.0
NODE = "federated.transport.node"
_INHERITED = ("LANG", "LC_ALL", "PYTHONPATH", "TMPDIR")


def make_keys(config: RelayConfig) -> RelayCard:
    """The relay's keys, made where they stay, and their public halves in ``relay.json``."""
    folder = private_folder(Path(config.state_dir))
    supernode = load_or_create_key(folder / "supernode.ssh", SUPERNODE_CURVE)
    tls = load_or_create_key(folder / KEY, CURVE)
    card = RelayCard(supernode_key=ssh_public_key(supernode), certificate_request=certificate_request(tls, "relay"))
    if not (folder / "relay.json").exists():  # signing the same request again gives other bytes
        write_document(folder / "relay.json", card)
    return read_document(RelayCard, folder / "relay.json")


def supernode(config: RelayConfig) -> Program:
    """The SuperNode as a program of the supervisor.

    Raises:
        InputError: keys are missing, the coordinator's document is not the confirmed one, or what answers at its
            address shows a certificate that is not good.
    """
    folder = Path(config.state_dir)
    key = folder / "supernode.ssh"
    if not key.exists():
        raise InputError(f"{key}: no such key; make it with `siloweave silo relay --init`")
    coordinator = read_document(CoordinatorCard, Path(config.coordinator))
    confirm(coordinator, config.coordinator_fingerprint, config.coordinator, lambda _: False)
    check_coordinator(coordinator)
    root = folder / "root.pem"
    write_atomic(root, coordinator.root_certificate.encode(), mode=0o600)
    health = f"{LOOPBACK}:{config.port or free_port()}"
    command = (
        *(sys.executable, "-m", NODE),
        *("--superlink", coordinator.address, "--root-certificates", str(root)),
        *("--key", str(key), "--health", health, "--state", str(folder)),
        *("--silo-address", config.silo_address, "--silo-tls", _silo_tls(config)),
    )
    home = private_folder(folder / "flower")
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}
    environment = {**inherited, **flower_environment(home), "HOME": str(home)}
    listens = ((LOOPBACK, config.port),) if config.port else ()
    return Program("supernode", command, environment, lambda: is_serving(health), listens)


def _silo_tls(config: RelayConfig) -> str:
    """The folder with the relay's key and certificates; nothing for a Unix socket."""
    if config.silo_address.startswith("unix:"):
        return ""
    folder = Path(config.state_dir)
    for name in (CERTIFICATE, AUTHORITY):
        if not (folder / name).exists():
            raise InputError(f"{folder / name}: missing; copy it from the silo's tls folder, where `silo init` put it")
    check_x509(read_certificate(folder / CERTIFICATE), read_certificate(folder / AUTHORITY), CERTIFICATE)
    return str(folder)


def check_coordinator(coordinator: CoordinatorCard) -> None:
    """Says in one line what TLS would say in many; a coordinator that doesn't answer yet is waited for later.

    Raises:
        InputError: what answers shows a certificate of another authority, for another host, or out of its time.
    """
    host, _, port = coordinator.address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        shown = ssl.get_server_certificate((host, int(port)), timeout=CONNECT_S)
    except (OSError, ValueError):
        return
    authority = x509.load_pem_x509_certificate(coordinator.root_certificate.encode())
    check_x509(x509.load_pem_x509_certificate(shown.encode()), authority, coordinator.address, host)
