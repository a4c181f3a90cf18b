"""``federation.toml`` and ``relay.toml``: where a coordinator and a silo's relay listen, and whom they reach."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from configs.parse import parse, read_toml
from configs.schema.addresses import LARGEST_PORT, Host, ReachableHost, ServiceAddress
from configs.schema.base import Settings
from configs.schema.places import Place, rooted

FEDERATION_FILE = "federation.toml"
Port = Annotated[int, Field(ge=0, le=LARGEST_PORT)]


class FederationConfig(Settings):
    """A coordinator's federation, in its folder's ``federation.toml``."""

    name: Annotated[str, Field(min_length=1, max_length=100)]
    """The federation's name, as silos see it."""
    hosts: Annotated[tuple[ReachableHost, ...], Field(min_length=1)]
    """Names and addresses by which silos reach the coordinator; the first one is what enrolments say."""
    listen: Host = "0.0.0.0"  # noqa: S104  (silos come from elsewhere)
    """Address that the proxy listens on."""
    port: Annotated[int, Field(ge=1, le=LARGEST_PORT)] = 9092
    """Port of the proxy: the only one that silos reach."""
    superlink_port: Port = 0
    """Loopback port of the SuperLink behind the proxy; 0: any free one at each start."""

    @model_validator(mode="after")
    def _ports_differ(self) -> "FederationConfig":
        if self.superlink_port == self.port:
            raise ValueError(f"superlink_port is {self.port}, which is the proxy's port: give another one, or 0")
        return self


class RelayConfig(Settings):
    """A silo's relay: the SuperNode that stands between coordinator and silo service."""

    state_dir: Annotated[str, Place("the relay's keys", made=True)]
    """Folder of the relay's keys and logs; it belongs to the relay's user."""
    coordinator: Annotated[str, Place("the coordinator.json", secret=False)]
    """The coordinator's ``coordinator.json``: its address, key and root certificate, all public."""
    coordinator_fingerprint: str
    """Its fingerprint, as the coordinator's people confirmed it over another channel than the one the file came by."""
    silo_address: ServiceAddress
    """The silo service: ``unix:/run/siloweave/NAME/silo.sock``, or ``HOST:PORT`` with mutual TLS."""
    port: Port = 0
    """Loopback port on which the relay's process says that it is well; 0: any free one at each start."""


def load_federation(folder: Path) -> FederationConfig:
    """Reads and checks a federation's settings.

    Raises:
        InputError: the folder has none, or a setting does not hold.
    """
    path = folder / FEDERATION_FILE
    return parse(FederationConfig, read_toml(path), str(path))


def load_relay(path: Path) -> RelayConfig:
    """Reads and checks a ``relay.toml``; relative paths in it are below its own folder.

    Raises:
        InputError: it is missing, unreadable, or a setting does not hold.
    """
    tree = rooted(RelayConfig, read_toml(path), path.parent.resolve(), str(path), fill=True)
    return parse(RelayConfig, tree, str(path))
