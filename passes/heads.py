"""Find the routers of a recording: projections of hidden states whose output decides a selection."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch

from latentize.passes import graph
from latentize.passes.capture import Call, Recording, Value
from latentize.passes.head import Head, weight_first

#: Calls that scale or shift.
_SCALES = frozenset({"mul", "div", "add", "sub", "neg"})
#: Calls that pick some of the rows.
PICKS = frozenset({"slice", "narrow", "split", "split_with_sizes", "chunk", "index_select", "select", "unbind"})
#: Calls that measure how far rows are from others.
_DISTANCES = frozenset({"cdist", "_cdist_forward", "_euclidean_dist", "pairwise_distance"})
#: Calls at the end of a chain that are left to what follows.
_TRAILING = graph.RESHAPES | graph.TURNS | {"add", "sub"}


@dataclass(frozen=True)
class Note:
    """Why a selection that looked like a router's is none."""

    call: Call
    reason: str
    near: Literal["no", "beside experts", "yes"]  # whether a person would take it for an MoE
    final: bool = False  # whether it holds however much more of the model is looked at


def selections(recording: Recording) -> Iterator[Call]:
    """The calls of a recording that select by the size of activations."""
    for call in recording.calls:
        if call.name not in graph.SELECTIONS or not call.inputs or call.inputs[0].const:
            continue
        if call.inputs[0].tensor.is_floating_point():
            yield call


def find_heads(recording: Recording) -> tuple[list[Head], list[Note]]:
    """Routers in a recording, and why selections that looked like one are not."""
    by_projections: dict[frozenset[Call], list[Call]] = {}
    notes: list[Note] = []
    for call in selections(recording):
        found, mixing = graph.nearest_projections(call.inputs[0])
        if mixing:
            reason = f"{call.name} selects by products of activations (attention or retrieval), not by a router"
            final = all(_of_one_input(recording, product) for product in mixing)
            notes.append(Note(call, reason, near="no", final=final))
        elif found:
            by_projections.setdefault(frozenset(found), []).append(call)
        elif any(v.call is not None and v.call.name in _DISTANCES for v in graph.ancestors(call.inputs[:1])):
            reason = "it selects experts by the distance of a token from centroids, not by a projection of it"
            notes.append(Note(call, reason, near="beside experts"))
    heads = []
    for calls, chosen in by_projections.items():
        head = _joined(recording, calls, chosen) if len(calls) > 1 else _head(recording, next(iter(calls)), chosen)
        if head is None:
            reason = f"{chosen[0].name} selects by {len(calls)} projections combined, not by one router"
            notes.append(Note(chosen[0], reason, near="beside experts"))
            continue
        across = [s for s in chosen if _across_tokens(head, s)]
        if len(across) == len(chosen):
            reason = "it selects tokens for each expert (expert choice), not experts for each token"
            near: Literal["beside experts", "yes"] = "beside experts"
            if head.num_experts == 1:
                reason = "it selects which tokens pass through a layer (mixture of depths), not experts for each token"
                near = "yes"
            notes.append(Note(across[0], reason, near))
            continue
        heads.append(replace(head, selections=[s for s in chosen if s not in across]))
    return heads, notes


def _of_one_input(recording: Recording, product: Call) -> bool:
    """Whether both factors of a product depend on one input, so that neither is a weight given as an argument."""
    factors = [graph.ancestors([v]) for v in product.inputs if not v.const]
    return any(all(given in behind for behind in factors) for given in recording.inputs)


def _head(recording: Recording, call: Call, selections: list[Call]) -> Head:
    projection = graph.projection(call)
    assert projection is not None
    path = _affine_path(call.outputs[0], selections)
    turned = _turned(projection)
    logits = path[-1][1] if path else call.outputs[0]
    if call.name == "sum":
        source = graph.base(projection.activation)
        head = _affine(recording, projection, source, logits, selections, _between(source, logits))
    elif path or turned:
        source, before = turned or (projection.activation, ())
        chain = (*before, call, *(c for c, _ in path))
        head = _affine(recording, projection, source, logits, selections, chain)
    else:
        head = None
    if head is not None:
        return head
    logits = call.outputs[0]
    axis = 1 if call.name == "convolution" else -1
    return Head(recording, projection, logits, selections, graph.forward_cone([logits]), axis)


def _affine(
    recording: Recording,
    projection: graph.Projection,
    source: Value,
    logits: Value,
    selections: list[Call],
    chain: tuple[Call, ...],
) -> Head | None:
    """The router whose logits the chain makes of `source`, if it is affine along one of their axes."""
    found, cone = replace(projection, activation=source), graph.forward_cone([logits])
    for axis in sorted(range(-logits.tensor.dim(), 0), reverse=True):
        if logits.shape[axis] < 2:
            continue
        head = Head(recording, found, logits, selections, cone, axis, chain)
        if head.holds():
            return head
    return None


