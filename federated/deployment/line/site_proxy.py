"""The HTTP proxy that is a site's only way out.

Only the setting counts. A variable such as HTTPS_PROXY is set for whatever else runs on the machine: it would reroute
silo and coordinator without a word in the relay's settings.
"""

import socket
from base64 import b64encode
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.parse import quote

from configs.errors import InputError, SiloweaveError
from configs.schema.addresses import check_address, join_address
from configs.schema.deployment import RelayConfig
from configs.storage.secrets import read_secret
from federated.deployment.flower_programs import LOOPBACKS

CONNECT_S = 5.0
_PREFIX = "http://"
_NO_LOGIN = "no such file; write USER:PASSWORD into it, mode 0600"


class UnreachableError(SiloweaveError):
    """Nobody answers at the moment. A relay tries again; exit status 1."""


@dataclass(frozen=True)
class SiteProxy:
    """A proxy that opens tunnels (HTTP CONNECT).

    Attributes:
        address: ``HOST:PORT``.
        login: ``USER:PASSWORD``, or nothing. Never printed.
    """

    address: str
    login: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"{_PREFIX}{self.address}"

    def environment(self) -> dict[str, str]:
        """What the relay's node is told: httpx reads these.

        gRPC reads a proxy's name only in small letters. So what speaks gRPC at the site (the silo service on another
        machine, health) never comes to the proxy.
        """
        login = ":".join(quote(part, safe="") for part in self.login.split(":", 1)) + "@" if self.login else ""
        direct = dict.fromkeys(("NO_PROXY", "no_proxy"), ",".join(LOOPBACKS))
        return {"HTTPS_PROXY": f"{_PREFIX}{login}{self.address}", **direct}

    def tunnel(self, address: str) -> socket.socket:
        """A connection to ``HOST:PORT`` behind the proxy.

        Raises:
            InputError: the proxy wants another login, or connects nobody there.
            UnreachableError: the proxy doesn't answer, or does not reach the address.
        """
        try:
            connection = socket.create_connection(check_address(self.address, "proxy"), timeout=CONNECT_S)
        except OSError as error:
            raise UnreachableError(f"proxy {self}: not reachable ({reason(error)}); is this its address?") from None
        try:
            self._open(connection, address)
        except BaseException:
            connection.close()
            raise
        return connection

    def _open(self, connection: socket.socket, address: str) -> None:
        lines = [f"CONNECT {address} HTTP/1.1", f"Host: {address}"]
        if self.login:
            lines.append(f"Proxy-Authorization: Basic {b64encode(self.login.encode()).decode()}")
        answer = HTTPResponse(connection, method="CONNECT")
        try:
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            answer.begin()
        except (OSError, HTTPException, ValueError) as error:
            said = f"proxy {self}: gives no answer that HTTP has ({reason(error)}); is this an HTTP proxy?"
            raise UnreachableError(said) from None
        if not HTTPStatus.OK <= answer.status < HTTPStatus.MULTIPLE_CHOICES:
            self._refused(answer, address)

    def _refused(self, answer: HTTPResponse, address: str) -> None:
        status = shown_status(answer.status)
        if answer.status >= HTTPStatus.INTERNAL_SERVER_ERROR:
            raise UnreachableError(f"proxy {self}: does not reach the coordinator at {address} ({status})")
        if answer.status != HTTPStatus.PROXY_AUTHENTICATION_REQUIRED:
            raise InputError(
                f"proxy {self}: refuses to connect to {address} ({status}); have whoever runs it allow CONNECT to there"
            )
        offered = [value.split(" ")[0].lower() for value in answer.headers.get_all("Proxy-Authenticate", [])]
        if offered and "basic" not in offered:
            raise InputError(
                f"proxy {self}: asks for a login that is not Basic ({status}); have whoever runs it let this machine "
                "through, or put a proxy between that can do it"
            )
        fix = "set the login in" if self.login else "give USER:PASSWORD by"
        raise InputError(
            f"proxy {self}: {'refuses the' if self.login else 'asks for a'} login ({status}); {fix} proxy_login_file"
        )


def site_proxy(config: RelayConfig) -> SiteProxy | None:
    """The proxy of a relay's settings with its login; None where the site has none.

    Raises:
        InputError: the login's file can't be read, is open to others, or holds something else.
    """
    if not config.proxy:
        return None
    address = config.proxy.removeprefix(_PREFIX)
    return SiteProxy(address, _login(Path(config.proxy_login_file)) if config.proxy_login_file else "")


def connected(address: str, proxy: SiteProxy | None) -> socket.socket:
    """A connection to ``HOST:PORT``, as the SuperNode would make it.

    Raises:
        InputError: as ``SiteProxy.tunnel``.
        UnreachableError: nobody answers.
    """
    host, port = split(address)
    if proxy is not None and host not in LOOPBACKS:
        return proxy.tunnel(join_address(host, port))
    try:
        return socket.create_connection((host, port), timeout=CONNECT_S)
    except OSError as error:
        raise UnreachableError(f"{address}: the coordinator is not reachable ({reason(error)})") from None


def split(address: str) -> tuple[str, int]:
    """Host and port of a coordinator's document; earlier versions wrote an IPv6 address without brackets."""
    host, _, port = address.rpartition(":")
    return host.removeprefix("[").removesuffix("]"), int(port)


def reason(error: Exception) -> str:
    """Why a connection failed, shortly, in nobody else's words."""
    return (error.strerror if isinstance(error, OSError) else None) or type(error).__name__


def shown_status(status: int) -> str:
    """A status of HTTP with its own name: what a proxy writes beside it is a stranger's text."""
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


def _login(path: Path) -> str:
    try:
        text = read_secret(path, _NO_LOGIN).decode().rstrip("\r\n")
    except UnicodeDecodeError:
        text = ""
    user, colon, _ = text.partition(":")
    if not (user and colon and text.isprintable()):
        raise InputError(f"{path}: does not hold USER:PASSWORD on one line; write it anew")
    return text
