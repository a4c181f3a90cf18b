"""Times as both ends of a silo's boundary tell them to people."""

from datetime import UTC, datetime

EXPIRES = "expires"  # the rule of a silo's refusal to answer a request whose time is up


def shown(seconds: float) -> str:
    """Unix seconds in UTC. What no calendar holds is shown as the number that it is."""
    try:
        return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"{seconds:g} s after 1970"
