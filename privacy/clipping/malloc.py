"""How this process takes memory from the system between training steps."""

import ctypes
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST_KEPT = 2**23  # bytes of a block: larger ones would leave holes that cost more memory than they save time
_MOST_KEPT = 2**30  # bytes


@cache
def keep_freed_memory() -> None:
    """Has glibc keep what one step frees for the next one, as long as the process lives; elsewhere nothing.

    By itself glibc gives large blocks back, and each step pays for new pages, which the system fills with zeros. What a
    private step holds beside a plain one, the factors of the per-record gradients, is all of that size.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, _MOST_KEPT)
