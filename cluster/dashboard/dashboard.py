"""A page of figures over HTTP, for one person at this machine: read anew at each look, and nothing can be changed."""

import secrets
from collections.abc import Callable
from contextlib import closing
from functools import cache
from typing import Any

from fastapi import FastAPI, Response
from jinja2 import Environment, PackageLoader

from cluster.serving import server
from cluster.serving.errors import ApiError
from cluster.serving.guard import Guard
from cluster.serving.page import whole_in_itself
from configs.errors import SiloweaveError
from configs.printing import printable, say

REFRESH_S = 15
_HERE = "127.0.0.1"
_AT_ONE_TIME = 8
_SILENT_S, _GRACE_S = 20.0, 5.0


class Dashboard:
    """The page of one silo or federation.

    Its address holds a secret, as loopback is open to every user of a machine, a silo's relay among them, and the
    files from which the figures come are not.

    Args:
        look: gives the figures.
        template: the page's name here.

    Attributes:
        guard: the application.
        path: of the page, with its secret.
    """

    def __init__(self, look: Callable[[], dict[str, Any]], template: str) -> None:
        self._look, self._template, self._secret = look, template, secrets.token_urlsafe(24)
        self.path = f"/{self._secret}"
        app = FastAPI(openapi_url=None, redirect_slashes=False)
        app.get("/{secret}", response_model=None)(self._answer)
        self.guard = Guard(app, None, 0, _AT_ONE_TIME, "open the address that the command has printed, on this machine")
        self.guard.failed = _say_failed

    def _answer(self, secret: str) -> Response:
        if not secrets.compare_digest(secret.encode(), self._secret.encode()):
            said = "no such page; open the address that the command has printed"
            return ApiError(404, said, "not_found").response()
        try:
            found = self._look()
        except SiloweaveError as error:
            return whole_in_itself(rendered(self._template, problem=str(error)), status=503)
        return whole_in_itself(rendered(self._template, found))


def _say_failed(kind: str) -> None:
    """Of what nobody has foreseen the kind alone is told: its message may quote a stranger or a record."""
    said = "which is an error of Siloweave's; the next look reads everything anew"
    say(f"a look at the page has failed ({kind}), {said}", err=True)


def rendered(template: str, found: dict[str, Any] | None = None, problem: str = "") -> str:
    """A page of figures, or of why there are none. Names and reasons in it are strangers' words, and so text alone."""
    return _environment().get_template(template).render(refresh_s=REFRESH_S, found=found, problem=problem)


@cache
def _environment() -> Environment:
    environment = Environment(loader=PackageLoader("cluster.dashboard", "."), autoescape=True, finalize=_shown)
    environment.filters |= {"figure": _figure, "size": _size, "when": _when}
    return environment


def serve(dashboard: Dashboard, port: int, on_ready: Callable[[str], None]) -> None:
    """Serves a page on loopback until SIGTERM or SIGINT.

    Args:
        dashboard: the page.
        port: 0 takes a free one.
        on_ready: is told the page's address.

    Raises:
        InputError: the port is taken.
    """
    with closing(server.listen(_HERE, port, _SILENT_S)) as listener:
        address = f"http://{_HERE}:{listener.getsockname()[1]}{dashboard.path}"
        server.serve(dashboard.guard, listener, _GRACE_S, lambda: on_ready(address))


def _shown(value: Any) -> Any:
    """Signs of direction and control are escaped; markup that the page itself has made is no plain text."""
    return printable(value) if type(value) is str else value


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _size(value: float | None) -> str:
    if value is None:
        return "-"
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} GB"


def _when(text: str | None) -> str:
    return "-" if text is None else text.replace("T", " ").replace("+00:00", "")
