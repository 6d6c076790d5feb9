"""Ways of ordering the work of `latentize::LatentExperts` in standard ONNX operators: the forms of its body."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from latentize.activations import Activation
from latentize.exporters.onnx_nodes import DOUBLE, Nodes, activate


@dataclass(frozen=True)
class NodeConfig:
    """What the body of one `latentize::LatentExperts` node depends on. Nodes with equal configs share a body."""

    num_experts: int
    top_k: int
    latent_dim: int
    intermediate_size: int
    dtype: int  # onnx.TensorProto element type of hidden and of every weight
    activation: Activation
    inputs: tuple[str, ...]  # the optional inputs that are there, of gate, gate_bias, up_bias, down_bias
    weights_on_input: bool
    all_named: bool = False  # every index is known to name an expert, as where the choice is a TopK of their scores

    @property
    def gated(self) -> bool:
        """Whether the experts are GLUs."""
        return "gate" in self.inputs

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in fp32, in which bodies compute."""
        return 4 * self.num_experts * self.intermediate_size * self.latent_dim * (2 + self.gated)


@dataclass(frozen=True)
class Values:
    """Names of the values a form works on, in the dtype it computes in."""

    hidden: str  # [T, l]
    indices: str  # [T, k]
    weights: str  # [T, k]
    gate: str | None  # [N, m, l]
    up: str  # [N, m, l]
    down: str  # [N, l, m]
    gate_bias: str | None  # [N, m]
    up_bias: str | None  # [N, m]
    down_bias: str | None  # [N, l]
    one_token: bool = False  # T is known to be 1

    def stacks(self) -> list[str]:
        """The weights and biases that are there."""
        every = (self.gate, self.up, self.down, self.gate_bias, self.up_bias, self.down_bias)
        return [name for name in every if name is not None]


#: Bytes of weights of which a copy is no matter where it saves two nodes.
_COPIED = 16 << 20


# --- what several forms share ------------------------------------------------------------------------------------


def _expert(nodes: Nodes, config: NodeConfig, v: Values, rows: str, pick: Callable[[str], str]) -> str:
    """Outputs of one expert on its rows [n, l]; pick(stack) is the expert's part of a stacked weight or bias."""

    def linear(weight: str, bias: str | None, x: str) -> str:
        terms = [x, pick(weight)] if bias is None else [x, pick(weight), pick(bias)]
        return nodes.op("Gemm", *terms, transB=1)

    gate = None if v.gate is None else linear(v.gate, v.gate_bias, rows)
    hidden = activate(nodes, config.activation, gate, linear(v.up, v.up_bias, rows))
    return linear(v.down, v.down_bias, hidden)


def _at(nodes: Nodes, expert: str, stack: str) -> str:
    return nodes.op("Gather", stack, expert)


@dataclass(frozen=True)
class _Sorted:
    """(token, expert) pairs in the order of their experts; those with an index >= N, if there may be any, come last."""

    order: str  # [P] pair numbers
    counts: str  # [N] pairs of each expert; [N + 1] with those of none, where there may be any
    rows: str  # [P, l] inputs


def _sort_pairs(nodes: Nodes, config: NodeConfig, v: Values) -> _Sorted:
    kinds, expert = config.num_experts, nodes.reshape(v.indices, -1)
    if not config.all_named:
        expert = nodes.op("Min", expert, nodes.constant(np.asarray(kinds)))
        kinds += 1
    pairs = nodes.rows(expert)
    _, order = nodes.ops("TopK", expert, pairs, outputs=2, axis=0, largest=0, sorted=1)
    ones = nodes.op("Expand", nodes.ints(1), pairs)
    counts = nodes.op("ScatterElements", nodes.constant(np.zeros(kinds, np.int64)), expert, ones, reduction="add")
    token = nodes.op("Div", order, nodes.ints(config.top_k))
    rows = nodes.op("Gather", v.hidden, token)
    if config.weights_on_input:
        rows = nodes.op("Mul", rows, nodes.op("Gather", nodes.reshape(v.weights, -1, 1), order))
    return _Sorted(order, counts, rows)


