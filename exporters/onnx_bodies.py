"""Bodies of standard ONNX operators for `latentize::LatentExperts`, one per way of ordering the work.

A body is a FunctionProto: with it in the file, a runtime that has no kernel for the node runs the body instead.
Bodies are built from the node's sizes, never traced: a 64-expert unrolled one takes a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from latentize.activations import Activation
from latentize.errors import LatentizeError
from latentize.exporters.onnx_nodes import Nodes, activate

if TYPE_CHECKING:
    import onnx

DOMAIN = "latentize"
OP_TYPE = "LatentExperts"
INPUTS = ("hidden", "indices", "weights", "gate", "up", "down", "gate_bias", "up_bias", "down_bias")
ATTRIBUTES = ("activation", "alpha", "gate_min", "gate_max", "up_min", "up_max", "up_offset", "weights_on_input")
MICROSOFT = "com.microsoft"
_ABSENT = -1e30  # the logit of an expert that a token did not select: its softmax weight is exactly zero


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

    @property
    def gated(self) -> bool:
        """Whether the experts are GLUs."""
        return "gate" in self.inputs


@dataclass(frozen=True)
class _Values:
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


Form = Callable[[Nodes, NodeConfig, _Values], str]


def build_body(form: str, config: NodeConfig, opset: int, overload: str) -> onnx.FunctionProto:
    """The function body of nodes with this config.

    Half-precision nodes compute in fp32 inside, as onnxruntime's CPU kernels do.

    Raises:
        LatentizeError: the form is unknown, or cannot express this config exactly.
    """
    from onnx import TensorProto, helper

    if form not in FORMS:
        raise LatentizeError(f"ONNX form {form!r} is not known: expected one of {', '.join(FORMS)}")
    compute = TensorProto.DOUBLE if config.dtype == TensorProto.DOUBLE else TensorProto.FLOAT
    nodes = Nodes(compute)
    result = FORMS[form](nodes, config, _inputs(nodes, config, compute))
    nodes.list.append(helper.make_node("Cast", [result], ["combined"], to=config.dtype))
    imports = [helper.make_opsetid("", opset)]
    if any(n.domain == MICROSOFT for n in _all_nodes(nodes.list)):
        imports.append(helper.make_opsetid(MICROSOFT, 1))
    return helper.make_function(
        DOMAIN, OP_TYPE, list(INPUTS), ["combined"], nodes.list, imports, list(ATTRIBUTES), overload=overload,
        doc_string=f"form {form}",
    )  # fmt: skip


def _inputs(nodes: Nodes, config: NodeConfig, compute: int) -> _Values:
    def value(name: str) -> str:
        return name if config.dtype == compute else nodes.op("Cast", name, to=compute)

    def optional(name: str) -> str | None:
        return value(name) if name in config.inputs else None

    return _Values(
        value("hidden"), "indices", value("weights"), optional("gate"), value("up"), value("down"),
        optional("gate_bias"), optional("up_bias"), optional("down_bias"),
    )  # fmt: skip


def _all_nodes(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    inner = [a.g for n in nodes for a in n.attribute if a.HasField("g")]
    return [*nodes, *(n for g in inner for n in _all_nodes(list(g.node)))]


# --- what several forms share ------------------------------------------------------------------------------------


def _expert(nodes: Nodes, config: NodeConfig, v: _Values, rows: str, pick: Callable[[str], str]) -> str:
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
    """(token, expert) pairs in the order of their experts; those with an index >= N come last."""

    order: str  # [P] pair numbers
    counts: str  # [N + 1] pairs of each expert, then of none
    rows: str  # [P, l] inputs


def _sort_pairs(nodes: Nodes, config: NodeConfig, v: _Values) -> _Sorted:
    n = config.num_experts
    expert = nodes.op("Min", nodes.reshape(v.indices, -1), nodes.constant(np.asarray(n)))
    pairs = nodes.rows(expert)
    _, order = nodes.ops("TopK", expert, pairs, outputs=2, axis=0, largest=0, sorted=1)
    ones = nodes.op("Expand", nodes.ints(1), pairs)
    counts = nodes.op("ScatterElements", nodes.constant(np.zeros(n + 1, np.int64)), expert, ones, reduction="add")
    token = nodes.op("Div", order, nodes.ints(config.top_k))
    rows = nodes.op("Gather", v.hidden, token)
    if config.weights_on_input:
        rows = nodes.op("Mul", rows, nodes.op("Gather", nodes.reshape(v.weights, -1, 1), order))
    return _Sorted(order, counts, rows)


def _combine(nodes: Nodes, config: NodeConfig, v: _Values, outputs: str) -> str:
    """[T, l] from the pairs' outputs [P, l], pair by pair in the order of the tokens."""
    per_token = nodes.reshape(outputs, -1, config.top_k, config.latent_dim)
    if config.weights_on_input:
        return nodes.op("ReduceSum", per_token, nodes.ints(1), keepdims=0)
    weights = nodes.reshape(v.weights, -1, 1, config.top_k)
    return nodes.reshape(nodes.op("MatMul", weights, per_token), -1, config.latent_dim)


