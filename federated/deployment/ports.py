"""Ports of this machine: a free one, and who holds one that is not."""

import contextlib
import errno
import ipaddress
import os
import socket
from pathlib import Path

import psutil

from configs.errors import InputError
from configs.schema.addresses import check_address, check_service, join_address


def free_port() -> int:
    """A loopback port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_free(host: str, port: int) -> None:
    """Looks whether a server can listen there.

    Raises:
        InputError: the port is taken, by which process where the system tells it; or it is not for this user, or the
            host not of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InputError(f"{host}: no address of this name ({error.strerror}); give one of this machine") from None
    try:
        with socket.socket(family) as probe:
            # As servers do: connections that have just ended don't hold a port.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            probe.bind(address)
    except OSError as error:
        raise InputError(f"{join_address(host, port)}: {_why(error, str(address[0]), port)}") from None


def check_place(unix: Path | None, address: str | None) -> str:
    """Where a silo's service is told to listen, as gRPC writes it: one of both is given.

    Raises:
        InputError: it is no such place, or see ``check_free``.
    """
    if unix is not None:
        check_service(f"unix:{unix.absolute()}", "--socket")
        return f"unix:{unix}"
    check_free(*check_address(str(address), "--address"))
    return str(address)


def _why(error: OSError, host: str, port: int) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} is taken by {_holder(host, port)}; end that, or choose another port"
    if error.errno == errno.EACCES:
        return f"port {port} is not for this user, since it is below 1024; choose a higher one, or let the user bind it"
    return f"can't listen there ({error.strerror or error}); give an address of this machine"


def _holder(host: str, port: int) -> str:
    """The process that listens on a port, for people."""
    with contextlib.suppress(psutil.Error, OSError):
        for found in psutil.net_connections("tcp"):
            if (
                found.laddr
                and found.status == psutil.CONN_LISTEN
                and found.laddr.port == port
                and _same(found.laddr.ip, host)
            ):
                return _described(found.pid)
    return _described(None)


def _same(listening: str, host: str) -> bool:
    ours, theirs = ipaddress.ip_address(host), ipaddress.ip_address(listening.removeprefix("::ffff:"))
    return ours == theirs or ours.is_unspecified or theirs.is_unspecified


def _described(pid: int | None) -> str:
    if pid is None:
        return f"a process that the system does not tell user {os.geteuid()} of"
    with contextlib.suppress(psutil.Error):
        return f"process {pid} ({psutil.Process(pid).name()})"
    return f"process {pid}"
