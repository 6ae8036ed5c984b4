"""Memory allocator settings: freed memory is given back."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys


def release_freed_memory() -> None:
    """Free what nobody refers to, and give it back to the system where the C library would keep it for later
    (Linux, glibc): who waits for hours between large messages has no use for the room that they took.
    """
    gc.collect()
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
