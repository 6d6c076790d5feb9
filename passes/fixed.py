"""The arguments of a recorded call that are no tensors: what was proved holds for their values alone."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable
from typing import Any

from latentize.passes.capture import Frame
from latentize.passes.sites import Fixed

_PLAIN = (bool, int, float, str)


def fixed_arguments(frame: Frame) -> tuple[Fixed, ...]:
    """The numbers, words and Nones among the arguments of a call, or among their defaults, that its code looks at."""
    forward = inspect.unwrap(type(frame.module).forward)
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return ()
    args, kwargs = frame.inputs
    looked_at = _names(forward)
    found = []
    for position, parameter in enumerate(parameters):
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD) or parameter.name not in looked_at:
            continue
        default = None if parameter.default is parameter.empty else parameter.default
        value = args[position] if position < len(args) else kwargs.get(parameter.name, default)
        if not all(item is None or isinstance(item, _PLAIN) for item in (value, default)):
            continue
        place = None if parameter.kind is parameter.KEYWORD_ONLY else position
        found.append(Fixed(parameter.name, place, value, default))
    return tuple(found)


def _names(function: Callable[..., Any]) -> set[str]:
    """The local names that a function's code reads."""
    code = getattr(function, "__code__", None)
    if code is None:
        return set()
    names = set(code.co_cellvars)
    for instruction in dis.get_instructions(code):
        if instruction.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLOSURE")):
            read = instruction.argval
            names.update(read if isinstance(read, tuple) else (read,))
    return names