def _combine(nodes: Nodes, config: NodeConfig, v: Values, outputs: str) -> str:
    """[T, l] from the pairs' outputs [P, l], pair by pair in the order of the tokens."""
    per_token = nodes.reshape(outputs, -1, config.top_k, config.latent_dim)
    if config.weights_on_input:
        return nodes.op("ReduceSum", per_token, nodes.ints(1), keepdims=0)
    weights = nodes.reshape(v.weights, -1, 1, config.top_k)
    return nodes.reshape(nodes.op("MatMul", weights, per_token), -1, config.latent_dim)


def present(nodes: Nodes, config: NodeConfig, v: Values) -> str:
    """[T, k] bool: the index names an expert."""
    return nodes.op("Less", v.indices, nodes.constant(np.asarray(config.num_experts)))


# --- the forms ---------------------------------------------------------------------------------------------------


def unrolled(nodes: Nodes, config: NodeConfig, v: Values) -> str:
    """Every expert has its own nodes; pairs are sorted, split by expert, and put back."""
    pairs = _sort_pairs(nodes, config, v)
    parts, nobody = _by_expert(nodes, config, pairs, pairs.rows)
    split = {stack: _split(nodes, config, stack) for stack in v.stacks()}
    outputs = []
    for expert, rows in enumerate(parts):
        own = {stack: pieces[expert] for stack, pieces in split.items()}
        outputs.append(_expert(nodes, config, v, rows, own.__getitem__))
    outputs += [nodes.op("Mul", rows, nodes.scalar(0.0)) for rows in nobody]
    routed = nodes.op("Concat", *outputs, axis=0)
    return _combine(nodes, config, v, _unsorted(nodes, pairs, routed))


def batched(nodes: Nodes, config: NodeConfig, v: Values) -> str:
    """Two matrix products for each expert, the activation once for all of them: the fewest nodes for small experts."""
    pairs = _sort_pairs(nodes, config, v)
    inner = _each(nodes, config, pairs, pairs.rows, *_joined(nodes, config, v))
    hidden = _activate_joined(nodes, config, inner, 1)
    routed = _each(nodes, config, pairs, hidden, v.down, v.down_bias)
    return _combine(nodes, config, v, _unsorted(nodes, pairs, routed))


def _each(nodes: Nodes, config: NodeConfig, pairs: _Sorted, rows: str, weight: str, bias: str | None) -> str:
    """Every expert's linear layer on its part of the sorted rows; rows of no expert become zero."""
    parts, nobody = _by_expert(nodes, config, pairs, rows)
    weights = _split(nodes, config, weight)
    biases = [()] * config.num_experts if bias is None else [(b,) for b in _split(nodes, config, bias)]
    outputs = [nodes.op("Gemm", x, w, *b, transB=1) for x, w, b in zip(parts, weights, biases, strict=True)]
    outputs += [nodes.op("Mul", nodes.op("Gemm", x, weights[0], transB=1), nodes.scalar(0.0)) for x in nobody]
    return nodes.op("Concat", *outputs, axis=0)


def _by_expert(nodes: Nodes, config: NodeConfig, pairs: _Sorted, rows: str) -> tuple[list[str], list[str]]:
    """Sorted rows split into those of each expert, and, where there may be any, those of none."""
    n = config.num_experts
    parts = nodes.ops("Split", rows, pairs.counts, outputs=n if config.all_named else n + 1, axis=0)
    return parts[:n], parts[n:]


def _joined(nodes: Nodes, config: NodeConfig, v: Values) -> tuple[str, str | None]:
    """The first layer of every expert, its gate above its up: a weight [N, 2m, l] and a bias [N, 2m], where there are
    both; a copy of the weights, made when the graph is loaded.
    """
    if v.gate is None:
        return v.up, v.up_bias
    return nodes.op("Concat", v.gate, v.up, axis=1), _joined_bias(nodes, config, v)


