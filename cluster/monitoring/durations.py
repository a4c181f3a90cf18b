"""Seconds for people, and how many are left."""

import time
from collections import deque
from collections.abc import Callable


def duration(seconds: float) -> str:
    """For instance ``42 s``, ``12 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class Remaining:
    """Estimates the time left from how fast the last positions came.

    A run that is continued starts far from zero, and a restart goes back: what lies before such a jump, and the start
    itself, say nothing about the speed.
    """

    def __init__(self, window: int = 50, clock: Callable[[], float] = time.monotonic) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=window)
        self._clock = clock

    def __call__(self, position: int, total: int) -> float | None:
        """Seconds until ``total``, having just reached ``position``; None as long as the speed is not known."""
        if self._seen and position != self._seen[-1][1] + 1:
            self._seen.clear()
        self._seen.append((self._clock(), position))
        (began, first), (now, last) = self._seen[0], self._seen[-1]
        return None if first == last else (total - last) * (now - began) / (last - first)
