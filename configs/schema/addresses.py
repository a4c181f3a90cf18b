"""Hosts, ports and addresses, checked where they enter: before a key or a certificate is made for them."""

import ipaddress
import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, ValidationInfo

from configs.errors import LARGEST_ECHO, InputError

LARGEST_PORT = 65535
_LONGEST_NAME = 253  # RFC 1035, 2.3.4, without the length bytes at both ends
_LABEL = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)")
_NOT_IN_SOCKETS = "?#%"  # gRPC reads a socket's path as that of a URI


def check_host(text: str, what: str) -> str:
    """A host name by the rules of DNS, or an IPv4 or IPv6 address.

    Args:
        text: as it was given.
        what: the setting or option, for the message.

    Returns:
        The text.

    Raises:
        InputError: it is none of these.
    """
    if _address(text) is None and not _is_name(text):
        raise InputError(
            f"{what} is {_echo(text)}: no host; give a name of letters, digits and hyphens such as fed.example.org "
            "(its xn-- form where it has other signs), an IPv4 address, or an IPv6 address without brackets and zone"
        )
    return text


def check_reachable(text: str, what: str) -> str:
    """A host that others can connect to.

    Raises:
        InputError: it is no host, or an address that stands for all or for several.
    """
    address = _address(check_host(text, what))
    if address is not None and (address.is_unspecified or address.is_multicast or str(address) == "255.255.255.255"):
        raise InputError(f"{what} is {_echo(text)}: nobody can connect to this address; give the machine's own")
    return text


def check_address(text: str, what: str) -> tuple[str, int]:
    """``HOST:PORT``, with an IPv6 address in brackets.

    Returns:
        Host, without brackets, and port.

    Raises:
        InputError: it is none.
    """
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal() and len(port) <= 5 and 1 <= int(port) <= LARGEST_PORT):
        raise InputError(f"{what} is {_echo(text)}: give HOST:PORT with a port from 1 to {LARGEST_PORT}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise InputError(f"{what} is {_echo(text)}: write an IPv6 address as [ADDRESS]:PORT")
    return check_host(host, what), int(port)


def join_address(host: str, port: int) -> str:
    """The address that ``check_address`` reads."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_proxy(text: str, what: str) -> str:
    """``http://HOST:PORT`` of an HTTP proxy; empty: none.

    Raises:
        InputError: it is something else, or holds a user or a password, which messages would repeat.
    """
    if "@" in text:
        raise InputError(f"{what}: holds a user or a password; write USER:PASSWORD into a file of mode 0600 instead")
    if text and not text.startswith("http://"):
        raise InputError(f"{what} is {_echo(text)}: give http://HOST:PORT, as a proxy for CONNECT has it")
    if text:
        check_address(text.removeprefix("http://").removesuffix("/"), what)
    return text.removesuffix("/")


def check_service(text: str, what: str) -> str:
    """Where a silo's service listens: ``unix:/ABSOLUTE/PATH``, or ``HOST:PORT``.

    Raises:
        InputError: it is neither, or gRPC would look for the socket elsewhere.
    """
    if not text.startswith("unix:"):
        check_address(text, what)
        return text
    path = text.removeprefix("unix:")
    if not Path(path).is_absolute() or any(sign in path for sign in (*_NOT_IN_SOCKETS, "\0")):
        raise InputError(
            f"{what} is {_echo(text)}: give unix: and a socket's absolute path without any of {_NOT_IN_SOCKETS}"
        )
    return text


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text) if "%" not in text else None  # a zone means something on one machine alone
    except ValueError:
        return None


def _is_name(text: str) -> bool:
    labels = text.split(".")
    # A name that ends in a number is a mistyped address (RFC 1123, 2.1).
    return (
        len(text) <= _LONGEST_NAME
        and all(_LABEL.fullmatch(label) for label in labels)
        and re.fullmatch(r"[0-9]+|0[xX][0-9a-fA-F]*", labels[-1]) is None
    )


def _echo(text: str) -> str:
    return repr(text) if len(text) <= LARGEST_ECHO else f"{text[:LARGEST_ECHO]!r}..."


def _host(text: str, info: ValidationInfo) -> str:
    return check_host(text, str(info.field_name))


def _reachable(text: str, info: ValidationInfo) -> str:
    return check_reachable(text, str(info.field_name))


def _optional(text: str, info: ValidationInfo) -> str:
    if text:
        check_reachable(check_address(text, str(info.field_name))[0], str(info.field_name))
    return text


def _proxy(text: str, info: ValidationInfo) -> str:
    return check_proxy(text, str(info.field_name))


def _service(text: str, info: ValidationInfo) -> str:
    return check_service(text, str(info.field_name))


Host = Annotated[str, AfterValidator(_host)]
ReachableHost = Annotated[str, AfterValidator(_reachable)]
OptionalAddress = Annotated[str, AfterValidator(_optional)]
OptionalProxy = Annotated[str, AfterValidator(_proxy)]
ServiceAddress = Annotated[str, AfterValidator(_service)]