def _mix(nodes: Nodes, config: NodeConfig, v: _Values, values: str, fill: float) -> str:
    """[T, N] with values [T, k] where a token selected an expert, `fill` elsewhere."""
    n = config.num_experts
    shape = nodes.op("Concat", nodes.rows(v.indices), nodes.ints(n + 1), axis=0)
    empty = nodes.op("Expand", nodes.scalar(fill), shape)
    index = nodes.op("Min", v.indices, nodes.constant(np.asarray(n)))
    full = nodes.op("ScatterElements", empty, index, values, axis=1)
    return nodes.op("Slice", full, nodes.ints(0), nodes.ints(n), nodes.ints(1))


def _present(nodes: Nodes, config: NodeConfig, v: _Values) -> str:
    """[T, k] bool: the index names an expert."""
    return nodes.op("Less", v.indices, nodes.constant(np.asarray(config.num_experts)))


# --- the forms ---------------------------------------------------------------------------------------------------


def _unrolled(nodes: Nodes, config: NodeConfig, v: _Values) -> str:
    """Every expert has its own nodes; pairs are sorted, split by expert, and put back."""
    pairs = _sort_pairs(nodes, config, v)
    *parts, nobody = nodes.ops("Split", pairs.rows, pairs.counts, outputs=config.num_experts + 1, axis=0)
    outputs = []
    for expert, rows in enumerate(parts):
        outputs.append(_expert(nodes, config, v, rows, partial(_at, nodes, nodes.constant(np.asarray(expert)))))
    outputs.append(nodes.op("Mul", nobody, nodes.scalar(0.0)))
    routed = nodes.op("Concat", *outputs, axis=0)
    inverse = nodes.op("ScatterElements", pairs.order, pairs.order, _range(nodes, nodes.rows(pairs.order)))
    return _combine(nodes, config, v, nodes.op("Gather", routed, inverse))


def _range(nodes: Nodes, stop: str) -> str:
    zero, one = nodes.constant(np.asarray(0)), nodes.constant(np.asarray(1))
    return nodes.op("Range", zero, nodes.op("Squeeze", stop), one)


def _loop(nodes: Nodes, config: NodeConfig, v: _Values) -> str:
    """A Loop over the experts that any token selected."""
    pairs = _sort_pairs(nodes, config, v)
    real = nodes.op("Slice", pairs.counts, nodes.ints(0), nodes.ints(config.num_experts))
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


