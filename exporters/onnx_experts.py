"""`torch.ops.latentize.latent_experts` as the ONNX node `latentize::LatentExperts`, and a body for every such node."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from latentize import ops as _ops  # noqa: F401 - defines torch.ops.latentize.latent_experts
from latentize.activations import Activation
from latentize.exporters.onnx_bodies import ATTRIBUTES, DOMAIN, INPUTS, OP_TYPE, build_body
from latentize.exporters.onnx_choice import REQUESTS, FormChoice, How, names_of
from latentize.exporters.onnx_costs import TOKENS, Priced, cheapest
from latentize.exporters.onnx_forms import NodeConfig
from latentize.exporters.onnx_fused import MICROSOFT, moe_refusal

if TYPE_CHECKING:
    import onnx_ir as ir

#: Unrolled bodies: at most this many experts in a graph (a thousand load in seconds) and bytes of fp32 weights.
UNROLLED_EXPERTS, UNROLLED_BYTES = 1024, 1 << 30
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


def attach_bodies(model: ir.Model, form: str, opset: int, tokens: tuple[int, ...] = TOKENS) -> tuple[FormChoice, ...]:
    """Give every `latentize::LatentExperts` node of `model` a body; nodes with equal configs share one.

    Args:
        model: changed in place.
        form: the text of one (`onnx_choice`); "auto" chooses what should be fast at `tokens`, "measured" what is so on
            this machine.
        opset: version of the standard operators.
        tokens: numbers of tokens in flight; the bodies are right for any other too.

    Returns:
        the form of each node's body, in the order of the nodes.

    Raises:
        LatentizeError: the form cannot express a node's experts exactly.
    """
    import onnx_ir as ir

    nodes = [node for node in model.graph.all_nodes() if (node.domain, node.op_type) == (DOMAIN, OP_TYPE)]
    configs = [node_config(node) for node in nodes]
    chosen = {config: _chosen(form, config, configs, tokens) for config in configs}
    for number, (config, name) in enumerate(chosen.items()):
        body = ir.from_proto(build_body(name, config, opset, _overload(name, number)))
        assert isinstance(body, ir.Function)
        model.functions[body.identifier()] = body
        model.opset_imports.setdefault(MICROSOFT, 1)
    overloads = {config: _overload(name, number) for number, (config, name) in enumerate(chosen.items())}
    for node, config in zip(nodes, configs, strict=True):
        node.overload = overloads[config]
    how = {config: _how(form, config) for config in configs}
    counts = () if form not in REQUESTS else tokens
    return tuple(FormChoice.of(place(n), chosen[c], c, counts, how[c]) for n, c in zip(nodes, configs, strict=True))


def _overload(form: str, number: int) -> str:
    return f"{'_or_'.join(names_of(form))}_{number}"


def _how(form: str, config: NodeConfig) -> How:
    """How a request's form comes about; experts that are too large to be timed get theirs by what forms cost."""
    how = REQUESTS.get(form, "asked")
    if how == "measured":
        from latentize.exporters.onnx_timing import measurable

        return how if measurable(config) else "priced"
    return how


def _chosen(form: str, config: NodeConfig, every: Sequence[NodeConfig], tokens: tuple[int, ...]) -> str:
    """The form that a request comes to for one node of a graph."""
    if form == "auto":
        return choose_form(config, every, tokens)
    if form == "measured":
        from latentize.exporters.onnx_timing import fastest

        return fastest(config, candidates(config, every), tokens, every.count(config))
    return form


def choose_form(config: NodeConfig, every: Sequence[NodeConfig], tokens: tuple[int, ...] = TOKENS) -> str:
    """The form, or forms by the number of tokens, that cost least on CPU at `tokens`, for a node of a graph of `every`.

    What they cost is in `onnx_costs`.
    """
    return "+".join(cheapest(Priced(config), candidates(config, every), tokens))


def candidates(config: NodeConfig, every: Sequence[NodeConfig]) -> tuple[str, ...]:
    """The forms that suit a node of a graph of `every`.

    Forms with nodes of their own for each expert take time to load and hold a second copy of the weights: they count
    only within `UNROLLED_EXPERTS` and `UNROLLED_BYTES` over the whole graph, and dense products, whose weights are
    transposed, only within the latter. onnxruntime's fused operator counts where it is exact, and a loop over the
    active experts where it is not.
    """
    forms = ["gather", "loop" if moe_refusal(config) else "moe"]
    if sum(c.weight_bytes for c in every) <= UNROLLED_BYTES:
        forms += ["dense"]
        if sum(c.num_experts for c in every) <= UNROLLED_EXPERTS:
            forms += ["batched", "unrolled"]
    return tuple(forms)


def node_config(node: ir.Node) -> NodeConfig:
    """What the body of a `latentize::LatentExperts` node depends on."""
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
        tuple(name for name in _OPTIONAL if inputs[name] is not None), on_input, _all_named(indices, experts),
    )  # fmt: skip


def _all_named(indices: ir.Value, experts: int) -> bool:
    """Whether indices [T, k] are positions among as many scores as there are experts, so that none lies beyond."""
    choice = indices.producer()
    if choice is None or choice.op_type != "TopK" or choice.domain or not choice.inputs:
        return False
    scores, axis = choice.inputs[0], choice.attributes.get("axis")
    if scores is None or scores.shape is None or (axis is not None and axis.value not in (-1, len(scores.shape) - 1)):
        return False
    return _sizes(scores)[-1] == experts


def _sizes(value: ir.Value) -> list[int]:
    """The shape; an axis without a fixed length counts -1."""
    assert value.shape is not None
    return [size if isinstance(size, int) else -1 for size in value.shape]


def place(node: ir.Node) -> str:
    """The module path of a node, as the exporter recorded it."""
    import ast

    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    names = ast.literal_eval(scopes) if scopes else []
    return next((name for name in reversed(names[:-1]) if name), node.name or "")
