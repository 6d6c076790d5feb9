"""Reading a recording's data flow: cones, cuts, terms of a sum, projections by constant weights."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.utils import _pytree as pytree

from latentize.passes.capture import Call, Value

#: Calls that select along an axis by size of score.
SELECTIONS = frozenset({"topk", "sort", "argsort", "max", "argmax", "kthvalue"})
#: Calls that turn logits into the weights of a mixture.
SCORES = frozenset({"_softmax", "softmax", "sigmoid", "relu", "clamp_min", "softplus", "exp", "_log_softmax"})
#: Calls that contract one operand with another.
CONTRACTIONS = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "mv", "addmv", "convolution", "_grouped_mm", "dot"}
)
#: Calls whose result holds the same numbers in the same order.
RESHAPES = frozenset(
    {"view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze", "squeeze", "detach", "alias", "clone",
     "_to_copy", "contiguous", "flatten", "unflatten", "lift_fresh", "_read_after_write"}
)  # fmt: skip
#: Calls that turn axes, which keeps the order when the turned axes have length 1.
TURNS = frozenset({"permute", "transpose", "t", "movedim", "expand"})
#: Calls that put numbers around a tensor, which keeps its own as they are when they put none there.
_PADS = frozenset({"constant_pad_nd", "pad"})
#: Calls that take a part of a tensor or put parts together: the same numbers where there is but one part.
_PARTS = frozenset({"select", "unbind", "slice", "split", "split_with_sizes", "chunk", "stack", "cat"})
#: Calls that add their source operand onto their first operand at some positions.
_ACCUMULATIONS = frozenset({"index_add", "scatter_add", "index_put", "scatter_reduce"})
#: Calls that take only shape, dtype and device from their tensor operands.
FACTORIES = frozenset(
    {"zeros_like", "empty_like", "ones_like", "full_like", "new_zeros", "new_empty", "new_ones", "new_full", "arange",
     "zeros", "empty", "ones", "full"}
)  # fmt: skip


@dataclass(frozen=True)
class Projection:
    """A contraction of activations with a constant matrix: rows @ weight.T (+ bias)."""

    call: Call
    activation: Value
    weight: Value
    bias: Value | None


def forward_cone(start: Iterable[Value], stop: Value | None = None) -> set[Value]:
    """Every value that depends on one of `start`, those included, by paths that do not pass `stop`."""
    found = set(start)
    stack = list(found)
    while stack:
        for call in stack.pop().users:
            if call.name in FACTORIES:
                continue
            fresh = [v for v in call.outputs if v not in found and v is not stop]
            found.update(fresh)
            stack.extend(fresh)
    return found


def ancestors(end: Iterable[Value], stop: Callable[[Value], bool] = lambda _: False) -> set[Value]:
    """Every value that `end` depends on, those included, not looking behind values for which `stop` holds."""
    found = set(end)
    stack = list(found)
    while stack:
        value = stack.pop()
        if value.call is None or stop(value) or value.call.name in FACTORIES:
            continue
        fresh = [v for v in value.call.inputs if v not in found]
        found.update(fresh)
        stack.extend(fresh)
    return found


def cuts(flow: set[Value], beyond: set[Value]) -> list[Value]:
    """The values of `flow` through which all that was computed before them in `flow` must pass on its way to `beyond`.

    Earliest first. `beyond` holds further values whose inputs count as uses.
    """
    order = sorted(flow, key=lambda v: v.index)
    counted = flow | beyond
    last_use = {v: max((o.index for c in v.users for o in c.outputs if o in counted), default=0) for v in order}
    found = []
    reach = 0
    for value in order:
        if reach <= value.index:
            found.append(value)
        reach = max(reach, last_use[value])
    return found


def base(value: Value) -> Value:
    """The value that `value` is a reshape or copy of."""
    while value.call is not None and value.call.name in RESHAPES | TURNS | _PARTS | _PADS:
        source = value.call.inputs[0]
        if source.tensor.numel() != value.tensor.numel() or (
            value.call.name in TURNS | _PADS and not _same_order(source, value)
        ):
            break
        value = source
    return value


def _same_order(source: Value, value: Value) -> bool:
    """Whether turning axes left the numbers in order, only axes of length 1 having moved."""
    return torch.equal(source.tensor.reshape(-1), value.tensor.reshape(-1))


def terms(value: Value, dependent: set[Value]) -> tuple[list[Value], list[Value]]:
    """Split a sum: (terms that depend on the routing, terms that do not), through reshapes and accumulations."""
    routed: list[Value] = []
    rest: list[Value] = []
    stack = [value]
    while stack:
        item = stack.pop()
        if item not in dependent:
            rest.append(item)
            continue
        call = item.call
        if call is None:
            routed.append(item)
        elif call.name in RESHAPES | _PARTS and call.inputs[0].tensor.numel() == item.tensor.numel():
            stack.append(call.inputs[0])
        elif call.name == "add" and all(v.tensor.numel() == item.tensor.numel() for v in call.inputs):
            stack.extend(call.inputs)
        elif call.name in _ACCUMULATIONS and isinstance(call.args[0], Value):
            stack.append(call.args[0])
            routed.extend(v for v in call.inputs if v is not call.args[0])
        else:
            routed.append(item)
    return routed, [v for v in rest if bool(v.tensor.count_nonzero())]


def users_through_reshapes(value: Value) -> Iterator[Call]:
    """Calls that use a value, or a reshape of it, other than to reshape it."""
    stack = [value]
    while stack:
        for call in stack.pop().users:
            if call.name in RESHAPES:
                stack.extend(call.outputs)
            else:
                yield call


def rerun(call: Call, known: Mapping[Value, torch.Tensor]) -> dict[Value, torch.Tensor]:
    """Outputs of a call with the values in `known` in place of the recorded ones; empty when it uses none of them."""
    if not any(v in known for v in call.inputs):
        return {}
    if call.name == "_read_after_write":
        return {call.outputs[0]: known.get(call.inputs[0], call.inputs[0].tensor)}

    def swap(item: object) -> object:
        return known.get(item, item.tensor).clone() if isinstance(item, Value) else item

    args, kwargs = pytree.tree_map(swap, (call.args, call.kwargs))
    result = [t for t in pytree.tree_leaves(call.op(*args, **kwargs)) if isinstance(t, torch.Tensor)]
    return dict(zip(call.outputs, result, strict=False))


def derivation(value: Value) -> Hashable:
    """How a constant comes from the tensors of a model: equal for constants computed from the same ones alike."""
    call = value.call
    if value.source:
        return value.source
    if call is None:
        return value.index
    position = next(i for i, v in enumerate(call.outputs) if v is value)
    flat = pytree.tree_leaves((call.args, call.kwargs))
    return (str(call.op), position, *(derivation(a) if isinstance(a, Value) else repr(a) for a in flat))


def numbers(call: Call) -> list[float]:
    """Python numbers and constants of one element that a call uses."""
    return [*call.scalars, *(float(v.tensor) for v in call.inputs if v.const and v.tensor.numel() == 1)]


def projection(call: Call) -> Projection | None:
    """The call as a projection of activations by a constant matrix, if it is one."""
    if call.name == "sum":
        return _summed_product(call)
    if call.name not in CONTRACTIONS:
        return None
    operands = [v for v in call.inputs if v.tensor.is_floating_point()]
    bias = None
    if call.name in {"addmm", "baddbmm", "addmv"}:
        bias, operands = operands[0], operands[1:]
    elif call.name in {"linear", "convolution"} and len(operands) > 2:
        bias, operands = operands[2], operands[:2]
    if len(operands) != 2 or (bias is not None and not bias.const):
        return None
    constant = [v for v in operands if v.const]
    active = [v for v in operands if not v.const]
    if len(constant) != 1 or constant[0].tensor.numel() < 2:
        return None
    return Projection(call, active[0], constant[0], bias)


def _summed_product(call: Call) -> Projection | None:
    """A sum of elementwise products of activations with a constant matrix, if the call is one."""
    made = call.inputs[0].call if call.inputs else None
    if made is None or made.name != "mul" or len(made.inputs) != 2:
        return None
    constant = [v for v in made.inputs if v.const]
    active = [v for v in made.inputs if not v.const]
    if len(constant) != 1 or sum(size > 1 for size in constant[0].shape) < 2:
        return None
    return Projection(call, active[0], constant[0], None) if active[0].tensor.is_floating_point() else None


def nearest_projections(value: Value) -> tuple[set[Call], set[Call]]:
    """Projections behind `value` with no contraction between, and the products of activations that were met."""
    found: set[Call] = set()
    mixing: set[Call] = set()
    seen = {value}
    stack = [value]
    while stack:
        item = stack.pop()
        call = item.call
        if call is None or item.const or call.name in FACTORIES:
            continue
        if projection(call) is not None:
            found.add(call)
            continue
        if call.name in CONTRACTIONS:
            mixing.add(call)
            continue
        for source in call.inputs:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return found, mixing


def rows(tensor: torch.Tensor, tokens: int, *, channels_first: bool = False) -> torch.Tensor:
    """The tensor as [tokens, width], tokens in order; `channels_first` when the width is axis 1."""
    if channels_first and tensor.dim() >= 3:
        tensor = tensor.movedim(1, -1)
    return tensor.reshape(tokens, -1)
