"""Freed chunks stay with the process: the C library would give each back to the system and fault it in anew."""

from __future__ import annotations

import ctypes
import sys
from functools import lru_cache

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_ABOVE = 32 << 20  # glibc's own upper limit for the threshold
_TRIM_ABOVE = 256 << 20


@lru_cache(maxsize=1)
def keep_pages() -> None:
    """Tell glibc to serve blocks of chunk size from its heap, and to keep that heap. Elsewhere nothing is done."""
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MMAP_ABOVE)
        mallopt(_M_TRIM_THRESHOLD, _TRIM_ABOVE)
