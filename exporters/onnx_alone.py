"""`latentize::LatentExperts` alone in a graph, one or several of a kind, with drawn weights, to be run and timed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from latentize.errors import require_packages
from latentize.exporters.onnx_bodies import DOMAIN, INPUTS, OP_TYPE, build_body
from latentize.exporters.onnx_forms import NodeConfig
from latentize.exporters.onnx_fused import MICROSOFT
from latentize.exporters.onnx_nodes import DOUBLE, MIN_OPSET

if TYPE_CHECKING:
    import onnx
    import onnxruntime


def node_session(form: str, config: NodeConfig, threads: int, copies: int = 1) -> onnxruntime.InferenceSession:
    """A CPU session on `node_model`.

    Its threads stop spinning when a call ends, so that several sessions can be timed side by side.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        LatentizeError: the form is unknown, or cannot express this config exactly.
    """
    require_packages(("onnxruntime",), "onnx", "timing ONNX forms")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = node_model(form, config, copies).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def node_model(form: str, config: NodeConfig, copies: int = 1) -> onnx.ModelProto:
    """Nodes whose body has this form, one after the other, each with weights of its own and a normalisation before it.

    The first has none. Inputs and output are fp32, whatever the nodes take, or fp64 where they compute in that.
    """
    from onnx import TensorProto, helper

    outside = DOUBLE if config.dtype == DOUBLE else TensorProto.FLOAT
    kinds = {
        "hidden": (outside, config.latent_dim), "indices": (TensorProto.INT64, config.top_k),
        "weights": (outside, config.top_k),
    }  # fmt: skip
    nodes: list[onnx.NodeProto] = []
    stored: list[onnx.TensorProto] = []
    hidden = "hidden"
    for copy in range(copies):
        if copy:
            nodes.append(helper.make_node("LayerNormalization", [hidden, "ones"], [f"normal_{copy}"]))
            hidden = f"normal_{copy}"
        own = _stored(config, copy)
        stored += own.values()
        nodes += _one(config, {"hidden": hidden, "indices": "indices", "weights": "weights"}, own, copy, outside)
        hidden = nodes[-1].output[0]
    stored.append(helper.make_tensor("ones", outside, [config.latent_dim], [1.0] * config.latent_dim))
    graph = helper.make_graph(
        nodes, "alone",
        [helper.make_tensor_value_info(name, kind, ["T", size]) for name, (kind, size) in kinds.items()],
        [helper.make_tensor_value_info(hidden, outside, ["T", config.latent_dim])],
        stored,
    )  # fmt: skip
    body = build_body(form, config, MIN_OPSET, "only")
    versions = (("", MIN_OPSET), (DOMAIN, 1), (MICROSOFT, 1))
    imports = [helper.make_opsetid(domain, version) for domain, version in versions]
    return helper.make_model(graph, functions=[body], opset_imports=imports, ir_version=10)


def _one(
    config: NodeConfig, given: Mapping[str, str], own: Mapping[str, onnx.TensorProto], copy: int, outside: int
) -> list[onnx.NodeProto]:
    """The nodes around and of one copy, the last of which gives its output."""
    from onnx import helper

    nodes, names = [], []
    for name in INPUTS:
        if name in ("hidden", "weights") and config.dtype != outside:
            nodes.append(helper.make_node("Cast", [given[name]], [f"{name}_inside_{copy}"], to=config.dtype))
            names.append(f"{name}_inside_{copy}")
        else:
            names.append(given.get(name) or (own[name].name if name in own else ""))
    nodes.append(helper.make_node(OP_TYPE, names, [f"combined_{copy}"], domain=DOMAIN, overload="only"))
    nodes.append(helper.make_node("Cast", [f"combined_{copy}"], [f"outside_{copy}"], to=outside))
    return nodes


def node_feeds(config: NodeConfig, tokens: int) -> dict[str, np.ndarray[Any, Any]]:
    """Drawn hidden states and weights, and a uniform routing to distinct experts."""
    generator = np.random.default_rng(tokens)
    outside = np.float64 if config.dtype == DOUBLE else np.float32
    order = generator.random((tokens, config.num_experts)).argsort(axis=1)
    return {
        "hidden": generator.standard_normal((tokens, config.latent_dim), dtype=outside),
        "indices": np.ascontiguousarray(order[:, : config.top_k]),
        "weights": generator.random((tokens, config.top_k), dtype=outside),
    }


def _stored(config: NodeConfig, copy: int) -> dict[str, onnx.TensorProto]:
    """Weights and biases by input, such that hidden activations stay about as large as what they are made of."""
    from onnx import helper, numpy_helper

    n, m, width = config.num_experts, config.intermediate_size, config.latent_dim
    shapes: dict[str, tuple[int, ...]] = {
        "gate": (n, m, width), "up": (n, m, width), "down": (n, width, m),
        "gate_bias": (n, m), "up_bias": (n, m), "down_bias": (n, width),
    }  # fmt: skip
    generator = np.random.default_rng(copy)
    inside = helper.tensor_dtype_to_np_dtype(config.dtype)
    return {
        name: numpy_helper.from_array(
            (generator.standard_normal(shape, dtype=np.float32) * shape[-1] ** -0.5).astype(inside), f"{name}_{copy}"
        )
        for name, shape in shapes.items()
        if name in ("up", "down", *config.inputs)
    }
