"""Times as both ends of a silo's boundary tell them to people."""

import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

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


def ahead_of(date: str | None) -> float | None:
    """Seconds that this machine's clock is ahead of who has sent an HTTP date just now; None where it is no date."""
    try:
        return time.time() - parsedate_to_datetime(date or "").timestamp()
    except (ValueError, TypeError, OverflowError):
        return None


def clock_problem(ahead_s: float | None) -> str:
    """What to do about a clock that Flower turns away; empty where it doesn't, or where nothing is known.

    Args:
        ahead_s: of a relay's clock against its coordinator's.
    """
    # A date has whole seconds, and took a while to come: less than two seconds over the bound may be the line's.
    if ahead_s is None or -MOST_BEHIND_S < ahead_s < MOST_AHEAD_S + 2:
        return ""
    own = time.time()
    return (
        f"this machine's clock says {shown(own)}, the coordinator's {shown(own - ahead_s)}: set the one that is wrong; "
        f"{CLOCK_RULE}"
    )
