"""A coordinator's federation: a folder with its settings, keys, certificates and enrolled silos.

``federation.toml``, ``coordinator.json`` (what silos get), ``keys/`` and ``certificates/``, ``silos/`` (one enrolment
each), ``revoked/`` (those that were taken out), ``state/`` (SuperLink's database, process logs), ``flower/`` (Flower's
own settings).
"""

import contextlib
from functools import cached_property
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    SSHPublicKeyTypes,
    load_ssh_public_key,
)

from configs.errors import InputError
from configs.parse import to_toml
from configs.schema.addresses import join_address
from configs.schema.deployment import FEDERATION_FILE, FederationConfig, load_federation
from configs.storage.files import digest_bytes, private_folder, sync_directory, write_atomic
from configs.storage.layout import name_on_disk
from configs.storage.secrets import load_secret
from federated.deployment.flower_programs import LOOPBACK
from federated.deployment.line.site_proxy import split
from federated.identity.cards import CoordinatorCard, EnrolledSilo, read_document, read_folder, write_document
from federated.identity.keys import load_or_create_key
from federated.identity.trust import COORDINATOR_KEY, ENROLLED, coordinator_signer
from federated.identity.x509 import CURVE, Authority, check_x509, read_certificate

REVOKED = "revoked"
FRESH = (
    "at the site delete supernode.ssh, relay.key and relay.json, then do `siloweave silo relay --init` and "
    "`siloweave silo init` again"
)


