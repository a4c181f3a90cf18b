"""``federation.toml`` and ``relay.toml``: where a coordinator and a silo's relay listen, and whom they reach."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from configs.parse import parse, read_toml
from configs.schema.addresses import LARGEST_PORT, Host, OptionalAddress, OptionalProxy, ReachableHost, ServiceAddress
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
    advertise: OptionalAddress = ""
    """``HOST:PORT`` by which silos reach the coordinator, where it isn't the first host with the proxy's port: behind
    NAT, a forwarded port 443, or a load balancer. It is what ``coordinator.json`` says."""
    advertise_authority: Annotated[str, Place("the authority's certificate", secret=False)] = ""
    """Certificate (PEM) of the authority by which silos know what ends TLS at ``advertise``: a load balancer with a
    certificate of its own. Empty: TLS ends at the proxy, with the federation's own certificate."""
    superlink_port: Port = 0
    """Loopback port of the SuperLink behind the proxy; 0: any free one at each start."""

    @model_validator(mode="after")
    def _ports_differ(self) -> "FederationConfig":
        if self.superlink_port == self.port:
            raise ValueError(f"superlink_port is {self.port}, which is the proxy's port: give another one, or 0")
        return self

    @model_validator(mode="after")
    def _authority_has_an_address(self) -> "FederationConfig":
        if self.advertise_authority and not self.advertise:
            raise ValueError("advertise_authority is given and advertise is not: give its HOST:PORT, too")
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
    proxy: OptionalProxy = ""
    """HTTP proxy that is the site's way out, ``http://HOST:PORT``; empty: none. What HTTPS_PROXY says is not used."""
    proxy_login_file: Annotated[str, Place("the proxy's user and password", secret=False)] = ""
    """File of mode 0600 with USER:PASSWORD for a proxy that asks for them (Basic); empty: it asks for none."""

    @model_validator(mode="after")
    def _login_has_a_proxy(self) -> "RelayConfig":
        if self.proxy_login_file and not self.proxy:
            raise ValueError('proxy_login_file is given and proxy is not: give proxy = "http://HOST:PORT", too')
        return self


def load_federation(folder: Path) -> FederationConfig:
    """Reads and checks a federation's settings; relative paths in it are below its own folder.

    Raises:
        InputError: the folder has none, or a setting does not hold.
    """
    path = folder / FEDERATION_FILE
    tree = rooted(FederationConfig, read_toml(path), folder.resolve(), str(path), fill=True)
    return parse(FederationConfig, tree, str(path))


def load_relay(path: Path) -> RelayConfig:
    """Reads and checks a ``relay.toml``; relative paths in it are below its own folder.

    Raises:
        InputError: it is missing, unreadable, or a setting does not hold.
    """
    tree = rooted(RelayConfig, read_toml(path), path.parent.resolve(), str(path), fill=True)
    return parse(RelayConfig, tree, str(path))
