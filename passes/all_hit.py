"""Let export follow code that asks which experts got tokens: while it is traced, every expert is taken to have some.

Loops over the experts that were hit, skips of idle ones and run-time counts become loops over all experts. Each answer
that was made up is written into the graph as an assertion on what it was asked of, so that whoever uses the graph can
see whether anything but the routed experts hangs on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

#: Text of the assertions that stand for answers made up.
ASSUMED = "latentize: every expert is hit"
#: Comparisons of a count with 0 and with 1, and whether they say that an expert has no tokens.
_COMPARED: Mapping[tuple[str, float | None], bool] = {
    ("eq", 0): True, ("le", 0): True, ("lt", 1): True, ("ne", 0): False, ("gt", 0): False, ("ge", 1): False,
    ("greater", 0): False, ("less_equal", 0): True, ("greater_equal", 1): False, ("less", 1): True,
    ("not_equal", 0): False,
}  # fmt: skip
_NEGATIONS = {"logical_not", "invert", "bitwise_not"}
#: Calls that keep a truth value's meaning.
_KEEPS = {"all", "getitem", "select", "squeeze", "view", "reshape", "cpu", "to", "bool", "unbind", "flatten"}
_BINCOUNTS = (torch.bincount, Tensor.bincount)
_UNIQUES = (torch.unique, Tensor.unique, torch.unique_consecutive, Tensor.unique_consecutive)
_NONZEROS = (torch.nonzero, Tensor.nonzero, torch.argwhere, Tensor.argwhere, torch.where)


class EveryExpertHit(TorchFunctionMode):
    """Answers questions about the number of tokens of each of `num_experts` experts as if all had several."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.shadows: Any = WeakTensorKeyDictionary()  # small tensors of expert numbers, with their values
        self.idle: Any = WeakTensorKeyDictionary()  # truth values, and whether they say that an expert is idle

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "__get__":
            return func(*args, **kwargs)
        answer = self._answer(func, args, kwargs)
        result = self._followed(func, args, kwargs) if answer is NotImplemented else answer
        self._shadow(func, args, kwargs, result)
        self._judge(func, args, result)
        return pytree.tree_map(_several, result)

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The answer to a question about the experts' tokens; NotImplemented when the call is none."""
        x = args[0] if args else None
        if not isinstance(x, Tensor):
            return NotImplemented
        if func in _BINCOUNTS:
            return self._bincount(*args, **kwargs)
        if func in _UNIQUES and not x.is_floating_point():
            return self._unique(x, func, kwargs)
        if func in _NONZEROS and len(args) == 1 and _fixed(x):
            return self._nonzero(x.shape[0], func, kwargs)
        if func in _READERS:
            return self._read(_READERS[func], x)
        return NotImplemented

    @staticmethod
    def _followed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The call itself; a condition on values that the trace does not have is taken to hold."""
        if func is not Tensor.__bool__:
            return func(*args, **kwargs)
        from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

        try:
            return func(*args, **kwargs)
        except GuardOnDataDependentSymNode:
            torch.ops.aten._assert_async.msg(args[0], ASSUMED)
            return True

    def _experts(self, count: int) -> Tensor:
        """The numbers of `count` experts."""
        numbers = torch.arange(count)
        self.shadows[numbers] = _outside(lambda: torch.arange(count))
        return numbers

    def _bincount(self, x: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Tensor:
        ones = torch.ones_like(x) if weights is None else weights
        length = max(minlength, self.num_experts)
        return torch.zeros(length, dtype=ones.dtype, device=x.device).scatter_add(0, x.long(), ones)

    def _unique(self, x: Tensor, func: Any, kwargs: Mapping[str, Any]) -> Any:
        if func in (torch.unique_consecutive, Tensor.unique_consecutive) and kwargs.get("return_inverse"):
            return NotImplemented
        found = [self._experts(self.num_experts)]
        if kwargs.get("return_inverse"):
            found.append(x.long())
        if kwargs.get("return_counts"):
            found.append(self._bincount(x.reshape(-1)))
        return found[0] if len(found) == 1 else tuple(found)

    def _nonzero(self, count: int, func: Any, kwargs: Mapping[str, Any]) -> Any:
        experts = self._experts(count)
        if func is torch.where or kwargs.get("as_tuple"):
            return (experts,)
        column = experts.unsqueeze(-1)
        self._shadow(Tensor.unsqueeze, (experts, -1), {}, column)
        return column

    def _read(self, kind: str, x: Tensor) -> Any:
        """What a tensor holds, as Python sees it."""
        if x in self.shadows:
            return _outside(lambda: _READ[kind](self.shadows[x]))
        if kind in {"bool", "number"} and x in self.idle:
            answer = not self.idle[x]
            torch.ops.aten._assert_async.msg(x if answer else ~x, ASSUMED)
            return answer
        if kind in {"list", "array"} and _fixed(x) and not x.is_floating_point():
            counts = [_several_of(x[e].item()) for e in range(x.shape[0])]
            return counts if kind == "list" else _array(counts)
        return NotImplemented

    def _shadow(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Follow expert numbers through views, copies and arithmetic."""
        given = [a for a in pytree.tree_leaves((args, dict(kwargs))) if isinstance(a, Tensor)]
        if not given or not all(g in self.shadows for g in given):
            return
        if not any(isinstance(r, Tensor) for r in pytree.tree_leaves(result)):
            return
        real_args, real_kwargs = pytree.tree_map(
            lambda a: self.shadows[a] if isinstance(a, Tensor) else a, (args, dict(kwargs))
        )
        try:
            real = _outside(lambda: func(*real_args, **real_kwargs))
        except Exception:  # then they are not followed
            return
        pairs = zip(pytree.tree_leaves(result), pytree.tree_leaves(real), strict=True)
        self.shadows.update({r: s for r, s in pairs if isinstance(r, Tensor)})

    def _judge(self, func: Any, args: tuple[Any, ...], result: Any) -> None:
        """Note what truth values say about idle experts."""
        name = getattr(func, "__name__", "").strip("_")
        values = [r for r in pytree.tree_leaves(result) if isinstance(r, Tensor) and r.dtype == torch.bool]
        if not values or not args or not isinstance(args[0], Tensor):
            return
        second = args[1] if len(args) > 1 and isinstance(args[1], (int, float)) else None
        if (name, second) in _COMPARED:
            says = _COMPARED[name, second]
        elif name == "any":
            says = self.idle.get(args[0], False)
        elif name in _NEGATIONS and args[0] in self.idle:
            says = not self.idle[args[0]]
        elif name in _KEEPS and args[0] in self.idle:
            says = self.idle[args[0]]
        else:
            return
        self.idle.update(dict.fromkeys(values, says))


