"""What translation leaves behind goes, and nothing that is computed changes."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from latentize.exporters.onnx_tidy import tidy  # noqa: E402

TEXT = """
<ir_version: 10, opset_import: ["" : 20, "own" : 1]>
graph (float[n, 4] x) => (float[n, 4] y, float[n, 4] z)
{
    two = Constant <value_float = 2.0> ()
    three = Constant <value_float = 3.0> ()
    six = Mul (two, three)
    also_two = Constant <value_float = 2.0> ()
    a = Mul (x, six)
    b = Mul (x, six)
    c = own.twice (a)
    unused = Exp (x)
    d = Mul (b, also_two)
    y = Add (c, d)
    z = Identity (y)
}
<domain: "own", opset_import: ["" : 20]>
twice (v) => (w) { k = Constant <value_float = 2.0> () w = Mul (v, k) }
"""


def test_constants_are_computed_and_nothing_is_there_twice() -> None:
    proto = onnx.parser.parse_model(TEXT)
    model = ir.from_proto(proto)
    tidy(model)
    assert not model.functions
    assert "own" not in model.opset_imports
    kinds = Counter(node.op_type for node in model.graph)
    assert set(kinds) <= {"Mul", "Add", "Identity"}
    assert kinds["Mul"] == 2  # x * 6 and that * 2, once each
    small = ir.to_proto(model)
    onnx.checker.check_model(small, full_check=True)
    x = np.random.default_rng(0).standard_normal((3, 4), dtype=np.float32)
    outputs = [
        onnxruntime.InferenceSession(p.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
        for p in (proto, small)
    ]
    for before, after in zip(*outputs, strict=True):
        assert np.array_equal(before, after)


def test_values_that_go_out_keep_their_names() -> None:
    model = ir.from_proto(onnx.parser.parse_model(TEXT))
    tidy(model)
    assert [value.name for value in model.graph.outputs] == ["y", "z"]
    assert [value.name for value in model.graph.inputs] == ["x"]
