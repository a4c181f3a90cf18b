"""The process: a port, the application behind it, and an end that loses no request that was accepted."""

import asyncio
import errno
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext, suppress
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from cluster.serving.guard import Guard
from configs.errors import InputError

_HEAD_S = 20.0
_LOOK_S = 0.05


def listen(host: str, port: int, silent_s: float, option: str = "--port") -> socket.socket:
    """A socket that listens.

    Args:
        host: name or address.
        port: 0 takes a free one.
        silent_s: after so long without a sign from who should read an answer the connection is given up.
        option: by which the port was given.

    Raises:
        InputError: the port is taken, or this machine has no such address.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.create_server(address[:2], family=family, backlog=1024)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"{option} {port}: {host} has a service there already; give another port, or 0") from None
        raise InputError(
            f"--host {host}, {option} {port}: can't listen there ({error.strerror}); give others"
        ) from None
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silent_s * 1000))
    return listener


class _Protocol(H11Protocol):
    """Who connects and asks nothing is let go."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(_HEAD_S, self._let_go)

    def _let_go(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    """uvicorn without its own signals, which would turn away connections at once."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


Beside = Callable[[], AbstractAsyncContextManager[None]]


def serve(
    guard: Guard, listener: socket.socket, grace_s: float, on_ready: Callable[[], None], beside: Beside = nullcontext
) -> None:
    """Serves until SIGTERM or SIGINT; then until what was accepted has been answered, or the grace has passed.

    Args:
        guard: the application.
        listener: its socket.
        grace_s: longest wait for answers after the signal. A second signal ends it at once.
        on_ready: is called when requests are taken.
        beside: another server of the same loop, whose requests the guard counts, too.
    """
    config = uvicorn.Config(
        guard,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=1,
    )
    asyncio.run(_until_stopped(_Server(config), guard, listener, grace_s, on_ready, beside))


async def _until_stopped(
    server: _Server,
    guard: Guard,
    listener: socket.socket,
    grace_s: float,
    on_ready: Callable[[], None],
    beside: Beside,
) -> None:
    asked, again = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def signalled() -> None:
        (again if asked.is_set() else asked).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signalled)
    async with beside():
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not (server.started or serving.done()):
            await asyncio.sleep(_LOOK_S)
        on_ready()
        await asyncio.wait((serving, stop := asyncio.ensure_future(asked.wait())), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        guard.stopping = True  # new requests get 503, and their clients ask elsewhere
        with suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while guard.active and not again.is_set():
                    await asyncio.sleep(_LOOK_S)
    server.should_exit = True
    await serving
