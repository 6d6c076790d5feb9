"""The body form made of onnxruntime's fused com.microsoft.MoE, where its semantics are exactly ours."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np

from latentize.errors import LatentizeError
from latentize.exporters.onnx_forms import NodeConfig, Values, loop, present
from latentize.exporters.onnx_nodes import DOUBLE, Nodes

MICROSOFT = "com.microsoft"
_ABSENT = -1e30  # the logit of an expert that a token did not select: its softmax weight is exactly zero


def fused(nodes: Nodes, config: NodeConfig, v: Values) -> str:
    """onnxruntime's fused com.microsoft.MoE, which takes logits: the log of a weight is the logit that gives it back.

    Exact for weights >= 0; a batch with a negative one takes the loop form instead.
    """
    attributes = _attributes(config)

    def operator(inner: Nodes) -> str:
        weights = v.weights
        if not config.all_named:
            weights = inner.op("Where", present(inner, config, v), weights, inner.scalar(0.0))
        total = inner.op("ReduceSum", weights, inner.ints(1))
        logits = _spread(inner, config, v, inner.op("Max", inner.op("Log", weights), inner.scalar(_ABSENT)))
        w1, b1 = _first_layer(inner, config, v)
        terms = [v.hidden, logits, w1, b1 or "", v.down, v.down_bias or ""]
        return inner.op("Mul", inner.op("MoE", *terms, domain=MICROSOFT, **attributes), total)

    negative = nodes.op("Less", nodes.op("ReduceMin", v.weights, keepdims=0), nodes.scalar(0.0))
    return nodes.if_(negative, lambda inner: loop(inner, config, v), operator)


def _spread(nodes: Nodes, config: NodeConfig, v: Values, values: str) -> str:
    """[T, N] with values [T, k] where a token selected an expert, `_ABSENT` elsewhere."""
    n = config.num_experts
    columns = n if config.all_named else n + 1
    shape = nodes.op("Concat", nodes.rows(v.indices), nodes.ints(columns), axis=0)
    empty = nodes.op("Expand", nodes.scalar(_ABSENT), shape)
    if config.all_named:
        return nodes.op("ScatterElements", empty, v.indices, values, axis=1)
    index = nodes.op("Min", v.indices, nodes.constant(np.asarray(n)))
    full = nodes.op("ScatterElements", empty, index, values, axis=1)
    return nodes.op("Slice", full, nodes.ints(0), nodes.ints(n), nodes.ints(1))


def _first_layer(nodes: Nodes, config: NodeConfig, v: Values) -> tuple[str, str | None]:
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
    if config.dtype == DOUBLE:
        return "it does not compute in float64"
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


def _attributes(config: NodeConfig) -> dict[str, str | int | float]:
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
