"""The page for people: one file that needs nothing from elsewhere, and a policy under which nothing else could come."""

import re
from base64 import b64encode
from hashlib import sha256
from importlib.resources import files

from starlette.responses import HTMLResponse


def page() -> HTMLResponse:
    """The page. Browsers run its own script and style, known by their digests, and connect to its service alone."""
    text = files("cluster.serving").joinpath("page.html").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src {_digest(text, 'script')}; style-src {_digest(text, 'style')}; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    kept = {"cache-control": "no-store", "referrer-policy": "no-referrer", "x-content-type-options": "nosniff"}
    return HTMLResponse(text, headers={"content-security-policy": policy, **kept})


def _digest(text: str, element: str) -> str:
    (inside,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
    return f"'sha256-{b64encode(sha256(inside.encode()).digest()).decode()}'"
