"""How this process takes memory from the system between training steps."""

import ctypes
from functools import cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = (2**30, 2**25)  # bytes; older versions of glibc take no more than the second


@cache
def keep_freed_memory() -> None:
    """Has glibc keep what one step frees for the next one, as long as the process lives; elsewhere nothing.

    By itself it gives large blocks back, and each step pays for new pages, which the system fills with zeros: what a
    private step holds beside a plain one, the factors of the per-record gradients, is all of that size.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return
    for option in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
        any(mallopt(option, size) for size in _LARGEST)
