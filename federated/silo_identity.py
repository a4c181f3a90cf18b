"""What a silo's steward makes and confirms: the silo's keys and enrolment, and the coordinators it trusts."""

import json
from pathlib import Path

from configs.artifacts import sync_directory, write_atomic
from configs.errors import InputError
from configs.silo import SiloConfig
from federated.certificates import CURVE, Authority, requested_key
from federated.keys import (
    CoordinatorCard,
    RelayCard,
    SiloCard,
    load_or_create_key,
    private_folder,
    write_document,
)
from privacy.journal import Journal

TRUSTED, TLS, ENROLMENT = "trusted", "tls", "enrolment.json"


def make_identity(config: SiloConfig, journal: Journal, relay: RelayCard, hosts: tuple[str, ...]) -> SiloCard:
    """The silo's keys, its authority and two certificates for mutual TLS with its relay, and its enrolment.

    Args:
        config: the silo's settings.
        journal: the silo's ledger file, whose key signs replies.
        relay: the public halves of its relay's keys.
        hosts: names and addresses of the service, where the relay runs on another machine.
    """
    silo = config.silo
    state_dir = private_folder(Path(silo.state_dir))
    tls = private_folder(state_dir / TLS)
    authority = Authority(tls, tls, f"silo {silo.id}")
    service = load_or_create_key(tls / "service.key", CURVE).public_key()
    authority.issue(tls / "service.pem", service, f"silo {silo.id} service", hosts, "server")
    relay_key = requested_key(relay.certificate_request, "relay.json")
    authority.issue(tls / "relay.pem", relay_key, f"silo {silo.id} relay", ("relay",), "client")
    card = SiloCard(
        name=silo.id,
        dataset_id=silo.dataset_id,
        public_key=journal.signer.public_key,
        supernode_key=relay.supernode_key,
    )
    write_document(state_dir / ENROLMENT, card)
    return card


def trust(config: SiloConfig, coordinator: CoordinatorCard, fingerprint: str) -> Path:
    """From now on the silo answers this coordinator's requests."""
    path = private_folder(Path(config.silo.state_dir) / TRUSTED) / f"{fingerprint}.json"
    known = coordinator.model_dump(include={"kind", "version", "name", "public_key"})
    write_atomic(path, json.dumps(known, sort_keys=True).encode(), mode=0o600)
    return path


def distrust(config: SiloConfig, fingerprint: str) -> None:
    """From now on the silo refuses this coordinator's requests. What it has charged stays charged.

    Raises:
        InputError: the silo doesn't trust it.
    """
    folder = Path(config.silo.state_dir) / TRUSTED
    path = folder / f"{fingerprint}.json"
    if not path.exists():
        known = ", ".join(trusted(config)) or "none"
        raise InputError(f"{fingerprint}: no trusted coordinator has this fingerprint (there are {known})")
    path.unlink()
    sync_directory(folder)


def trusted(config: SiloConfig) -> dict[str, str]:
    """Names of the trusted coordinators by fingerprint."""
    found = sorted((Path(config.silo.state_dir) / TRUSTED).glob("*.json"))
    return {path.stem: str(json.loads(path.read_bytes())["name"]) for path in found}
