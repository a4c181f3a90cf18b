"""The page for people: one file that needs nothing from elsewhere, and a policy under which nothing else could come."""

import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files

from starlette.responses import HTMLResponse


def page() -> HTMLResponse:
    """The page of served models, whose script connects to its own service."""
    text = files("cluster.serving").joinpath("page.html").read_text(encoding="utf-8")
    return whole_in_itself(text, f"script-src {_digest(text, 'script')}; connect-src 'self'; ")


def whole_in_itself(text: str, also: str = "", status: int = 200) -> HTMLResponse:
    """A page under a policy by which it needs nothing from elsewhere.

    Args:
        text: the page, with one element ``style``.
        also: what its policy lets in beside that style, known by its digest; without it no script runs.
        status: of HTTP.
    """
    policy = (
        f"default-src 'none'; {also}style-src {_digest(text, 'style')}; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    kept = {"cache-control": "no-store", "referrer-policy": "no-referrer", "x-content-type-options": "nosniff"}
    return HTMLResponse(text, status, {"content-security-policy": policy, **kept})


def _digest(text: str, element: str) -> str:
    """Of the one element of its kind; an element that were to come later would have no digest, and no effect."""
    (inside,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
    return f"'sha256-{b64encode(sha256(inside.encode()).digest()).decode()}'"
