"""One node alone in a graph computes the same in every form, in every element type."""

from __future__ import annotations

import numpy as np
import pytest

from latentize.activations import Activation
from latentize.exporters.onnx_alone import node_feeds, node_model, node_session
from latentize.exporters.onnx_bodies import FORMS
from latentize.exporters.onnx_forms import NodeConfig

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

#: element type -> how far forms may be apart: a few roundings of sums of 40 terms in it, or of their result.
APART = {
    onnx.TensorProto.FLOAT: 1e-6, onnx.TensorProto.FLOAT16: 2e-3, onnx.TensorProto.DOUBLE: 1e-14,
    onnx.TensorProto.BFLOAT16: 1e-2,
}  # fmt: skip
COMPOSED = ("gather:1+dense:3+batched", "dense:2+loop")


def make_config(dtype: int, *, gated: bool = True, biases: bool = True, named: bool = True) -> NodeConfig:
    inputs = ("gate", "gate_bias", "up_bias", "down_bias")[0 if gated else 1 : 4 if biases else 1]
    inputs = inputs if gated else tuple(name for name in inputs if name != "gate_bias")
    return NodeConfig(8, 3, 40, 24, dtype, Activation("silu"), inputs, False, named)


@pytest.mark.parametrize("gated, biases", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("dtype", APART)
def test_forms_agree(dtype: int, gated: bool, biases: bool) -> None:
    config = make_config(dtype, gated=gated, biases=biases)
    forms = [f for f in (*FORMS, *COMPOSED) if f != "moe" or dtype != onnx.TensorProto.DOUBLE]
    for tokens in (1, 2, 9):
        feeds = node_feeds(config, tokens)
        outputs = [node_session(form, config, 1).run(None, feeds)[0].astype(np.float64) for form in forms]
        assert np.linalg.norm(outputs[0]) > 0.01
        for form, output in zip(forms, outputs, strict=True):
            error = np.linalg.norm(output - outputs[0]) / np.linalg.norm(outputs[0])
            assert error <= APART[dtype], (form, tokens, error)


@pytest.mark.parametrize("dtype", APART)
def test_several_nodes_in_a_row_have_weights_of_their_own_and_agree_too(dtype: int) -> None:
    config, copies = make_config(dtype), 3
    feeds = node_feeds(config, 5)
    one, *outputs = (
        node_session(form, config, 1, n).run(None, feeds)[0].astype(np.float64)
        for form, n in (("loop", 1), ("loop", copies), ("unrolled", copies), ("gather", copies))
    )
    assert np.linalg.norm(outputs[0] - one) > 0.1 * np.linalg.norm(one)
    for output in outputs[1:]:
        assert np.linalg.norm(output - outputs[0]) <= 10 * APART[dtype] * np.linalg.norm(outputs[0])
    model = node_model("dense", config, copies)
    onnx.checker.check_model(model, full_check=True)
    assert len({tensor.raw_data for tensor in model.graph.initializer if tensor.name.startswith("up_")}) > copies


def test_the_graph_is_a_valid_one_and_its_routing_names_distinct_experts() -> None:
    config = make_config(onnx.TensorProto.FLOAT16)
    onnx.checker.check_model(node_model("unrolled", config), full_check=True)
    indices = node_feeds(config, 50)["indices"]
    assert indices.shape == (50, 3)
    assert all(len(set(row)) == 3 for row in indices.tolist())
    assert set(indices.ravel()) == set(range(8))
