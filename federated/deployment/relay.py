"""A silo's relay: a SuperNode between coordinator and silo service. It sees serialized requests and replies.

It runs as a user of its own, with an environment of its own: nothing that the service's shell holds reaches it.
"""

import os
import sys
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec

from configs.errors import InputError
from configs.schema.deployment import RelayConfig
from configs.storage.files import private_folder, write_atomic
from federated.deployment.flower_programs import LOOPBACK, flower_environment
from federated.deployment.line.coordinator_check import check_coordinator
from federated.deployment.line.site_proxy import site_proxy
from federated.deployment.ports import free_port
from federated.deployment.supervisor import Program
from federated.identity.cards import CoordinatorCard, RelayCard, confirm, read_document, write_document
from federated.identity.keys import load_or_create_key, ssh_public_key
from federated.identity.x509 import CURVE, certificate_request, check_x509, read_certificate
from federated.transport.health import is_serving
from federated.transport.service_client import AUTHORITY, CERTIFICATE, KEY

SUPERNODE_CURVE = ec.SECP384R1()
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
        InputError: keys or the proxy's login are missing, or the coordinator's document is not the confirmed one.
    """
    folder = Path(config.state_dir)
    key = folder / "supernode.ssh"
    if not key.exists():
        raise InputError(f"{key}: no such key; make it with `siloweave silo relay --init`")
    coordinator, proxy = _confirmed(config), site_proxy(config)
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
    environment |= proxy.environment() if proxy else {}
    listens = ((LOOPBACK, config.port),) if config.port else ()
    return Program("supernode", command, environment, lambda: is_serving(health), listens)


def look(config: RelayConfig) -> str:
    """What was found on the way to the coordinator, in one line.

    Raises:
        InputError: see ``check_coordinator``; or as ``supernode``.
        UnreachableError: nobody answers at the moment.
    """
    coordinator, proxy = _confirmed(config), site_proxy(config)
    way = check_coordinator(coordinator, proxy)
    clock = "told no time" if way.ahead_s is None else f"its clock and this one differ by {abs(way.ahead_s):.0f} s"
    through = f" through proxy {proxy}" if proxy else ""
    return f"{coordinator.address}: reached{through}; certificate valid for {way.certificate_days_left} days; {clock}"


def _confirmed(config: RelayConfig) -> CoordinatorCard:
    coordinator = read_document(CoordinatorCard, Path(config.coordinator))
    confirm(coordinator, config.coordinator_fingerprint, config.coordinator, lambda _: False)
    return coordinator


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