def _dense(nodes: Nodes, config: NodeConfig, v: _Values) -> str:
    """Every expert on every token, as three wide matrix products; what a token did not select is multiplied by zero."""
    n, m, width = config.num_experts, config.intermediate_size, config.latent_dim
    weights = _mix(nodes, config, v, v.weights, 0.0)

    def linear(weight: str, bias: str | None) -> str:
        matrix = nodes.op("Transpose", nodes.reshape(weight, n * m, width), perm=[1, 0])
        out = nodes.reshape(nodes.op("MatMul", v.hidden, matrix), -1, n, m)
        if config.weights_on_input:
            out = nodes.op("Mul", out, nodes.reshape(weights, -1, n, 1))
        return out if bias is None else nodes.op("Add", out, bias)

    gate = None if v.gate is None else linear(v.gate, v.gate_bias)
    hidden = activate(nodes, config.activation, gate, linear(v.up, v.up_bias))
    if config.weights_on_input:
        ones = nodes.op("Cast", _present(nodes, config, v), to=nodes.dtype)
        weights = _mix(nodes, config, v, ones, 0.0)
    mixed = nodes.reshape(nodes.op("Mul", hidden, nodes.reshape(weights, -1, n, 1)), -1, n * m)
    output = nodes.op("MatMul", mixed, nodes.reshape(nodes.transposed(v.down), n * m, width))
    if v.down_bias is None:
        return output
    return nodes.op("Add", output, nodes.op("MatMul", weights, v.down_bias))


def _gather(nodes: Nodes, config: NodeConfig, v: _Values) -> str:
    """Every pair's own matrices are gathered: for few tokens, where the weights read are all that counts."""
    present = _present(nodes, config, v)
    last = nodes.constant(np.asarray(config.num_experts - 1))
    index = nodes.reshape(nodes.op("Min", v.indices, last), -1)
    weights = nodes.op("Mul", v.weights, nodes.op("Cast", present, to=nodes.dtype))
    rows = nodes.op("Unsqueeze", v.hidden, nodes.ints(1))
    if config.weights_on_input:
        rows = nodes.op("Mul", rows, nodes.op("Unsqueeze", weights, nodes.ints(2)))
    else:
        rows = nodes.op("Expand", rows, nodes.ints(1, config.top_k, 1))
    x = nodes.reshape(rows, -1, config.latent_dim, 1)

    def linear(weight: str, bias: str | None, value: str) -> str:
        out = nodes.op("MatMul", nodes.op("Gather", weight, index), value)
        if bias is None:
            return out
        return nodes.op("Add", out, nodes.op("Unsqueeze", nodes.op("Gather", bias, index), nodes.ints(2)))

    gate = None if v.gate is None else linear(v.gate, v.gate_bias, x)
    hidden = activate(nodes, config.activation, gate, linear(v.up, v.up_bias, x))
    outputs = nodes.reshape(linear(v.down, v.down_bias, hidden), -1, config.top_k, config.latent_dim)
    if config.weights_on_input:
        weights = nodes.op("Cast", present, to=nodes.dtype)
    row = nodes.op("Unsqueeze", weights, nodes.ints(1))
    return nodes.reshape(nodes.op("MatMul", row, outputs), -1, config.latent_dim)


def _moe(nodes: Nodes, config: NodeConfig, v: _Values) -> str:
    """onnxruntime's fused com.microsoft.MoE, which takes logits: the log of a weight is the logit that gives it back.

    Exact for weights >= 0; a batch with a negative one takes the loop form instead.
    """
    attributes = _moe_attributes(config)

    def fused(inner: Nodes) -> str:
        zero = inner.scalar(0.0)
        weights = inner.op("Where", _present(inner, config, v), v.weights, zero)
        total = inner.op("ReduceSum", weights, inner.ints(1))
        logits = _mix(inner, config, v, inner.op("Max", inner.op("Log", weights), inner.scalar(_ABSENT)), _ABSENT)
        w1, b1 = _moe_first(inner, config, v)
        terms = [v.hidden, logits, w1, b1 or "", v.down, v.down_bias or ""]
        return inner.op("Mul", inner.op("MoE", *terms, domain=MICROSOFT, **attributes), total)

    negative = nodes.op("Less", nodes.op("ReduceMin", v.weights, keepdims=0), nodes.scalar(0.0))
    return nodes.if_(negative, lambda inner: _loop(inner, config, v), fused)


