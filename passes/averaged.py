"""Watch a run that draws random numbers: each is its mean, so that dropout drops nothing and jitter moves nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Averaged(TorchDispatchMode):
    """Notes which of the tensors `known`, by the number of their storage, a run reads and writes, and what it draws.

    Calls that draw whole numbers, and selections by chance, are left as they are.
    """

    def __init__(self, known: Mapping[int, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = known
        self.read: dict[str, None] = {}
        self.written: dict[str, None] = {}
        self.drawn: dict[str, None] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self._note(func, args, kwargs)
        if torch.Tag.nondeterministic_seeded not in getattr(func, "tags", ()):
            return func(*args, **kwargs)
        name = func.overloadpacket.__name__.rstrip("_")
        if name == "native_dropout":
            self.drawn[name] = None
            return args[0].clone(), torch.ones_like(args[0], dtype=torch.bool)
        result = func(*args, **kwargs)
        if name in _MEANS and isinstance(result, Tensor):
            self.drawn[name] = None
            mean = _MEANS[name](_by_name(func, args, kwargs))
            result.copy_(torch.as_tensor(mean, dtype=result.dtype, device=result.device))
        return result

    def _note(self, func: Any, args: Any, kwargs: Any) -> None:
        for item in pytree.tree_leaves((args, kwargs)):
            if isinstance(item, Tensor) and (name := self.known.get(storage(item))):
                self.read[name] = None
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            given = args[position] if position < len(args) else kwargs.get(argument.name)
            for item in pytree.tree_leaves(given):
                if isinstance(item, Tensor) and (name := self.known.get(storage(item))):
                    self.written[name] = None


def _by_name(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call, defaults among them: those that are given as they are by default are left out of it."""
    arguments = func._schema.arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return defaults | dict(zip((a.name for a in arguments), args, strict=False)) | dict(kwargs)


def _bernoulli(given: Mapping[str, Any]) -> Any:
    return given["p"] if "p" in given else given["self"]


def _between(given: Mapping[str, Any]) -> float:
    return (float(given["from"]) + float(given["to"])) / 2


#: The mean of what a call draws, from its arguments by name.
_MEANS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "bernoulli": _bernoulli,
    "uniform": _between,
    "rand": lambda _: 0.5,
    "rand_like": lambda _: 0.5,
    "randn": lambda _: 0.0,
    "randn_like": lambda _: 0.0,
    "normal": lambda given: given["mean"],
    "exponential": lambda given: 1.0 / given["lambd"],
}


def storage(tensor: Tensor) -> int:
    """A number that tensors share which look at the same memory."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)
