"""A router's logits: the last value that is still affine in its hidden states before anything is selected or scored.

That is a projection's own output, or some of its rows, turned, or scaled by a temperature, or what several projections
give together. Where it is more than one product, weight and bias are read off by sending the unit vectors through those
calls again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from latentize.passes import graph
from latentize.passes.bound import Bound
from latentize.passes.capture import Call, Recording, Value

#: Relative error below which logits are taken to be affine in the hidden states.
AFFINE = 1e-5


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
        return matrix.T if matrix.shape[-1] == n and not weight_first(self.projection) else matrix

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

    def holds(self) -> bool:
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


def weight_first(projection: graph.Projection) -> bool:
    """Whether the call of a projection is weight @ hidden.T."""
    operands = [v for v in projection.call.inputs if v.tensor.dim() >= 2]
    return operands[-2:][0] is projection.weight
