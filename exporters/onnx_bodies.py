"""Bodies of standard ONNX operators for `latentize::LatentExperts`.

A body is a FunctionProto: with it in the file, a runtime that has no kernel for the node runs the body instead.
Bodies are built from the node's sizes, never traced: a 64-expert unrolled one takes a fraction of a second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np

from latentize.exporters import onnx_forms
from latentize.exporters.onnx_choice import check_text, limits_of, names_of
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

#: More pairs of a token and an expert than there are.
_ANY = 1 << 31

#: name -> how to build it. Of several in one body (`onnx_choice`), the number of tokens in flight takes one.
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
    result = _by_tokens(nodes, config, _inputs(nodes, config, compute), names_of(form), limits_of(form, config))
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
    """Refuse what asks for no form that exists.

    Raises:
        LatentizeError: naming the forms there are, or what is wrong with the numbers of tokens in it.
    """
    check_text(form, FORMS)


def _by_tokens(
    nodes: Nodes, config: NodeConfig, v: Values, forms: Sequence[str], limits: Sequence[int | None], pairs: str = ""
) -> str:
    """The first form for batches of few tokens, the others for larger ones; `pairs` is their number, if it is known."""
    few, *others = forms
    if not others:
        return FORMS[few](nodes, config, v)
    pairs = pairs or nodes.op("Size", v.indices)
    limit, *rest = limits
    most = nodes.constant(np.asarray(_ANY if limit is None else limit * config.top_k))
    return nodes.if_(
        nodes.op("Equal" if limit == 1 else "LessOrEqual", pairs, most),
        lambda inner: FORMS[few](inner, config, replace(v, one_token=limit == 1)),
        lambda inner: _by_tokens(inner, config, v, others, rest, pairs),
    )
