"""One `latentize::LatentExperts` node alone in a graph, with drawn weights and inputs, to be run and timed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from latentize.errors import MissingExtraError
from latentize.exporters.onnx_bodies import DOMAIN, INPUTS, OP_TYPE, build_body
from latentize.exporters.onnx_forms import NodeConfig
from latentize.exporters.onnx_fused import MICROSOFT
from latentize.exporters.onnx_nodes import DOUBLE, MIN_OPSET

if TYPE_CHECKING:
    import onnx
    import onnxruntime


def node_session(form: str, config: NodeConfig, threads: int) -> onnxruntime.InferenceSession:
    """A CPU session on a node whose body has this form.

    Its threads stop spinning when a call ends, so that several sessions can be timed side by side.

    Raises:
        MissingExtraError: onnxruntime is not installed.
        LatentizeError: the form is unknown, or cannot express this config exactly.
    """
    try:
        import onnxruntime
    except ImportError:
        raise MissingExtraError("onnxruntime", "onnx", "timing ONNX forms") from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    options.add_session_config_entry("session.force_spinning_stop", "1")
    model = node_model(form, config).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def node_model(form: str, config: NodeConfig) -> onnx.ModelProto:
    """The graph: its inputs and its output are fp32, whatever the node takes, or fp64 where it computes in that."""
    from onnx import TensorProto, helper

    outside = DOUBLE if config.dtype == DOUBLE else TensorProto.FLOAT
    kinds = {
        "hidden": (outside, config.latent_dim), "indices": (TensorProto.INT64, config.top_k),
        "weights": (outside, config.top_k),
    }  # fmt: skip
    stored = _stored(config)
    nodes, names = [], []
    for name in INPUTS:
        cast = name in ("hidden", "weights") and config.dtype != outside
        names.append(f"{name}_inside" if cast else name if name in kinds or name in stored else "")
        if cast:
            nodes.append(helper.make_node("Cast", [name], [names[-1]], to=config.dtype))
    nodes.append(helper.make_node(OP_TYPE, names, ["combined"], domain=DOMAIN, overload="only"))
    nodes.append(helper.make_node("Cast", ["combined"], ["outside"], to=outside))
    graph = helper.make_graph(
        nodes, "one",
        [helper.make_tensor_value_info(name, kind, ["T", size]) for name, (kind, size) in kinds.items()],
        [helper.make_tensor_value_info("outside", outside, ["T", config.latent_dim])],
        list(stored.values()),
    )  # fmt: skip
    body = build_body(form, config, MIN_OPSET, "only")
    versions = (("", MIN_OPSET), (DOMAIN, 1), (MICROSOFT, 1))
    imports = [helper.make_opsetid(domain, version) for domain, version in versions]
    return helper.make_model(graph, functions=[body], opset_imports=imports, ir_version=10)


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


def _stored(config: NodeConfig) -> dict[str, onnx.TensorProto]:
    """Weights and biases by input, such that hidden activations stay about as large as what they are made of."""
    from onnx import helper, numpy_helper

    n, m, width = config.num_experts, config.intermediate_size, config.latent_dim
    shapes: dict[str, tuple[int, ...]] = {
        "gate": (n, m, width), "up": (n, m, width), "down": (n, width, m),
        "gate_bias": (n, m), "up_bias": (n, m), "down_bias": (n, width),
    }  # fmt: skip
    generator = np.random.default_rng(0)
    inside = helper.tensor_dtype_to_np_dtype(config.dtype)
    return {
        name: numpy_helper.from_array(
            (generator.standard_normal(shape, dtype=np.float32) * shape[-1] ** -0.5).astype(inside), name
        )
        for name, shape in shapes.items()
        if name in ("up", "down", *config.inputs)
    }
