"""A line that is slow and gets cut: a TCP forwarder, also as an HTTP proxy that knows CONNECT and nothing else."""

import contextlib
import socket
import threading
import time
from dataclasses import dataclass, field

_BLOCK = 2**14


@dataclass
class CutLine:
    """Forwards connections on a loopback port to another one.

    Attributes:
        target: the port to forward to.
        cut_bytes: all connections are cut whenever so many bytes have gone through; 0: never.
        cut_s: and whenever so many seconds have passed; 0: never.
        bytes_per_s: in each direction; 0: as fast as it goes.
        connects: whether it is a proxy, which is told the target by CONNECT; ``target`` is then the only one allowed.
        moved: bytes that went through, up and down together.
        cuts: how often all was cut.
    """

    target: int
    cut_bytes: int = 0
    cut_s: float = 0.0
    bytes_per_s: float = 0.0
    connects: bool = False
    moved: int = 0
    cuts: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _open: set[socket.socket] = field(default_factory=set)
    _since_cut: int = 0
    _free_at: dict[bool, float] = field(default_factory=lambda: {True: 0.0, False: 0.0})

    def __enter__(self) -> "CutLine":
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._over = threading.Event()
        threading.Thread(target=self._accept, daemon=True).start()
        if self.cut_s:
            threading.Thread(target=self._cut_by_time, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._server.close()
        self.cut()

    def cut(self) -> None:
        """Ends all connections with a reset, as where a line breaks."""
        with self._lock:
            ended, self._open, self._since_cut = self._open, set(), 0
            self.cuts += bool(ended)
        for one in ended:
            with contextlib.suppress(OSError):
                one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _cut_by_time(self) -> None:
        while not self._over.wait(self.cut_s):
            self.cut()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._server.accept()
                threading.Thread(target=self._connect, args=(near,), daemon=True).start()

    def _connect(self, near: socket.socket) -> None:
        with contextlib.suppress(OSError):
            if self.connects and not self._told(near):
                near.close()
                return
            far = socket.create_connection(("127.0.0.1", self.target))
            with self._lock:
                self._open |= {near, far}
            for source, sink, up in ((near, far, True), (far, near, False)):
                threading.Thread(target=self._pump, args=(source, sink, up), daemon=True).start()

    def _told(self, near: socket.socket) -> bool:
        head = b""
        while b"\r\n\r\n" not in head and (block := near.recv(_BLOCK)):
            head += block
        allowed = head.startswith(b"CONNECT ") and head.split(b" ")[1].endswith(f":{self.target}".encode())
        near.sendall(b"HTTP/1.1 200 OK\r\n\r\n" if allowed else b"HTTP/1.1 403 Forbidden\r\n\r\n")
        return allowed

    def _pump(self, source: socket.socket, sink: socket.socket, up: bool) -> None:
        with contextlib.suppress(OSError):
            while block := source.recv(_BLOCK):
                self._throttle(len(block), up)
                sink.sendall(block)
                if self._counted(len(block)):
                    self.cut()
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _counted(self, size: int) -> bool:
        with self._lock:
            self.moved += size
            self._since_cut += size
            return 0 < self.cut_bytes <= self._since_cut

    def _throttle(self, size: int, up: bool) -> None:
        if not self.bytes_per_s:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at[up] = max(self._free_at[up], now) + size / self.bytes_per_s
            wait_s = self._free_at[up] - now
        self._over.wait(wait_s)
