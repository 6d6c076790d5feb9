"""Find the routed region of an MoE in a recording: where hidden states enter, where the routed output leaves, and the
constant tensors in between. Structure and data flow only."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentize.passes import graph, tables
from latentize.passes.capture import Call, Value
from latentize.passes.head import Head
from latentize.passes.heads import PICKS


@dataclass(frozen=True)
class Leaf:
    """A constant tensor used inside a region, or a part of it, and the calls that use it together with activations."""

    value: Value
    calls: tuple[Call, ...]
    values: tuple[Value, ...]  # `value` and others computed from the same tensors in the same way
    part: tuple[int, int, int] | None = None  # axis, start and length, when the region uses no more of it
    carriers: tuple[Value, ...] = ()  # values that hold this part where it meets activations; empty: all that do

    @property
    def shape(self) -> torch.Size:
        """Shape of the tensor or its part."""
        return self.of(self.value.tensor).shape

    def of(self, tensor: Tensor) -> Tensor:
        """The part of a tensor in the place of `value`."""
        return tensor if self.part is None else tensor.narrow(*self.part)


@dataclass(eq=False)
class Region:
    """A candidate for the routed path of one MoE."""

    head: Head
    hidden: Value  # what the experts read, width h
    output: Value  # the routed output plus `rest`
    rest: list[Value]  # terms of `output` that do not depend on the routing
    width: int
    leaves: list[Leaf]  # constants used with activations that come from `hidden`
    routing_leaves: list[Leaf]  # constants used with the logits alone
    calls: list[Call]  # every call between hidden, logits and output
    fed: set[Value]  # everything that depends on hidden other than through the logits
    output_channels_first: bool = False
    hidden_channels_first: bool = False

    def hidden_rows(self) -> Tensor:
        """Hidden states [T, h] that the experts read."""
        return graph.rows(self.hidden.tensor, self.head.tokens, channels_first=self.hidden_channels_first)

    def routed_rows(self) -> Tensor:
        """Routed output [T, h] of the recorded run, without the rest."""
        first = self.output_channels_first
        total = graph.rows(self.output.tensor, self.head.tokens, channels_first=first)
        for term in self.rest:
            total = total - graph.rows(
                term.tensor.expand_as(_like(term, self.output)), self.head.tokens, channels_first=first
            )
        return total

    def scalars(self) -> list[float]:
        """Python numbers and one-element constants in the region, without repeats."""
        return sorted({s for c in self.calls for s in graph.numbers(c)})


def _like(term: Value, output: Value) -> Tensor:
    return term.tensor if term.tensor.numel() == output.tensor.numel() else output.tensor


def regions(head: Head, *, any_width: bool = False) -> Iterator[Region]:
    """Candidate regions of a router, the one nearest to it first; which one is right is for the lift to prove.

    Args:
        head: the router.
        any_width: whether experts may work at a width that has nothing to do with the router's.
    """
    recording, dependent = head.recording, head.dependent
    seen: set[Value] = set()
    for end in recording.outputs:
        if end not in dependent:
            continue
        relevant = dependent & graph.ancestors([end])
        for output in graph.cuts(relevant, set()):
            if output in seen or not output.tensor.is_floating_point() or output.tensor.numel() % head.tokens:
                continue
            seen.add(output)
            if output.call is not None and output.call.name in graph.RESHAPES and output.call.inputs[0] in seen:
                continue
            yield from _regions_at(head, output, any_width)


def _regions_at(head: Head, output: Value, any_width: bool) -> Iterator[Region]:
    routed, rest = graph.terms(output, head.dependent)
    if not routed or any(v.tensor.numel() not in (output.tensor.numel(), output.shape[-1]) for v in rest):
        return
    inside = graph.ancestors(routed, stop=lambda v: v is head.logits) | {output}
    entering = {v for v in inside if not v.const and v not in head.dependent}
    width = output.tensor.numel() // head.tokens
    if width < 2:
        return
    beyond = {v for v in inside if v in head.dependent and v is not head.logits}
    candidates = [v for v in graph.cuts(entering, beyond) if _carries_tokens(v, output)]
    router_base = graph.base(head.projection.activation)
    candidates.sort(key=lambda v: (graph.base(v) is not router_base, -graph.base(v).index, v.index))
    tried: set[Value] = set()
    for hidden in candidates:
        if graph.base(hidden) in tried or not (any_width or _plausible(head, hidden, width)):
            continue
        tried.add(graph.base(hidden))
        region = _build(head, hidden, output, rest, inside, width)
        if region.leaves:
            yield region


def _plausible(head: Head, hidden: Value, width: int) -> bool:
    """Whether the experts' width is the router's, or that of a projection of what the router reads."""
    return width == head.router_input_rows().shape[1] or latent_projection(head, hidden) is not None


def latent_projection(head: Head, hidden: Value) -> graph.Projection | None:
    """The projection of what the router reads that `hidden` comes from, with no other and at most a norm between."""
    calls, _ = graph.nearest_projections(hidden)
    found = [p for c in calls if (p := graph.projection(c)) is not None]
    if len(found) != 1 or graph.base(found[0].activation) is not graph.base(head.projection.activation):
        return None
    return found[0]


def _carries_tokens(value: Value, output: Value) -> bool:
    return value.tensor.is_floating_point() and value.tensor.numel() == output.tensor.numel()


def _build(head: Head, hidden: Value, output: Value, rest: list[Value], inside: set[Value], width: int) -> Region:
    fed = graph.forward_cone([hidden], stop=head.logits)
    calls = sorted({c for v in inside if v.call is not None for c in [v.call]}, key=lambda c: c.index)
    active = fed | head.dependent
    calls = [c for c in calls if any(v in active for v in c.inputs) and head.logits not in c.outputs]
    uses: dict[Hashable, list[tuple[Value, Call]]] = {}
    for call in calls:
        for value in call.inputs:
            if value.const and value.tensor.is_floating_point() and value.tensor.numel() > 1 and _is_weight(value):
                uses.setdefault(graph.derivation(value), []).append((value, call))
    leaves: list[Leaf] = []
    routing: list[Leaf] = []
    for found in uses.values():
        value, users = found[0][0], tuple(dict.fromkeys(call for _, call in found))
        leaf = Leaf(value, users, tuple(dict.fromkeys(v for v, _ in found)))
        alone = all(v in head.dependent or v.const for c in users for v in c.inputs)
        small = value.tensor.numel() in (head.num_experts, 1)
        if alone and small and not any(_meets_hidden(c, fed) for c in users):
            routing.append(leaf)
        else:
            leaves += _parts(leaf, head, inside, set(calls), fed)
    return Region(
        head, hidden, output, rest, width, leaves, routing, calls, fed,
        output_channels_first=_channels_first(output, width), hidden_channels_first=_channels_first(hidden, width),
    )  # fmt: skip


def _parts(leaf: Leaf, head: Head, inside: set[Value], calls: set[Call], fed: set[Value]) -> list[Leaf]:
    """The leaf; where it makes the router's logits too, each run of rows that the region uses of it; or, where parts
    of it are looked up together and go different ways, those parts."""
    product = head.projection.call.outputs[0]
    if leaf.value is not head.projection.weight:
        parts = tables.cut(leaf.value, calls, fed) if len(leaf.values) == 1 else []
        return [replace(leaf, part=span, carriers=values) for span, values in parts] or [leaf]
    if product.shape[-1] == head.num_experts:
        return [leaf]
    picked: list[Value] = []
    for call in graph.users_through_reshapes(product):
        used = [o for o in call.outputs if o in inside]
        if used and (call.name not in PICKS or used[0].shape[:-1] != call.inputs[0].shape[:-1]):
            return [leaf]
        picked += [o for o in used if o is not head.logits]
    axis = 0 if head.projection.call.name == "linear" else leaf.value.tensor.dim() - 1
    starts = [(int(o.tensor.storage_offset() - product.tensor.storage_offset()), o.shape[-1]) for o in picked]
    return [Leaf(leaf.value, leaf.calls, leaf.values, (axis, start, length)) for start, length in sorted(starts)]


def _meets_hidden(call: Call, fed: set[Value]) -> bool:
    return any(v in fed for v in call.inputs)


def _channels_first(value: Value, width: int) -> bool:
    return value.tensor.dim() >= 3 and value.shape[-1] != width and value.shape[1] == width


def _is_weight(value: Value) -> bool:
    """Whether a constant comes from tensors that existed before the run."""
    return any(v.call is None for v in graph.ancestors([value]))
