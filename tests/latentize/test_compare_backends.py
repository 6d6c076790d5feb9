"""What runs exported models, how fast and in how much memory; with runners that stand for runtimes."""

import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import nn

from latentize.compare_backends import Backend, available, call_memory, memory, tensorrt_backend, timed
from latentize.compare_blocks import in_onnxruntime
from latentize.errors import LatentizeError, MissingExtraError
from latentize.exporters import tensorrt_run
from latentize.exporters.onnx_widened import widen_model
from latentize.inputs import Inputs
from latentize.moe import LatentMoE
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec

TOLERANCES = {torch.float32: 1e-5}


def make_inputs(tokens):
    return Inputs((torch.randn(1, tokens, 4),)) if tokens < 20 else "too long"


def twice(inputs):
    return [tensor * 2 for tensor in inputs.tensors()]


def short_only(inputs):
    if inputs.tensors()[0].shape[1] > 1:
        raise RuntimeError("no profile\nhas room")
    return twice(inputs)


class Failing(nn.Module):
    def forward(self, _x):
        raise RuntimeError("in PyTorch")


class Scaled(nn.Module):
    """A block, and a product, for which onnxruntime has no kernel in bfloat16."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        rows, up, down = (torch.randn(*shape, generator=generator) for shape in ((4, 16), (4, 8, 16), (4, 16, 8)))
        self.moe = LatentMoE(MoESpec(RouterSpec(rows, 2), ExpertsSpec(up, down)))
        self.scale = nn.Parameter(torch.ones(16))

    def forward(self, x):
        return self.moe(x) * self.scale


def test_timing_says_why_a_length_or_a_graph_is_missing():
    backend = Backend("b", {"original": twice, "rewritten": short_only}, TOLERANCES)
    rows = timed(backend, make_inputs, (1, 16, 256), 3)
    assert (rows[0].backend, rows[0].tokens, rows[0].note) == ("b", 1, "")
    assert rows[0].rewritten.median_ms > 0
    assert rows[1].original.median_ms > 0
    assert (rows[1].rewritten, rows[1].note) == (None, "the rewritten graph does not run: no profile has room")
    assert (rows[2].rewritten, rows[2].note) == (None, "too long")


def test_the_memory_of_a_call_is_what_it_took_at_its_worst_moment():
    size = 40 << 20

    def call():
        return bytes(bytearray(size))

    found = call_memory(call)
    if found is None:
        pytest.skip("this system does not tell")
    assert size <= found < 3 * size
    assert call_memory(lambda: None) < size / 4


def test_memory_is_asked_of_lean_runners_and_read_off_devices():
    lean = {"rewritten": lambda inputs: [torch.zeros(1)]}
    backends = [Backend("lean", {}, TOLERANCES, lean), Backend("device", {}, TOLERANCES, {}, {"rewritten": 77})]
    models = {"original": nn.Identity(), "rewritten": nn.Identity()}
    rows = memory(models, [*backends, Backend("none", {}, TOLERANCES)], make_inputs, (1, 256), [])
    assert [(row.backend, row.tokens) for row in rows] == [("torch", 1), ("lean", 1), ("device", 1)]
    assert (rows[1].original, rows[2].rewritten) == (None, 77)


def test_memory_of_a_graph_that_does_not_run_is_said_to_be_unknown():
    notes = []
    backend = Backend("b", {}, TOLERANCES, {"original": twice, "rewritten": short_only})
    rows = memory({}, [backend], make_inputs, (1, 16), notes, torch_too=False)
    assert [(row.tokens, row.rewritten is None) for row in rows][1] == (16, True)
    why = "it does not run: RuntimeError: no profile has room"
    assert notes == [f"b, rewritten: no memory of a call is known: {why}"]
    with pytest.raises(RuntimeError, match="in PyTorch"):
        memory({"original": Failing()}, [], make_inputs, (1,), notes)


def test_backends_that_are_not_there_are_one_line_where_asked_for(tmp_path, monkeypatch):
    assert available(tmp_path, None, [], ExitStack()) == []
    with pytest.raises(LatentizeError, match=r"holds no model\.onnx; convert with --export onnx"):
        available(tmp_path, ("ort",), [], ExitStack())
    with pytest.raises(LatentizeError, match="holds no engine; build one with latentize build"):
        available(tmp_path, ("torch", "trt"), [], ExitStack())
    (tmp_path / "model.portable.engine").write_bytes(b"ftrt" + bytes(60))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LatentizeError, match="needs an NVIDIA GPU and its driver, and there is none here"):
        available(tmp_path, ("trt",), [], ExitStack())
    notes = []
    assert available(tmp_path, None, notes, ExitStack()) == []
    assert "TensorRT is not compared" in notes[0]


def test_a_bfloat16_graph_is_run_as_a_copy_in_float32_while_it_is_needed(tmp_path):
    pytest.importorskip("onnxruntime")
    from latentize.exporters.onnx import export_onnx

    model = Scaled().bfloat16().eval()
    export_onnx(model, (torch.randn(6, 16).bfloat16(),), {}, tmp_path / "model.onnx")
    x, wide, notes = torch.randn(6, 16), widen_model(model), []
    with ExitStack() as held:
        for backend in available(tmp_path, ("ort",), notes, held):
            assert (backend.widened, backend.lean) == (frozenset({"rewritten"}), {})
            (found,) = backend.runners["rewritten"](Inputs((x,)))
            torch.testing.assert_close(found, wide(x).detach(), rtol=1e-5, atol=1e-5)
        copy = backend.files["rewritten"]
        assert copy.parent.parent == tmp_path
        search = in_onnxruntime(copy, wide, [Inputs((x,))], 6, 1e-5)
        assert (len(search.errors), search.first_over, search.note) == (1, "", "")
    assert notes[0].startswith("model.onnx is bfloat16, for which onnxruntime has no CPU kernels: the same graph in ")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


def test_onnxruntime_that_is_not_installed_is_left_out_unless_asked_for(tmp_path, monkeypatch):
    (tmp_path / "model.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    notes = []
    assert available(tmp_path, None, notes, ExitStack()) == []
    assert notes[0].startswith("onnxruntime is not compared: running ONNX files needs the package 'onnxruntime'")
    with pytest.raises(MissingExtraError, match="needs the package 'onnxruntime'"):
        available(tmp_path, ("ort",), [], ExitStack())


def test_the_engine_that_is_run_is_named(monkeypatch):
    class Session:
        dtype, device_bytes = torch.float16, 7

        def __init__(self, path):
            if "SM" in path.name:
                raise LatentizeError(f"{path}: for another device")

    monkeypatch.setattr(tensorrt_run, "EngineSession", Session)
    engines = [Path("model.SM80.engine"), Path("model.native.engine"), Path("model.portable.engine")]
    notes = []
    backend = tensorrt_backend(engines, notes)
    assert backend.files == {"rewritten": engines[1]}
    left = "the first engine that loads here, and not model.SM80.engine, model.portable.engine"
    assert notes == [f"tensorrt runs model.native.engine, {left}"]
    tensorrt_backend(engines[1:2], notes)
    assert notes[1:] == ["tensorrt runs model.native.engine"]
