"""What may lie on the way to a coordinator: an HTTP proxy, a forwarder of TCP, and servers with whatever certificate.

All of them count what they carry, and cut it when they are told to.
"""

import contextlib
import select
import socket
import ssl
import threading
from base64 import b64encode
from email.utils import formatdate
from pathlib import Path
from time import time

_BLOCK = 65536


class _Server:
    """Accepts on a loopback port, a thread a connection.

    Attributes:
        listens: host and port; 0 is any that is free.
    """

    listens = ("127.0.0.1", 0)

    def __init__(self) -> None:
        self._listening = socket.create_server(self.listens)
        self.port = self._listening.getsockname()[1]
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                self._hold(connection)
                threading.Thread(target=self._answered, args=(connection,), daemon=True).start()

    def _answered(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._answer(connection)
        self._drop(connection)

    def _answer(self, connection: socket.socket) -> None:
        raise NotImplementedError

    def _hold(self, connection: socket.socket) -> None:
        with self._lock:
            self._open.add(connection)

    def _drop(self, *connections: socket.socket) -> None:
        for connection in connections:
            with self._lock:
                self._open.discard(connection)
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def cut(self) -> None:
        """Ends all connections that are open; new ones are accepted."""
        with self._lock:
            there = list(self._open)
        self._drop(*there)

    def __enter__(self):
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.cut()
        self._thread.join(120)


class Forwarder(_Server):
    """Carries TCP to another port of this machine, as NAT or a load balancer does that doesn't end TLS.

    Attributes:
        up, down: bytes carried to the target and back.
        cut_after: bytes, both directions together, after which a connection is cut; None: never.
        reaches: the host of whatever port it carries to.
    """

    reaches = "127.0.0.1"

    def __init__(self, target: int = 0, cut_after: int | None = None) -> None:
        self.target, self.cut_after = target, cut_after
        self.up = self.down = 0
        super().__init__()

    def _answer(self, connection: socket.socket) -> None:
        self._carry(connection, self.target)

    def _carry(self, near: socket.socket, port: int) -> None:
        far = socket.create_connection((self.reaches, port), timeout=60)
        far.settimeout(None)
        self._hold(far)
        carried = [0]
        back = threading.Thread(target=self._pump, args=(far, near, carried, "down"), daemon=True)
        back.start()
        self._pump(near, far, carried, "up")
        back.join()

    def _pump(self, source: socket.socket, target: socket.socket, carried: list[int], way: str) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(_BLOCK):
                with self._lock:
                    left = len(block) if self.cut_after is None else max(self.cut_after - carried[0], 0)
                    carried[0] += len(block[:left])
                    setattr(self, way, getattr(self, way) + len(block[:left]))
                target.sendall(block[:left])
                if left < len(block):
                    break
        self._drop(source, target)


class ConnectProxy(Forwarder):
    """An HTTP proxy for CONNECT. Whatever name is asked for is on this machine.

    Attributes:
        login: ``USER:PASSWORD`` that is asked for; empty: none.
        refuses: status with which every CONNECT is answered; 0: none.
        inspected_by: port that every tunnel ends at instead, as a proxy does that inspects TLS; 0: none.
        scheme: of the login that it asks for.
        asked: targets of every CONNECT with the right login.
    """

    def __init__(self, login: str = "", refuses: int = 0, inspected_by: int = 0, scheme: str = "Basic") -> None:
        self.login, self.refuses, self.inspected_by, self.scheme = login, refuses, inspected_by, scheme
        self.asked: list[str] = []
        super().__init__()

    def _answer(self, connection: socket.socket) -> None:
        head = b""
        while not head.endswith(b"\r\n\r\n"):  # byte by byte: what follows is the tunnel's
            byte = connection.recv(1)
            if not (byte and (head or byte.isalpha())):  # gone, or no HTTP
                return
            head += byte
        method, target, _ = head.decode("latin-1").split(" ", 2)
        expected = f"proxy-authorization: basic {b64encode(self.login.encode()).decode()}".lower()
        if self.login and expected not in head.decode("latin-1").lower().splitlines():
            _say(connection, f'407 Who\r\nProxy-Authenticate: {self.scheme} realm="site"')
        elif self.refuses or method != "CONNECT":
            _say(connection, f"{self.refuses or 405} No")
        else:
            self.asked.append(target)
            _say(connection, "200 Connection established")
            self._carry(connection, self.inspected_by or int(target.rpartition(":")[2]))


def _say(connection: socket.socket, status: str) -> None:
    ending = "" if status.startswith("200") else "Content-Length: 0\r\nConnection: close\r\n"
    connection.sendall(f"HTTP/1.1 {status}\r\n{ending}\r\n".encode())


def serve_proxy(address: str, port: int, target: str) -> None:
    """A proxy that is a process of its own, on a machine that is not its target's."""

    class Proxy(ConnectProxy):
        listens, reaches = (address, port), target

    with Proxy():
        threading.Event().wait()


class TlsServer(_Server):
    """Shows a certificate to whoever connects, and answers one request of HTTP with 403 and a date.

    Attributes:
        ahead_s: seconds that its clock is ahead of this machine's.
    """

    def __init__(self, certificate: Path, key: Path, ahead_s: float = 0.0) -> None:
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(certificate, key)
        self.ahead_s = ahead_s
        super().__init__()

    def _answer(self, connection: socket.socket) -> None:
        with self._context.wrap_socket(connection, server_side=True) as encrypted:
            encrypted.recv(1000)
            date = formatdate(time() + self.ahead_s, usegmt=True)
            encrypted.sendall(f"HTTP/1.1 403 Forbidden\r\nDate: {date}\r\nContent-Length: 0\r\n\r\n".encode())


class TlsEnder(Forwarder):
    """A load balancer that ends TLS with a certificate of its own, and speaks TLS again with what is behind it."""

    def __init__(self, certificate: Path, key: Path, target: int, authority: Path, host: str) -> None:
        self._outside = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._outside.load_cert_chain(certificate, key)
        self._inside, self._host = ssl.create_default_context(cafile=str(authority)), host
        super().__init__(target)

    def _answer(self, connection: socket.socket) -> None:
        near = self._outside.wrap_socket(connection, server_side=True)
        plain = socket.create_connection(("127.0.0.1", self.target), timeout=60)
        far = self._inside.wrap_socket(plain, server_hostname=self._host)
        self._hold(near)
        self._hold(far)
        with contextlib.suppress(OSError, ValueError):  # the latter of one that was cut
            self._both_ways({near: far, far: near})
        self._drop(near, far)

    @staticmethod
    def _both_ways(other: dict[ssl.SSLSocket, ssl.SSLSocket]) -> None:
        """In one thread: two must not use one TLS connection at a time."""
        while True:
            ready = [one for one in other if one.pending()] or select.select(list(other), [], [])[0]
            for one in ready:
                one.settimeout(0)
                try:
                    block = one.recv(_BLOCK)
                except ssl.SSLWantReadError:
                    continue
                finally:
                    one.settimeout(None)
                if not block:
                    return
                other[one].sendall(block)
