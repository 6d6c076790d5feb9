"""Find the routers of a recording: projections of hidden states whose output decides a selection.

A router's logits are the last value that is still affine in its hidden states before anything is selected or scored:
the projection's own output, or some of its rows, turned, or scaled by a temperature. Their weight and bias are read
off by sending the unit vectors through those calls again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from latentize.passes import graph
from latentize.passes.bound import Bound
from latentize.passes.capture import Call, Recording, Value

#: Relative error below which logits are taken to be affine in the hidden states.
AFFINE = 1e-5
#: Calls that scale or shift.
_SCALES = frozenset({"mul", "div", "add", "sub", "neg"})
#: Calls that pick some of the rows.
PICKS = frozenset({"slice", "narrow", "split", "split_with_sizes", "chunk", "index_select", "select", "unbind"})
#: Calls at the end of a chain that are left to what follows.
_TRAILING = graph.RESHAPES | graph.TURNS | {"add", "sub"}


@dataclass(eq=False)
class Head:
    """A router: a projection of hidden states whose output decides a selection."""

    recording: Recording
    projection: graph.Projection
    logits: Value
    selections: list[Call]
    dependent: set[Value]  # everything that depends on the logits
    axis: int  # the experts' axis of the logits
    chain: tuple[Call, ...] = ()  # from the hidden states to the logits; empty when the projection makes them

    @property
    def num_experts(self) -> int:
        """Number of logits N a token has."""
        return self.logits.shape[self.axis]

    @property
    def tokens(self) -> int:
        """Tokens T in the recorded run."""
        return self.logits.tensor.numel() // self.num_experts

    @property
    def experts_last(self) -> bool:
        """Whether the logits have the experts on their last axis."""
        return self.axis in (-1, self.logits.tensor.dim() - 1)

    def logit_rows(self) -> Tensor:
        """Logits [T, N] of the recorded run."""
        return self.logits.tensor.movedim(self.axis, -1).reshape(self.tokens, self.num_experts)

    def router_input_rows(self) -> Tensor:
        """Hidden states [T, d] that the router read."""
        first = self.projection.call.name == "convolution"
        return graph.rows(self.projection.activation.tensor, self.tokens, channels_first=first)

    def constants(self) -> list[Value]:
        """The constants that the logits are made with."""
        if not self.chain:
            bias = self.projection.bias
            return [self.projection.weight, *([] if bias is None else [bias])]
        return list(dict.fromkeys(v for call in self.chain for v in call.inputs if v.const))

    @property
    def weight(self) -> Bound:
        """The router's weight [N, d]."""
        if self.chain:
            return Bound(tuple(self.constants()), lambda tensors: self._affine(tensors)[0])
        return Bound((self.projection.weight,), lambda tensors: self._as_rows(tensors[0]))

    @property
    def bias(self) -> Bound | None:
        """The bias [N] that the logits contain."""
        if self.chain:
            if not bool(self._affine([v.tensor for v in self.constants()])[1].count_nonzero()):
                return None
            return Bound(tuple(self.constants()), lambda tensors: self._affine(tensors)[1])
        if self.projection.bias is None:
            return None
        return Bound((self.projection.bias,), lambda tensors: tensors[0].reshape(self.num_experts))

    def _as_rows(self, constant: Tensor) -> Tensor:
        """The constant operand of the projection as [N, d]."""
        n = self.num_experts
        if self.projection.call.name in {"linear", "convolution", "mv", "addmv"}:
            return constant.reshape(n, -1)
        matrix = constant.reshape(constant.shape[-2:]) if constant.dim() > 2 else constant
        return matrix.T if matrix.shape[-1] == n and not _weight_first(self.projection) else matrix

    def _affine(self, tensors: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Weight [N, d] and bias [N] of the chain with these constants, in the dtype of the projection's weight."""
        constants = dict(zip(self.constants(), tensors, strict=True))
        source = self.projection.activation
        like = graph.rows(source.tensor, self.tokens)
        width = like.shape[1]
        unit = torch.eye(width, dtype=torch.float64)
        parts = []
        for rows in (torch.zeros(1, width, dtype=torch.float64), *unit.split(self.tokens)):
            padded = torch.zeros(like.shape, dtype=torch.float64)
            padded[: len(rows)] = rows
            parts.append(self._replay(padded.reshape(source.shape), constants)[: len(rows)])
        bias = parts[0][0]
        weight = (torch.cat(parts[1:]) - bias).T
        dtype = constants[self.projection.weight].dtype
        return weight.to(dtype).contiguous(), bias.to(dtype)

    def _replay(self, hidden: Tensor, constants: Mapping[Value, Tensor]) -> Tensor:
        """Logits [T, N] of other hidden states, in fp64."""
        known: dict[Value, Tensor] = {v: t.detach().double() for v, t in constants.items()}
        known[self.projection.activation] = hidden
        for call in self.chain:
            if call.name == "_to_copy":
                known[call.outputs[0]] = known[call.inputs[0]]
                continue
            args, kwargs = pytree.tree_map(lambda a: known[a] if isinstance(a, Value) else a, (call.args, call.kwargs))
            result = [t for t in pytree.tree_leaves(call.op(*args, **kwargs)) if isinstance(t, Tensor)]
            known.update(zip(call.outputs, result, strict=True))
        return known[self.logits].movedim(self.axis, -1).reshape(self.tokens, self.num_experts)

    def _holds(self) -> bool:
        """Whether the logits really are affine in the hidden states of the recorded run."""
        try:
            weight, bias = self._affine([v.tensor for v in self.constants()])
        except (RuntimeError, KeyError, ValueError):
            return False
        hidden = self.router_input_rows()
        if hidden.shape[1] != weight.shape[1]:
            return False
        wanted = self.logit_rows().double()
        error = (hidden.double() @ weight.double().T + bias.double() - wanted).norm()
        return bool(error <= AFFINE * wanted.norm())


@dataclass(frozen=True)
class Note:
    """Why a selection that looked like a router's is none."""

    call: Call
    reason: str
    near: Literal["no", "beside experts", "yes"]  # whether a person would take it for an MoE


def find_heads(recording: Recording) -> tuple[list[Head], list[Note]]:
    """Routers in a recording, and why selections that looked like one are not."""
    by_projection: dict[Call, list[Call]] = {}
    notes: list[Note] = []
    for call in recording.calls:
        if call.name not in graph.SELECTIONS or not call.inputs or call.inputs[0].const:
            continue
        if not call.inputs[0].tensor.is_floating_point():
            continue
        found, mixing = graph.nearest_projections(call.inputs[0])
        if mixing:
            reason = f"{call.name} selects by products of activations (attention or retrieval), not by a router"
            notes.append(Note(call, reason, near="no"))
        elif len(found) == 1:
            by_projection.setdefault(found.pop(), []).append(call)
        elif len(found) > 1:
            reason = f"{call.name} selects by {len(found)} projections combined, not by one router"
            notes.append(Note(call, reason, near="beside experts"))
    heads = []
    for call, selections in by_projection.items():
        head = _head(recording, call, selections)
        across = [s for s in selections if _across_tokens(head, s)]
        if len(across) == len(selections):
            reason = "it selects tokens for each expert (expert choice), not experts for each token"
            near: Literal["beside experts", "yes"] = "beside experts"
            if head.num_experts == 1:
                reason = "it selects which tokens pass through a layer (mixture of depths), not experts for each token"
                near = "yes"
            notes.append(Note(across[0], reason, near))
            continue
        heads.append(replace(head, selections=[s for s in selections if s not in across]))
    return heads, notes


def _head(recording: Recording, call: Call, selections: list[Call]) -> Head:
    projection = graph.projection(call)
    assert projection is not None
    path = _affine_path(call.outputs[0], selections)
    turned = _turned(projection)
    if path or turned:
        source, before = turned or (projection.activation, ())
        logits = path[-1][1] if path else call.outputs[0]
        chain = (*before, call, *(c for c, _ in path))
        found = replace(projection, activation=source)
        cone = graph.forward_cone([logits])
        for axis in sorted(range(-logits.tensor.dim(), 0), reverse=True):
            if logits.shape[axis] < 2:
                continue
            head = Head(recording, found, logits, selections, cone, axis, chain)
            if head._holds():
                return head
    logits = call.outputs[0]
    axis = 1 if call.name == "convolution" else -1
    return Head(recording, projection, logits, selections, graph.forward_cone([logits]), axis)


def _weight_first(projection: graph.Projection) -> bool:
    """Whether the call is weight @ hidden.T."""
    operands = [v for v in projection.call.inputs if v.tensor.dim() >= 2]
    return operands[-2:][0] is projection.weight


def _turned(projection: graph.Projection) -> tuple[Value, tuple[Call, ...]] | None:
    """For weight @ hidden.T: the hidden states before they were turned, and the calls that turned them."""
    if projection.call.name not in {"mm", "bmm", "addmm", "baddbmm", "matmul"} or not _weight_first(projection):
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