def _joined(recording: Recording, calls: Collection[Call], selections: list[Call]) -> Head | None:
    """The router whose logits several projections of the same hidden states give together."""
    first, *others = sorted(calls, key=lambda c: c.index)
    projection = graph.projection(first)
    assert projection is not None
    source = graph.base(projection.activation)
    if any((p := graph.projection(c)) is None or graph.base(p.activation) is not source for c in others):
        return None
    made = {c.outputs[0] for c in calls}
    flow = graph.forward_cone(made) & graph.ancestors([s.inputs[0] for s in selections])
    joint = next((v for v in graph.cuts(flow, set()) if made <= graph.ancestors([v])), None)
    if joint is None:
        return None
    path = _affine_path(joint, selections)
    for logits in dict.fromkeys((path[-1][1] if path else joint, joint)):
        head = _affine(recording, projection, source, logits, selections, _between(source, logits))
        if head is not None:
            return head
    return None


def deepened(head: Head) -> Head | None:
    """The same router read from before a projection that makes what its own projection reads; None where none does."""
    calls, mixing = graph.nearest_projections(head.projection.activation)
    if mixing or len(calls) != 1:
        return None
    projection = graph.projection(*calls)
    assert projection is not None
    source = graph.base(projection.activation)
    chain = _between(source, head.logits)
    return _affine(head.recording, projection, source, head.logits, head.selections, chain)


def _between(source: Value, end: Value) -> tuple[Call, ...]:
    """The calls by which `end` is computed from `source`, in order."""
    between = graph.ancestors([end], stop=lambda v: v is source) & graph.forward_cone([source])
    return tuple(sorted({v.call for v in between if v is not source and v.call is not None}, key=lambda c: c.index))


def _turned(projection: graph.Projection) -> tuple[Value, tuple[Call, ...]] | None:
    """For weight @ hidden.T: the hidden states before they were turned, and the calls that turned them."""
    if projection.call.name not in {"mm", "bmm", "addmm", "baddbmm", "matmul"} or not weight_first(projection):
        return None
    value = projection.activation
    calls: list[Call] = []
    width = value.shape[-2]
    wanted = value.tensor.transpose(-2, -1).reshape(-1, width)
    while value.call is not None and value.call.name in graph.RESHAPES | graph.TURNS and not value.const:
        calls.insert(0, value.call)
        value = value.call.inputs[0]
        if value.shape[-1:] == (width,) and torch.equal(value.tensor.reshape(-1, width), wanted):
            return value, tuple(calls)
    return None


def _affine_path(start: Value, selections: list[Call]) -> list[tuple[Call, Value]]:
    """Calls from the projection on through which all that is selected by must pass, while they stay affine."""
    ahead = graph.ancestors([s.inputs[0] for s in selections])
    routed = graph.forward_cone([v for s in selections for v in s.outputs])
    path: list[tuple[Call, Value]] = []
    value = start
    while True:
        leading = [c for c in value.users if any(o in ahead for o in c.outputs)]
        if len(leading) != 1 or not _is_affine(leading[0], value):
            break
        call = leading[0]
        onward = [o for o in call.outputs if o in ahead]
        others = [o for c in value.users if c is not call for o in c.outputs]
        if len(onward) != 1 or (call.name not in PICKS and graph.forward_cone(others) & routed):
            break
        path.append((call, onward[0]))
        value = onward[0]
    if path and any(c.name == "tanh" for c in value.users) and path[-1][0].name in {"mul", "div"}:
        path.pop()  # the division of a softcap
    while path and path[-1][0].name in _TRAILING:
        path.pop()
    return path


def _is_affine(call: Call, value: Value) -> bool:
    if call.name not in _SCALES | PICKS | graph.RESHAPES | graph.TURNS or not call.op or call.inputs.count(value) != 1:
        return False
    if call.name == "_read_after_write" or any(v is not value and not v.const for v in call.inputs):
        return False
    return call.name != "div" or call.args[0] is value


def _across_tokens(head: Head, selection: Call) -> bool:
    """Whether a selection runs along the tokens: along an axis that neither the experts nor groups of them can fill."""
    axis = selection_axis(selection)
    seen = selection.inputs[0]
    indexed = any(v.users for v in selection.outputs if not v.tensor.is_floating_point())
    if axis is None or seen.tensor.dim() == 0 or not indexed:
        return False
    length = seen.shape[axis]
    if head.num_experts == 1:
        return length > 1
    aligned = seen.shape == head.logits.shape and seen.tensor.dim() >= 2
    if aligned and axis % seen.tensor.dim() != head.axis % seen.tensor.dim():
        return True
    return length > head.num_experts and seen.tensor.numel() == head.logits.tensor.numel()


def selection_axis(call: Call) -> int | None:
    """The axis that a selection runs along; None when it has none."""
    for position, argument in enumerate(call.op._schema.arguments):
        if argument.name == "dim":
            value = call.args[position] if position < len(call.args) else call.kwargs.get("dim", argument.default_value)
            return value if isinstance(value, int) else None
    return None
