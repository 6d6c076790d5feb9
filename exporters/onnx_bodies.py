"""Bodies of standard ONNX operators for `latentize::LatentExperts`.

A body is a FunctionProto: with it in the file, a runtime that has no kernel for the node runs the body instead.
Bodies are built from the node's sizes, never traced: a 64-expert unrolled one takes a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from latentize.errors import LatentizeError
from latentize.exporters import onnx_forms
from latentize.exporters.onnx_costs import last_tokens
from latentize.exporters.onnx_forms import NodeConfig, Values
from latentize.exporters.onnx_fused import MICROSOFT, fused
from latentize.exporters.onnx_nodes import DOUBLE, Nodes

if TYPE_CHECKING:
    import onnx

DOMAIN = "latentize"
OP_TYPE = "LatentExperts"
INPUTS = ("hidden", "indices", "weights", "gate", "up", "down", "gate_bias", "up_bias", "down_bias")
ATTRIBUTES = ("activation", "alpha", "gate_min", "gate_max", "up_min", "up_max", "up_offset", "weights_on_input")

Form = Callable[[Nodes, NodeConfig, Values], str]

#: name -> how to build it. A form "few+many", or "few+some+many", takes one by the number of pairs in the batch.
FORMS: Mapping[str, Form] = MappingProxyType(
    {
        "loop": onnx_forms.loop,
        "unrolled": onnx_forms.unrolled,
        "batched": onnx_forms.batched,
        "dense": onnx_forms.dense,
        "gather": onnx_forms.gather,
        "moe": fused,
    }
)


def build_body(form: str, config: NodeConfig, opset: int, overload: str) -> onnx.FunctionProto:
    """The function body of nodes with this config.

    Half-precision nodes compute in fp32 inside, as onnxruntime's CPU kernels do.

    Raises:
        LatentizeError: the form is unknown, or cannot express this config exactly.
    """
    from onnx import TensorProto, helper

    check_form(form)
    compute = DOUBLE if config.dtype == DOUBLE else TensorProto.FLOAT
    nodes = Nodes(compute)
    result = _by_pairs(nodes, config, _inputs(nodes, config, compute), form.split("+"))
    if config.dtype == compute:
        assert list(nodes.list[-1].output) == [result]
        nodes.list[-1].output[0] = "combined"
    else:
        nodes.list.append(helper.make_node("Cast", [result], ["combined"], to=config.dtype))
    imports = [helper.make_opsetid("", opset)]
    if any(n.domain == MICROSOFT for n in _all_nodes(nodes.list)):
        imports.append(helper.make_opsetid(MICROSOFT, 1))
    return helper.make_function(
        DOMAIN, OP_TYPE, list(INPUTS), ["combined"], nodes.list, imports, list(ATTRIBUTES), overload=overload,
        doc_string=f"form {form}",
    )  # fmt: skip


def _inputs(nodes: Nodes, config: NodeConfig, compute: int) -> Values:
    def value(name: str) -> str:
        return name if config.dtype == compute else nodes.op("Cast", name, to=compute)

    def optional(name: str) -> str | None:
        return value(name) if name in config.inputs else None

    return Values(
        value("hidden"), "indices", value("weights"), optional("gate"), value("up"), value("down"),
        optional("gate_bias"), optional("up_bias"), optional("down_bias"),
    )  # fmt: skip


def _all_nodes(nodes: list[onnx.NodeProto]) -> list[onnx.NodeProto]:
    inner = [a.g for n in nodes for a in n.attribute if a.HasField("g")]
    return [*nodes, *(n for g in inner for n in _all_nodes(list(g.node)))]


def check_form(form: str) -> None:
    """Refuse a form that does not exist.

    Raises:
        LatentizeError: naming the forms there are.
    """
    if not all(part in FORMS for part in form.split("+", 2)):
        known = ", ".join(FORMS)
        raise LatentizeError(
            f"ONNX form {form!r} is not known: expected auto, {known}, or several of them as few+many or few+some+many"
        )


def _by_pairs(nodes: Nodes, config: NodeConfig, v: Values, forms: Sequence[str], pairs: str = "") -> str:
    """The first form for batches of few pairs, the others for larger ones; `pairs` is their number, if it is known."""
    few, *others = forms
    if not others:
        return FORMS[few](nodes, config, v)
    pairs = pairs or nodes.op("Size", v.indices)
    small = nodes.op("LessOrEqual", pairs, nodes.constant(np.asarray(few_pairs(config, few, others[0]))))
    return nodes.if_(
        small,
        lambda inner: FORMS[few](inner, config, v),
        lambda inner: _by_pairs(inner, config, v, others, pairs),
    )


def few_pairs(config: NodeConfig, few: str, many: str) -> int:
    """Up to how many (token, expert) pairs form `few` costs less than form `many`; at least one token's."""
    tokens = last_tokens(config, few, many)
    return (1 << 31) if tokens is None else tokens * config.top_k
