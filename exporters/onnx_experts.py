"""`torch.ops.latentize.latent_experts` as the ONNX node `latentize::LatentExperts`, and a body for every such node."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from latentize import ops as _ops  # noqa: F401 - defines torch.ops.latentize.latent_experts
from latentize.activations import Activation
from latentize.exporters.onnx_bodies import ATTRIBUTES, DOMAIN, INPUTS, MICROSOFT, OP_TYPE, NodeConfig, build_body

if TYPE_CHECKING:
    import onnx_ir as ir

_OPTIONAL = ("gate", "gate_bias", "up_bias", "down_bias")


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """What torch.onnx.export needs to know about our operator."""
    return {torch.ops.latentize.latent_experts.default: _translate}


def _translate(
    hidden: Any, indices: Any, weights: Any, gate: Any, up: Any, down: Any,
    gate_bias: Any, up_bias: Any, down_bias: Any,
    activation: str, alpha: float, gate_min: float | None, gate_max: float | None,
    up_min: float | None, up_max: float | None, up_offset: float, weights_on_input: bool,
) -> Any:  # fmt: skip
    values = (activation, alpha, gate_min, gate_max, up_min, up_max, up_offset, int(weights_on_input))
    attributes = {name: value for name, value in zip(ATTRIBUTES, values, strict=True) if value is not None}
    tensors = (hidden, indices, weights, gate, up, down, gate_bias, up_bias, down_bias)
    return _operator()(*tensors, **attributes)


@cache
def _operator() -> Any:
    import onnx
    import onnxscript

    schema = onnx.defs.OpSchema
    optional, single = schema.FormalParameterOption.Optional, schema.FormalParameterOption.Single

    def parameter(name: str) -> Any:
        kind = "tensor(int64)" if name == "indices" else "T"
        return schema.FormalParameter(name, kind, param_option=optional if name in _OPTIONAL else single)

    types = {"activation": schema.AttrType.STRING, "weights_on_input": schema.AttrType.INT}
    floats = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(double)"]
    return onnxscript.values.Op(
        onnxscript.values.Opset(DOMAIN, 1),
        OP_TYPE,
        schema(
            OP_TYPE, DOMAIN, 1,
            inputs=[parameter(name) for name in INPUTS],
            outputs=[schema.FormalParameter("combined", "T")],
            type_constraints=[("T", floats, "")],
            attributes=[
                schema.Attribute(n, types.get(n, schema.AttrType.FLOAT), "", required=False) for n in ATTRIBUTES
            ],
        ),
    )  # fmt: skip


def attach_bodies(model: ir.Model, form: str, opset: int) -> dict[str, str]:
    """Give every `latentize::LatentExperts` node of `model` a body; nodes with equal configs share one.

    Returns:
        the form of each node's body, by the node's place in the model.

    Raises:
        LatentizeError: the form cannot express a node's experts exactly.
    """
    import onnx_ir as ir

    forms: dict[str, str] = {}
    overloads: dict[NodeConfig, str] = {}
    for node in model.graph.all_nodes():
        if (node.domain, node.op_type) != (DOMAIN, OP_TYPE):
            continue
        config = _config(node)
        if config not in overloads:
            overloads[config] = f"{form}_{len(overloads)}"
            body = ir.from_proto(build_body(form, config, opset, overloads[config]))
            assert isinstance(body, ir.Function)
            model.functions[body.identifier()] = body
            model.opset_imports.setdefault(MICROSOFT, 1)
        node.overload = overloads[config]
        forms[_place(node)] = form
    return forms


def _config(node: ir.Node) -> NodeConfig:
    inputs = dict(zip(INPUTS, [*node.inputs, *(None,) * (len(INPUTS) - len(node.inputs))], strict=True))
    indices, up, hidden = inputs["indices"], inputs["up"], inputs["hidden"]
    assert indices is not None
    assert up is not None
    assert hidden is not None
    experts, intermediate, latent = _sizes(up)
    attributes = {name: attribute.value for name, attribute in node.attributes.items()}
    on_input = bool(attributes.pop("weights_on_input", 0))
    name = attributes.pop("activation", "silu")
    assert hidden.dtype is not None
    return NodeConfig(
        experts, _sizes(indices)[-1], latent, intermediate, int(hidden.dtype), Activation(name, **attributes),
        tuple(name for name in _OPTIONAL if inputs[name] is not None), on_input,
    )  # fmt: skip


def _sizes(value: ir.Value) -> list[int]:
    """The shape; an axis without a fixed length counts -1."""
    assert value.shape is not None
    return [size if isinstance(size, int) else -1 for size in value.shape]


def _place(node: ir.Node) -> str:
    """The module path of a node, as the exporter recorded it."""
    import ast

    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    names = ast.literal_eval(scopes) if scopes else []
    return next((name for name in reversed(names[:-1]) if name), node.name or "")
