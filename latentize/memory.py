"""Give freed memory back to the system, between steps that need much of it."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable


def release() -> None:
    """Collect garbage, and return the pages that the C library keeps of freed tensors, where it is glibc.

    Tensors of up to 32 MiB come from its heaps, which stay as large as they ever were while anything lies at their end.
    """
    gc.collect()
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # other C libraries
        return None
    return found
