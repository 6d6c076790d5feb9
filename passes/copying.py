"""Deep copies of modules that hold what cannot be copied: a process group, a stream, a lock, a Python module.

Such handles stand for something outside the model; the copy holds the same one.
"""

from __future__ import annotations

import copy
import copyreg
from collections.abc import Iterator, Mapping
from types import FunctionType, MethodType
from typing import Any, TypeVar

from torch import Tensor, nn

_M = TypeVar("_M")

#: What is never taken apart: numbers and names, functions and classes, tensors.
_WHOLE = (type(None), bool, int, float, complex, str, bytes, type, FunctionType, Tensor)


def deep_copy(module: _M, known: Mapping[int, Any] | None = None) -> _M:
    """A deep copy of a module that shares the handles it holds.

    Args:
        module: what to copy; or several, in a tuple, that may share parts.
        known: what the copy is to hold in place of the module's own objects, by the ids of those.

    Raises:
        Exception: whatever its own copying raises for another reason than a handle.
    """
    try:
        return copy.deepcopy(module, dict(known or {}))
    except TypeError:
        handles = {id(handle): handle for handle in _handles(module, set(known or {}))}
        if not handles:
            raise
        return copy.deepcopy(module, {**handles, **(known or {})})


def _handles(root: object, seen: set[int]) -> Iterator[object]:
    """The objects reached from `root` that refuse to be copied, iterators aside: a run would use those up."""
    stack: list[Any] = [root]
    held = []  # keeps parts that were made here alive, so that their ids stay theirs
    while stack:
        item = stack.pop()
        if isinstance(item, _WHOLE) or id(item) in seen:
            continue
        seen.add(id(item))
        held.append(item)
        if isinstance(item, Mapping):
            stack += [*item.keys(), *item.values()]
        elif isinstance(item, (list, tuple, set, frozenset)):
            stack += item
        elif isinstance(item, MethodType):
            stack.append(item.__self__)
        elif isinstance(item, nn.Module) or hasattr(item, "__deepcopy__"):
            stack += getattr(item, "__dict__", {}).values()
        elif type(item) not in copyreg.dispatch_table:
            try:
                reduced = item.__reduce_ex__(4)
            except TypeError:
                if not hasattr(item, "__next__"):
                    yield item
                continue
            if not isinstance(reduced, str):
                stack += [part if not hasattr(part, "__next__") else list(part) for part in reduced[1:5]]
