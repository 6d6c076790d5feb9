"""A Concat of all of a value's sizes becomes a Shape; what joins anything else stays."""

from __future__ import annotations

import pytest

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")

import numpy as np  # noqa: E402
from onnx import helper, numpy_helper  # noqa: E402

from latentize.exporters.onnx_shapes import join_shapes  # noqa: E402


def graph(parts: list[tuple[str, int] | int], last: int | str = 8) -> ir.Model:
    """A model that joins sizes (value, axis) and constants, and gives the shape and x reshaped to it where it fits."""
    nodes, names, stored = [], [], []
    for number, part in enumerate(parts):
        name = f"part_{number}"
        if isinstance(part, int):
            stored.append(numpy_helper.from_array(np.asarray([part]), name))
        else:
            nodes.append(helper.make_node("Shape", [part[0]], [name], start=part[1], end=part[1] + 1))
        names.append(name)
    nodes.append(helper.make_node("Concat", names, ["shape"], axis=0))
    info = helper.make_tensor_value_info
    inputs = [info("x", 1, ["B", "T", last]), info("y", 1, ["B", "T", last])]
    made = helper.make_graph(nodes, "sizes", inputs, [info("shape", 7, [len(parts)])], stored)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return ir.from_proto(model)


def run(model: ir.Model) -> np.ndarray:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    wanted = {"x": (2, 3, 8), "y": (4, 5, 8)}
    feeds = {v.name: np.zeros(wanted[v.name], np.float32) for v in session.get_inputs()}
    return session.run(["shape"], feeds)[0]


@pytest.mark.parametrize("parts", [[("x", 0), ("x", 1), 8], [("x", 0), ("x", 1), ("x", 2)]])
def test_sizes_of_one_value_become_its_shape(parts: list[tuple[str, int] | int]) -> None:
    model = graph(parts)
    assert join_shapes(model) == 1
    assert [node.op_type for node in model.graph] == ["Shape"]
    assert not model.graph.initializers
    assert list(run(model)) == [2, 3, 8]


@pytest.mark.parametrize(
    ("parts", "last", "shape"),
    [
        ([("x", 1), ("x", 0), 8], 8, [3, 2, 8]),  # another order
        ([("x", 0), ("y", 1), 8], 8, [2, 5, 8]),  # of two values
        ([("x", 0), ("x", 1), 4], 8, [2, 3, 4]),  # another size
        ([("x", 0), ("x", 1), 8], "D", [2, 3, 8]),  # a size that is not known to be 8
        ([("x", 0), ("x", 1)], 8, [2, 3]),  # not all of them
        ([2, 3, 8], 8, [2, 3, 8]),  # constants alone
    ],
)
def test_what_joins_anything_else_stays(
    parts: list[tuple[str, int] | int], last: int | str, shape: list[int]
) -> None:
    model = graph(parts, last)
    before = [node.op_type for node in model.graph]
    assert join_shapes(model) == 0
    assert [node.op_type for node in model.graph] == before
    assert list(run(model)) == shape