def _activate_joined(nodes: Nodes, config: NodeConfig, inner: str, axis: int) -> str:
    """Hidden activations from what the first layer of `_joined` gives along `axis`."""
    if not config.gated:
        return activate(nodes, config.activation, None, inner)
    gate, up = nodes.ops("Split", inner, outputs=2, axis=axis, num_outputs=2)
    return activate(nodes, config.activation, gate, up)


def _joined_bias(nodes: Nodes, config: NodeConfig, v: Values) -> str | None:
    """[N, 2m] the gate's and up's biases; None when there are none."""
    if v.gate_bias is None and v.up_bias is None:
        return None
    zeros = nodes.op("Expand", nodes.scalar(0.0), nodes.ints(config.num_experts, config.intermediate_size))
    return nodes.op("Concat", v.gate_bias or zeros, v.up_bias or zeros, axis=1)


def _unsorted(nodes: Nodes, pairs: _Sorted, routed: str) -> str:
    """Rows in the order of the pairs again."""
    inverse = nodes.op("ScatterElements", pairs.order, pairs.order, _range(nodes, nodes.rows(pairs.order)))
    return nodes.op("Gather", routed, inverse)


def _split(nodes: Nodes, config: NodeConfig, stack: str) -> list[str]:
    """Each expert's part of a stacked weight or bias: one node, so that folding it at load time copies it once."""
    first = nodes.ints(0)
    parts = nodes.ops("Split", stack, outputs=config.num_experts, axis=0, num_outputs=config.num_experts)
    return [nodes.op("Squeeze", part, first) for part in parts]


def _range(nodes: Nodes, stop: str) -> str:
    zero, one = nodes.constant(np.asarray(0)), nodes.constant(np.asarray(1))
    return nodes.op("Range", zero, nodes.op("Squeeze", stop), one)


def loop(nodes: Nodes, config: NodeConfig, v: Values) -> str:
    """A Loop over the experts that any token selected."""
    pairs = _sort_pairs(nodes, config, v)
    real = pairs.counts
    if not config.all_named:
        real = nodes.op("Slice", real, nodes.ints(0), nodes.ints(config.num_experts))
    active = nodes.reshape(nodes.op("NonZero", real), -1)
    counts = nodes.op("Gather", real, active)
    ends = nodes.op("CumSum", counts, nodes.constant(np.asarray(0)))
    starts = nodes.op("Sub", ends, counts)
    trips = nodes.op("Squeeze", nodes.rows(active))
    pair_column = nodes.op("Unsqueeze", pairs.order, nodes.ints(1))
    empty = nodes.op("Mul", pairs.rows, nodes.scalar(0.0))

    def step(inner: Nodes, iteration: str, carried: str) -> str:
        at = inner.op("Unsqueeze", iteration, inner.ints(0))
        start, end = inner.op("Gather", starts, at), inner.op("Gather", ends, at)
        rows = inner.op("Slice", pairs.rows, start, end)
        expert = inner.op("Gather", active, iteration)
        outputs = _expert(inner, config, v, rows, partial(_at, inner, expert))
        return inner.op("ScatterND", carried, inner.op("Slice", pair_column, start, end), outputs)

    return _combine(nodes, config, v, nodes.loop(trips, empty, step))


def dense(nodes: Nodes, config: NodeConfig, v: Values) -> str:
    """Every expert on every token, as three wide matrix products; what a token did not select is multiplied by zero."""
    n, m, width = config.num_experts, config.intermediate_size, config.latent_dim
    chosen = _chosen(nodes, config, v)
    weights = nodes.op("MatMul", chosen, nodes.reshape(v.weights, -1, config.top_k, 1))

    def by_expert(factor: str, value: str) -> str:
        return nodes.reshape(nodes.op("Mul", nodes.reshape(value, -1, n, m), factor), -1, n * m)

    def linear(weight: str, bias: str | None) -> str:
        out = nodes.op("MatMul", v.hidden, nodes.op("Transpose", nodes.reshape(weight, n * m, width), perm=[1, 0]))
        if config.weights_on_input:
            out = by_expert(weights, out)
        return out if bias is None else nodes.op("Add", out, nodes.reshape(bias, n * m))

    gate = None if v.gate is None else linear(v.gate, v.gate_bias)
    hidden = activate(nodes, config.activation, gate, linear(v.up, v.up_bias))
    if config.weights_on_input:
        weights = nodes.op("ReduceSum", chosen, nodes.ints(2))
    output = nodes.op("MatMul", by_expert(weights, hidden), nodes.reshape(nodes.transposed(v.down), n * m, width))
    if v.down_bias is None:
        return output
    return nodes.op("Add", output, nodes.op("MatMul", nodes.reshape(weights, -1, n), v.down_bias))


