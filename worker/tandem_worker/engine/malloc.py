"""Keeps freed memory in the process, so that each step does not pay for fresh pages again.

By default glibc hands buffers of this size back to the kernel when they are freed, and the next
step's pages are zeroed anew. Measured on the 5.4 M-parameter demo model, eight sequences decoding
on one core: 24.3 ms a step by default, 9.6 ms with these settings (2026-11-21).
"""

from __future__ import annotations

import ctypes
import logging
import sys

logger = logging.getLogger(__name__)

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_THRESHOLD_BYTES = 32 << 20  # the largest that glibc accepts
_TRIM_THRESHOLD_BYTES = 512 << 20


def keep_freed_memory() -> bool:
    """Tell glibc's malloc; says whether it is there and agreed."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # musl and others have no mallopt
        logger.debug("no mallopt: steps pay for fresh pages")
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES)
        and mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES)
    )
