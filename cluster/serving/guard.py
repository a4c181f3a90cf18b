"""What every request passes first: is there room, who asks, how much do they send, and how slowly."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from ipaddress import ip_address
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.serving.errors import FAILED, ApiError, stopping, too_many
from cluster.serving.keys import LOOPBACK, ApiKeys

OPEN = ("/", "/health")  # to read these two nobody needs a key
_READING = ("GET", "HEAD")
ARRIVAL_S = 20.0


def _from_here(scope: Scope) -> bool:
    """Whether it is this machine that asks, and no other site's page.

    Any page may have a browser ask loopback, also by a name of its own that leads there (DNS rebinding). Without keys
    nothing else tells it from whoever sits at this machine. A proxy on this machine says for whom it asks.
    """
    headers, (client, _) = dict(scope["headers"]), scope.get("client") or ("", 0)
    host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
    with suppress(ValueError):
        own = urlsplit(f"//{host}").hostname in LOOPBACK and (not origin or urlsplit(origin).netloc == host)
        return own and ip_address(client).is_loopback
    return False


@asynccontextmanager
async def arriving() -> AsyncIterator[None]:
    """As long as a request may take to arrive.

    Raises:
        ApiError: it took longer.
    """
    try:
        async with asyncio.timeout(ARRIVAL_S):
            yield
    except TimeoutError:
        raise ApiError(408, f"the request took more than {ARRIVAL_S:g} s to arrive", "timeout") from None


class Guard:
    """Stands before the application.

    Args:
        app: the application.
        keys: whose requests are taken; None: anybody's.
        largest_body: bytes.
        most: requests at one time, waiting ones and those that are still being read included.
        otherwise: what whoever may not ask from elsewhere can do.

    Attributes:
        most: requests at one time.
        active: requests that are being answered.
        stopping: whether new ones are turned away.
        count: is told path and status of each request that has ended.
        failed: is told the kind of an error inside the service.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys | None,
        largest_body: int,
        most: int,
        otherwise: str = "ask at 127.0.0.1, or serve with --api-keys",
    ) -> None:
        self._app, self._keys, self._largest, self.most = app, keys, largest_body, most
        self._otherwise = otherwise
        self.active = 0
        self.stopping = False
        self.count: Callable[[str, int | str], None] = lambda *_: None
        self.failed: Callable[[str], None] = lambda _: None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Takes a request, or refuses it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._guarded(scope, receive, send)

    async def _guarded(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.active += 1
        try:
            self._admit(scope)
            await self._app(scope, await self._with_body(receive), noted)
        except ApiError as error:
            await error.response()(scope, receive, noted)
        except Exception as error:  # its message may quote a prompt: only its kind is told
            self.failed(type(error).__name__)
            if not status:
                await FAILED.response()(scope, receive, noted)
        finally:
            self.active -= 1
            self.count(scope.get("path", ""), status)

    def _admit(self, scope: Scope) -> None:
        headers = dict(scope["headers"])
        if self._keys is None and not _from_here(scope):
            said = f"sender, Host or Origin is none of this machine's; {self._otherwise}"
            raise ApiError(403, said, "not_from_here")
        if scope["path"] in OPEN and scope["method"] in _READING:
            return
        self.admit(headers.get(b"authorization", b""))
        announced = headers.get(b"content-length", b"0")
        if announced.isdigit() and int(announced[:20]) > self._largest:
            raise self._too_large()

    def admit(self, authorization: bytes) -> None:
        """Lets a request in that is counted already, however it has come.

        Args:
            authorization: the header of that name; empty: there is none.

        Raises:
            ApiError: the service stops, the key is missing or wrong, or there are too many requests.
        """
        if self.stopping:
            raise stopping()
        if self._keys is not None and not self._keys.allow(authorization):
            raise ApiError(401, "the API key is missing or wrong; send `Authorization: Bearer KEY`", "invalid_api_key")
        if self.active > self.most:
            raise too_many()

    async def _with_body(self, receive: Receive) -> Receive:
        """The whole body is read before anything else is done: who sends it slowly holds no slot."""
        body = bytearray()
        async with arriving():
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    break
                body += message.get("body", b"")
                if len(body) > self._largest:
                    raise self._too_large()
                if not message.get("more_body", False):
                    break
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        return replay

    def _too_large(self) -> ApiError:
        return ApiError(413, f"a request may have {self._largest} bytes; send less", "request_too_large")
