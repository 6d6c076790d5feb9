"""Small memory: give freed pages back between steps that need much, and look at large tensors without copies."""

from __future__ import annotations

import ctypes
import functools
import gc
from collections.abc import Callable

from torch import Tensor


def release() -> None:
    """Collect garbage, and return the pages that the C library keeps of freed tensors, where it is glibc.

    Tensors of up to 32 MiB come from its heaps, which stay as large as they ever were while anything lies at their end.
    """
    gc.collect()
    trim()


def trim() -> None:
    """Return the pages alone. Cheap enough for between two experts, whose tensors would pile up in the heap.

    Before its version 2.38 glibc hardly uses the place of a freed aligned tensor again.
    """
    give_back = _malloc_trim()
    if give_back is not None:
        give_back(0)


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor Inf; `isfinite` makes copies larger than the tensor."""
    return not tensor.numel() or all(bool(end.isfinite()) for end in tensor.aminmax())


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # other C libraries
        return None
    return found
