"""Parts of a table that play parts of their own: rows looked up by the routing, then cut into gate, up and down."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from latentize.passes import graph
from latentize.passes.capture import Call, Value

#: A run of places along an axis: axis, start, length.
Span = tuple[int, int, int]


def meets(start: Collection[Value], inside: Collection[Call], fed: Collection[Value]) -> list[tuple[Call, Value]]:
    """The calls in which values, or what is read from them, first meet activations, with the value that does.

    Args:
        start: constants, or values computed from them and the routing alone.
        inside: the calls of the region.
        fed: what depends on the hidden states.
    """
    found: list[tuple[Call, Value]] = []
    stack, seen = list(start), set(start)
    while stack:
        value = stack.pop()
        for call in value.users:
            if call not in inside:
                continue
            if any(v in fed for v in call.inputs if v is not value):
                found.append((call, value))
                continue
            fresh = [o for o in call.outputs if o not in seen and not o.const and o not in fed]
            seen.update(fresh)
            stack.extend(fresh)
    return sorted(found, key=lambda meet: meet[0].index)


def cut(table: Value, inside: Collection[Call], fed: Collection[Value]) -> list[tuple[Span, tuple[Value, ...]]]:
    """The parts of a table that meet activations in different values, with those values; empty when it is one whole.

    What lies between is followed with the numbers of the table's elements in their place, so however it is looked up,
    cut and turned, it is known which elements every value holds.
    """
    carriers = list(dict.fromkeys(value for _, value in meets([table], inside, fed)))
    if len(carriers) < 2 or table.tensor.dim() < 2 or any(v is table for v in carriers):
        return []
    numbered = _numbered(table, carriers)
    spans: dict[Span, list[Value]] = {}
    for axis in range(1, table.tensor.dim()):
        spans.clear()
        for value in carriers:
            span = _span(numbered[value], table.tensor, axis) if value in numbered else None
            if span is None or not torch.equal(_elements(table.tensor, numbered[value]), value.tensor):
                return []
            spans.setdefault(span, []).append(value)
        if len(spans) > 1 and _apart(list(spans)):
            return [(span, tuple(values)) for span, values in sorted(spans.items())]
    return []


def _elements(table: Tensor, numbers: Tensor) -> Tensor:
    return table.reshape(-1)[numbers.long()]


def _numbered(table: Value, wanted: Collection[Value]) -> Mapping[Value, Tensor]:
    """The number of the table's element in each place of the values that are computed from it."""
    known = {table: torch.arange(table.tensor.numel(), dtype=torch.float64).view(table.shape)}
    between = {v.call for v in graph.ancestors(wanted) & graph.forward_cone([table]) if v.call is not None}
    for call in sorted(between, key=lambda c: c.index):
        known.update(graph.rerun(call, known))
    return known


def _span(numbers: Tensor, table: Tensor, axis: int) -> Span | None:
    """The run of places along an axis that elements come from; None when they are no run."""
    step = table[(0,) * axis].numel() // table.shape[axis]
    places = (numbers.long() // step % table.shape[axis]).unique()
    start, end = int(places[0]), int(places[-1]) + 1
    return (axis, start, end - start) if len(places) == end - start else None


def _apart(spans: list[Span]) -> bool:
    """Whether runs do not overlap."""
    ordered = sorted(spans, key=lambda s: s[1])
    return all(a[1] + a[2] <= b[1] for a, b in itertools.pairwise(ordered))