def _moe_first(nodes: Nodes, config: NodeConfig, v: _Values) -> tuple[str, str | None]:
    """First layer of com.microsoft.MoE: its weight and bias, gate and up rows interleaved where it is a GLU."""
    n, m, width = config.num_experts, config.intermediate_size, config.latent_dim
    if not config.gated and config.activation.name != "relu_squared":
        return v.up, v.up_bias
    gate, gate_bias = (v.gate, v.gate_bias) if config.gated else (v.up, v.up_bias)
    assert gate is not None

    def interleave(a: str, b: str, *shape: int) -> str:
        pair = nodes.op("Concat", *(nodes.op("Unsqueeze", x, nodes.ints(2)) for x in (a, b)), axis=2)
        return nodes.reshape(pair, *shape)

    weight = interleave(gate, v.up, n, 2 * m, width)
    if gate_bias is None and v.up_bias is None:
        return weight, None
    zeros = nodes.op("Expand", nodes.scalar(0.0), nodes.ints(n, m))
    return weight, interleave(gate_bias or zeros, v.up_bias or zeros, n, 2 * m)


def moe_refusal(config: NodeConfig) -> str:
    """Why com.microsoft.MoE cannot compute this config; empty when it can."""
    a = config.activation
    if config.weights_on_input:
        return "it weighs experts' outputs, not their inputs"
    if config.gated:
        if a.name != "silu":
            return f"its GLU is silu, not {a.name}"
        bounds = (a.gate_min, a.gate_max, a.up_min, a.up_max)
        if bounds == (None,) * 4 or (a.gate_max is not None and bounds == (None, a.gate_max, -a.gate_max, a.gate_max)):
            return ""
        return f"its GLU clamps gate <= c and |up| <= c only, not {bounds}"
    if a.gate_min is not None or a.gate_max is not None:
        return "its ungated experts do not clamp"
    if a.name == "silu" and a.alpha != 1.0:
        return f"its ungated silu has slope 1, not {a.alpha:g}"
    return "" if a.name in _MOE_UNGATED or a.name == "relu_squared" else f"it does not know {a.name}"


_MOE_UNGATED = MappingProxyType({"relu": "relu", "gelu_tanh": "gelu", "silu": "silu", "identity": "identity"})


def _moe_attributes(config: NodeConfig) -> dict[str, str | int | float]:
    refusal = moe_refusal(config)
    if refusal:
        raise LatentizeError(
            f"ONNX form 'moe' cannot express {config.activation.describe(config.gated)} experts: {refusal}; "
            "use --onnx-form auto"
        )
    a = config.activation
    common: dict[str, str | int | float] = {"k": min(config.top_k, config.num_experts), "normalize_routing_weights": 1}
    if config.gated:
        limit = {} if a.gate_max is None else {"swiglu_limit": a.gate_max}
        swiglu = {"activation_alpha": a.alpha, "activation_beta": a.up_offset, **limit}
    elif a.name == "relu_squared":
        swiglu = {"activation_alpha": 1e6, "activation_beta": 0.0}
    else:
        return {**common, "activation_type": _MOE_UNGATED[a.name]}
    return {**common, "activation_type": "swiglu", "swiglu_fusion": 1, **swiglu}


def _auto(nodes: Nodes, config: NodeConfig, v: _Values) -> str:
    """The form that serves most sizes well."""
    return _loop(nodes, config, v)


FORMS: Mapping[str, Form] = MappingProxyType(
    {"auto": _auto, "loop": _loop, "unrolled": _unrolled, "dense": _dense, "gather": _gather, "moe": _moe}
)
