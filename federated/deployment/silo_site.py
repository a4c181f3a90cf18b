"""What a silo's steward makes and confirms: its keys and enrolment, the coordinators it trusts, the silos it knows."""

from pathlib import Path

from configs.errors import InputError
from configs.identities import UnclearIdentityError, canonical
from configs.schema.silo import SiloConfig
from configs.storage.files import private_folder, sync_directory
from configs.storage.layout import SiloFiles, name_on_disk
from federated.identity.cards import (
    CoordinatorCard,
    EnrolledSilo,
    RelayCard,
    TrustedCoordinator,
    fingerprint,
    read_folder,
    write_document,
)
from federated.identity.keys import load_or_create_key
from federated.identity.trust import confirmed_silos
from federated.identity.trust import trust as write_trusted
from federated.identity.x509 import CURVE, Authority, requested_key
from federated.transport.service import ServiceTls
from federated.transport.service_client import AUTHORITY, CERTIFICATE
from privacy.ledger.journal import Journal


def make_identity(config: SiloConfig, journal: Journal, relay: RelayCard, hosts: tuple[str, ...]) -> EnrolledSilo:
    """The silo's keys, its authority and two certificates for mutual TLS with its relay, and its enrolment.

    Args:
        config: the silo's settings.
        journal: the silo's ledger file, whose key signs replies.
        relay: the public halves of its relay's keys.
        hosts: names and addresses of the service, where the relay runs on another machine.
    """
    silo = config.silo
    files = SiloFiles(private_folder(Path(silo.state_dir)))
    tls = private_folder(files.tls)
    authority = Authority(tls / "ca.key", tls / AUTHORITY, f"silo {silo.id}")
    service = load_or_create_key(files.service_key, CURVE).public_key()
    authority.issue(files.service_certificate, service, f"silo {silo.id} service", hosts, "server")
    relay_key = requested_key(relay.certificate_request, "relay.json")
    authority.issue(tls / CERTIFICATE, relay_key, f"silo {silo.id} relay", ("relay",), "client")
    card = EnrolledSilo(silo=silo.id, public_key=journal.signer.public_key, node_key=relay.supernode_key)
    write_document(files.enrolment, card)
    return card


def check_new_id(config: SiloConfig) -> None:
    """Before anything is made for a silo: one that has its keys goes on as it is called.

    Raises:
        InputError: its id is another spelling of an id.
    """
    name, files = config.silo.id, SiloFiles(Path(config.silo.state_dir))
    try:
        form = canonical(name)
    except UnclearIdentityError:
        form = None
    if form != name and not (files.enrolment.exists() or files.ledger.exists()):
        raise InputError(f"silo.id is {name!r}: " + (f"write {form!r}" if form else "that is no name; give one"))


def service_tls(config: SiloConfig) -> ServiceTls:
    """What the service needs to speak mutual TLS.

    Raises:
        InputError: `silo init` has not been run.
    """
    files = SiloFiles(Path(config.silo.state_dir))
    if not files.service_certificate.exists():
        raise InputError(f"{files.service_certificate}: no such certificate; make it with `siloweave silo init`")
    key, certificate, authority = files.service_key, files.service_certificate, files.tls / AUTHORITY
    return ServiceTls(key.read_bytes(), certificate.read_bytes(), authority.read_bytes())


def trust(config: SiloConfig, coordinator: CoordinatorCard) -> Path:
    """From now on the silo answers this coordinator's requests."""
    state_dir = private_folder(Path(config.silo.state_dir))
    return write_trusted(state_dir, TrustedCoordinator(name=coordinator.name, public_key=coordinator.public_key))


def distrust(config: SiloConfig, name: str) -> None:
    """From now on the silo refuses this coordinator's requests. What it has charged stays charged.

    Raises:
        InputError: the silo trusts no coordinator of that name.
    """
    known = _trusted(config)
    paths = [path for path, coordinator in known.items() if coordinator.name == name]
    if not paths:
        names = ", ".join(sorted(coordinator.name for coordinator in known.values())) or "none"
        raise InputError(f"{name!r}: no trusted coordinator has this name (there are {names})")
    for path in paths:
        path.unlink()
        sync_directory(path.parent)


def confirm_silo(config: SiloConfig, silo: EnrolledSilo) -> None:
    """From now on this silo adds updates up with another one.

    Raises:
        InputError: it is this silo itself, or one of its name, or with its key, is there.
    """
    state_dir = private_folder(Path(config.silo.state_dir))
    if silo.silo == config.silo.id:
        raise InputError(f"silo {silo.silo!r}: is this silo itself, whose own key it knows")
    for known in confirmed_silos(state_dir).values():
        if known == silo:
            return
        if known.silo == silo.silo:
            raise InputError(f"silo {silo.silo!r}: is there with other keys; --remove it first, if its steward says so")
        if known.public_key == silo.public_key:
            raise InputError(f"silo {silo.silo!r}: has the key of silo {known.silo!r}; each silo makes its own")
    write_document(_roster_file(private_folder(SiloFiles(state_dir).roster), silo.silo), silo)


def drop_silo(config: SiloConfig, name: str) -> None:
    """From now on this silo adds nothing up with another one.

    Raises:
        InputError: the steward has confirmed no silo of that name.
    """
    state_dir = Path(config.silo.state_dir)
    path = _roster_file(SiloFiles(state_dir).roster, name)
    if not path.exists():
        known = ", ".join(sorted(confirmed_silos(state_dir))) or "none"
        raise InputError(f"silo {name!r}: is not in this silo's roster (there are {known})")
    path.unlink()
    sync_directory(path.parent)


def roster(config: SiloConfig) -> dict[str, str]:
    """Fingerprints of the silos that the steward has confirmed, by name."""
    known = confirmed_silos(Path(config.silo.state_dir))
    return {name: fingerprint(silo) for name, silo in sorted(known.items())}


def _roster_file(folder: Path, name: str) -> Path:
    return folder / f"{name_on_disk(name, safe=' ')}.json"


def trusted(config: SiloConfig) -> dict[str, str]:
    """Public keys of the trusted coordinators by name."""
    return {coordinator.name: coordinator.public_key for coordinator in _trusted(config).values()}


def _trusted(config: SiloConfig) -> dict[Path, TrustedCoordinator]:
    return read_folder(TrustedCoordinator, SiloFiles(Path(config.silo.state_dir)).trusted)