class FederationFolder:
    """A folder that ``create`` made.

    Raises:
        InputError: it is no federation's folder.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / FEDERATION_FILE).exists():
            raise InputError(f"{folder}: no {FEDERATION_FILE} there; make it with `siloweave federation init {folder}`")
        self.folder = folder.absolute()
        self.config = load_federation(self.folder)
        self.keys, self.certificates = self.folder / "keys", self.folder / "certificates"
        self.state, self.home = self.folder / "state", self.folder / "flower"
        self.card_file = self.folder / "coordinator.json"

    @classmethod
    def create(cls, folder: Path, config: FederationConfig) -> "FederationFolder":
        """Makes keys and certificates; a folder that is one already is left as it is.

        Raises:
            InputError: the folder is a federation with other settings, or its name is not UTF-8.
        """
        if any("\ud800" <= sign <= "\udfff" for sign in str(folder.absolute())):
            # Flower's settings name it, and TOML is UTF-8.
            raise InputError(f"{folder}: the folder's name is not UTF-8; choose another one")
        if (folder / FEDERATION_FILE).exists():
            if load_federation(folder) != config:
                raise InputError(
                    f"{folder / FEDERATION_FILE}: is there with other settings; edit it, or choose a folder"
                )
        else:
            coordinator_signer(private_folder(folder))
            write_atomic(folder / FEDERATION_FILE, to_toml(config).encode())
        federation = cls(folder)
        for part in (federation.keys, federation.certificates, federation.state, federation.home):
            private_folder(part)
        federation.renew_certificates()
        federation.renew_card()
        return federation

    @cached_property
    def authority(self) -> Authority:
        """Signs the certificates of proxy and SuperLink."""
        return Authority(self.keys / "ca.key", self.certificates / "ca.pem", f"{self.config.name} authority")

    @property
    def card(self) -> CoordinatorCard:
        """What silos know this coordinator by."""
        load_secret(self.folder / COORDINATOR_KEY)  # never a new one in silence
        return CoordinatorCard(
            name=self.config.name,
            public_key=coordinator_signer(self.folder).public_key,
            address=self.config.advertise or join_address(self.config.hosts[0], self.config.port),
            root_certificate=self._root_certificate(),
        )

    def _root_certificate(self) -> str:
        if not self.config.advertise_authority:
            return self.authority.path.read_text(encoding="ascii")
        certificate = read_certificate(Path(self.config.advertise_authority))  # one, and nothing beside it
        return certificate.public_bytes(Encoding.PEM).decode()

    def renew_card(self) -> bool:
        """Writes ``coordinator.json`` anew where the settings say something else; whether they did."""
        with contextlib.suppress(InputError):  # none is there, or a damaged one
            if read_document(CoordinatorCard, self.card_file) == self.card:
                return False
        write_document(self.card_file, self.card)
        return True

    def renew_certificates(self) -> None:
        """Certificates of the proxy (for silos) and of the SuperLink behind it (for loopback), where they are due."""
        private_folder(self.keys)
        advertised = {split(self.config.advertise)[0]} if self.config.advertise else set()
        outside = (*self.config.hosts, *sorted(advertised - set(self.config.hosts)))
        for name, hosts in (("proxy", outside), ("superlink", ("localhost", LOOPBACK))):
            key = load_or_create_key(self.keys / f"{name}.key", CURVE).public_key()
            path = self.certificates / f"{name}.pem"
            self.authority.issue(path, key, f"{self.config.name} {name}", hosts, "server")
            check_x509(read_certificate(path), self.authority.certificate, str(path), hosts[0])

    def silos(self) -> dict[str, EnrolledSilo]:
        """The enrolled silos by name."""
        return {card.silo: card for card in read_folder(EnrolledSilo, self.folder / ENROLLED).values()}

    def enrol(self, card: EnrolledSilo) -> None:
        """Takes a silo in. The federation may be running: it is registered within seconds.

        Raises:
            InputError: a silo of that name, or with one of its keys, is there; or its relay's key was revoked.
        """
        if self._is_revoked(card):
            raise InputError(f"silo {card.silo!r}: its relay's key was revoked, and no key is taken twice; {FRESH}")
        for known in self.silos().values():
            if known == card:
                return
            if known.silo == card.silo:
                raise InputError(
                    f"silo {card.silo!r} is enrolled with other keys; revoke it first, if its steward says so"
                )
            if known.public_key == card.public_key or _key(known) == _key(card):
                raise InputError(f"silo {card.silo!r}: has a key of silo {known.silo!r}; each silo makes its own")
        write_document(self._card_path(card.silo), card)

    def revoke(self, name: str) -> None:
        """Takes a silo out: its SuperNode is turned away within seconds, its replies from then on are refused.

        Raises:
            InputError: no such silo.
        """
        path = self._card_path(name)
        if not path.exists():
            known = ", ".join(sorted(self.silos())) or "none"
            raise InputError(f"silo {name!r}: is not enrolled (there are {known})")
        with contextlib.suppress(InputError):  # a damaged one goes, too
            card = read_document(EnrolledSilo, path)
            write_document(self._revoked_path(card), card)
        path.unlink()
        sync_directory(path.parent)

    def _card_path(self, name: str) -> Path:
        return self.folder / ENROLLED / f"{name_on_disk(name, safe=' ')}.json"

    def _is_revoked(self, card: EnrolledSilo) -> bool:
        """Whether its relay's key was; versions of before named a document by the key as the card spelt it."""
        key = _key(card)
        for known in read_folder(EnrolledSilo, self.folder / REVOKED).values():
            with contextlib.suppress(InputError):  # what is no key is nobody's
                if _key(known) == key:
                    return True
        return False

    def _revoked_path(self, card: EnrolledSilo) -> Path:
        return self.folder / REVOKED / f"{digest_bytes(_key(card))}.json"


def node_key(card: EnrolledSilo) -> SSHPublicKeyTypes:
    """Its relay's key.

    Raises:
        InputError: it is none.
    """
    try:
        return load_ssh_public_key(card.node_key.encode())
    except (ValueError, UnsupportedAlgorithm):
        raise InputError(f"silo {card.silo!r}: its node_key is no OpenSSH public key") from None


def _key(card: EnrolledSilo) -> bytes:
    """Its relay's key as OpenSSH writes it, without a comment: one text for each key, however a card spells it."""
    return node_key(card).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
