"""Times as both ends of a silo's boundary tell them to people."""

from datetime import UTC, datetime

# What Flower's SuperLink allows between its own clock and that of a SuperNode.
MOST_AHEAD_S, MOST_BEHIND_S = 5, 305
CLOCK_RULE = (
    f"Flower turns a SuperNode away that is {MOST_AHEAD_S} s ahead of the coordinator, or {MOST_BEHIND_S} s behind"
)
EXPIRES = "expires"  # the rule of a silo's refusal to answer a request whose time is up


def shown(seconds: float) -> str:
    """Unix seconds in UTC. What no calendar holds is shown as the number that it is."""
    try:
        return datetime.fromtimestamp(seconds, tz=UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"{seconds:g} s after 1970"