def assumptions(graph: fx.Graph) -> list[fx.Node]:
    """The nodes whose values, or sizes, were taken to be what they are when every expert is hit."""
    asked = [n.args[0] for n in graph.nodes if n.op == "call_function" and ASSUMED in n.args]
    return [*asked, *(n for n in graph.nodes if n.meta.get("unbacked_bindings"))]


_READERS: dict[Any, str] = {
    Tensor.__bool__: "bool", Tensor.__int__: "number", Tensor.__index__: "number", Tensor.item: "number",
    Tensor.tolist: "list", Tensor.numpy: "array", Tensor.__array__: "array", Tensor.__float__: "number",
}  # fmt: skip
_READ: dict[str, Callable[[Tensor], Any]] = {
    "bool": bool, "number": lambda t: t.item(), "list": lambda t: t.tolist(), "array": lambda t: t.numpy()
}  # fmt: skip


def _fixed(x: Tensor) -> bool:
    """Whether a tensor is a vector whose length does not depend on the inputs: one entry an expert."""
    return x.dim() == 1 and isinstance(x.shape[0], int)


def _array(counts: list[Any]) -> Any:
    import numpy

    array = numpy.empty(len(counts), dtype=object)
    array[:] = counts
    return array


def _outside(function: Callable[[], Any]) -> Any:
    """Run on real tensors while a trace is going on."""
    with _disable_current_modes(), torch._C.DisableTorchFunction():
        return function()


def _several(item: Any) -> Any:
    """Say of every size that only the run tells that it is more than one."""
    if isinstance(item, Tensor):
        for size in item.shape:
            _several_of(size)
    elif isinstance(item, torch.SymInt):
        _several_of(item)
    return item


def _several_of(number: Any) -> Any:
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    if isinstance(number, torch.SymInt) and number.node.expr.is_symbol and free_unbacked_symbols(number):
        torch._check(number >= 2)
    return number