def _chosen(nodes: Nodes, config: NodeConfig, v: Values) -> str:
    """[T, N, k] ones where an expert is a token's choice; of an index >= N there is none."""
    depth = nodes.constant(np.asarray(config.num_experts))
    chosen = nodes.op("OneHot", v.indices, depth, nodes.constant(np.asarray([0, 1], np.float32)), axis=1)
    return nodes.op("Cast", chosen, to=DOUBLE) if nodes.dtype == DOUBLE else chosen  # onnxruntime has no other on CPU


def gather(nodes: Nodes, config: NodeConfig, v: Values) -> str:
    """Every pair's own matrices are gathered: for few tokens, where the weights read are all that counts."""
    index, weights, ones = v.indices, v.weights, None
    if not config.all_named:
        ones = nodes.op("Cast", present(nodes, config, v), to=nodes.dtype)
        index = nodes.op("Min", index, nodes.constant(np.asarray(config.num_experts - 1)))
        weights = nodes.op("Mul", weights, ones)
    factors = ones if config.weights_on_input else weights
    if v.one_token and config.weight_bytes <= _COPIED:
        return _gather_once(nodes, config, v, index, weights, factors)
    x = nodes.reshape(v.hidden, -1, 1, config.latent_dim, 1)
    if config.weights_on_input:
        x = nodes.op("Mul", x, nodes.reshape(weights, -1, config.top_k, 1, 1))

    def linear(weight: str, bias: str | None, value: str) -> str:
        out = nodes.op("MatMul", nodes.op("Gather", weight, index), value)
        if bias is None:
            return out
        return nodes.op("Add", out, nodes.op("Unsqueeze", nodes.op("Gather", bias, index), nodes.ints(3)))

    if config.weight_bytes <= _COPIED:
        hidden = _activate_joined(nodes, config, linear(*_joined(nodes, config, v), x), 2)
    else:
        gate = None if v.gate is None else linear(v.gate, v.gate_bias, x)
        hidden = activate(nodes, config.activation, gate, linear(v.up, v.up_bias, x))
    outputs = linear(v.down, v.down_bias, hidden)
    if factors is not None:
        outputs = nodes.op("Mul", outputs, nodes.reshape(factors, -1, config.top_k, 1, 1))
    return nodes.op("ReduceSum", outputs, nodes.ints(1, 3), keepdims=0)


def _gather_once(
    nodes: Nodes, config: NodeConfig, v: Values, index: str, weights: str, factors: str | None
) -> str:  # fmt: skip
    """`gather` for one token: it is a row as it comes, and its experts' outputs are combined by one product."""
    x = v.hidden
    if config.weights_on_input:
        x = nodes.op("Mul", x, nodes.reshape(weights, 1, config.top_k, 1, 1))

    def linear(weight: str, bias: str | None, value: str) -> str:
        out = nodes.op("MatMul", value, nodes.op("Gather", nodes.transposed(weight), index))  # [1, k, 1, *]
        if bias is None:
            return out
        rows = nodes.op("Unsqueeze", bias, nodes.ints(1))
        return nodes.op("Add", out, nodes.op("Gather", rows, index))

    hidden = _activate_joined(nodes, config, linear(*_joined(nodes, config, v), x), 3)
    outputs = linear(v.down, v.down_bias, hidden)
    if factors is None:
        return nodes.op("ReduceSum", outputs, nodes.ints(1, 2), keepdims=0)
    return nodes.op("MatMul", factors, nodes.op("Squeeze", outputs, nodes.ints(0, 2)))
