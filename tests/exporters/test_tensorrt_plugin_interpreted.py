"""The plugin's enqueue on raw CPU buffers, its kernels interpreted; test_tensorrt_plugin.py runs it in a process."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside test_tensorrt_plugin.py, under TRITON_INTERPRET=1", allow_module_level=True)

from latentize.activations import Activation
from latentize.exporters import tensorrt_plugin as plugin
from latentize.exporters.onnx_forms import NodeConfig
from latentize.exporters.tensorrt_plugin import Layer
from latentize.exporters.tensorrt_quick import kernels, problem_of
from latentize.kernels_torch import Experts
from latentize.reference import experts_forward
from latentize.routing import Routing
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec

N, M, L, K = 5, 24, 19, 2


def inputs(tokens, dtype, *, gated):
    generator = torch.Generator().manual_seed(tokens)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    indices = torch.rand(tokens, N, generator=generator).argsort(1)[:, :K]
    experts = Experts(draw(N, M, L) if gated else None, draw(N, M, L), draw(N, L, M), None, draw(N, M), draw(N, L))
    return {"hidden": draw(tokens, L), "indices": indices, "weights": draw(tokens, K), **experts._asdict()}


def reference(tensors, activation, on_input):
    t = {name: value if name == "indices" or value is None else value.double() for name, value in tensors.items()}
    experts = ExpertsSpec(t["up"], t["down"], t["gate"], None, t["up_bias"], t["down_bias"], activation)
    router = RouterSpec(torch.empty(0), K, applies_to="input" if on_input else "output")
    routing = Routing(t["weights"], t["weights"], t["indices"])
    return experts_forward(MoESpec(router, experts), t["hidden"], routing)


def buffers(tensors, layer, most):
    """Inputs in a layer's order, their shapes with `most` tokens, and a workspace of the size that it asks for."""
    given = [tensors[name].contiguous() for name in layer.tensors]
    largest = [(most, *t.shape[1:]) if name in plugin.INPUTS[:3] else tuple(t.shape)
               for name, t in zip(layer.tensors, given, strict=True)]  # fmt: skip
    nbytes = layer.workspace_bytes(largest, tensors["hidden"].dtype)
    return given, torch.full((nbytes + 64,), 77, dtype=torch.uint8)


@pytest.mark.parametrize("tokens", [1, 3, 9])
@pytest.mark.parametrize("gated, on_input, dtype", [(True, False, torch.float32), (False, True, torch.float16)])
def test_layers_compute_the_reference_within_their_workspace(tokens, gated, on_input, dtype):
    tensors = inputs(tokens, dtype, gated=gated)
    activation = Activation("silu", 1.3, gate_max=2.0)
    layer = Layer(tuple(name for name in plugin.INPUTS if tensors[name] is not None), activation, on_input)
    given, workspace = buffers(tensors, layer, 9)
    output = torch.full((tokens, L), 7.0, dtype=dtype)
    shapes, pointers = [tuple(t.shape) for t in given], [t.data_ptr() for t in given]
    layer.run(shapes, dtype, pointers, output.data_ptr(), workspace.data_ptr(), torch.device("cpu"))
    expected = reference(tensors, activation, on_input)
    # fp32: sums in another order; fp16: hidden activations, pairs' outputs and the result rounded.
    assert float((output.double() - expected).norm() / expected.norm()) < (1e-6 if dtype == torch.float32 else 1.5e-3)
    assert (workspace[-64:] == 77).all()


class Numbers:
    """TensorRT's expressions, as numbers."""

    min, cdiv = staticmethod(min), staticmethod(lambda a, b: -(-a // b))


@pytest.mark.parametrize("tokens, usual", [(3, 1), (9, 64)])
@pytest.mark.parametrize("gated, on_input", [(True, False), (False, True)])
def test_the_chain_of_embedded_kernels_computes_the_reference(tokens, usual, gated, on_input):
    """Every kernel on what TensorRT gives it: the graph's tensors, counts, and outputs of the shapes it was told."""
    drawn = inputs(tokens, torch.float32, gated=gated)
    tensors = {name: None if value is None else value.contiguous() for name, value in drawn.items()}
    activation = Activation("silu", 1.3, gate_max=2.0)
    given = tuple(name for name in ("gate", "gate_bias", "up_bias", "down_bias") if tensors[name] is not None)
    config = NodeConfig(N, K, L, M, 1, activation, given, on_input)
    kinds = {"FP32": torch.float32, "INT32": torch.int32}
    for kernel in kernels(problem_of(config), usual):
        config = kernel.configs[0]
        for name in kernel.outputs:
            tensors[name] = torch.full(kernel.shape(name, tokens, Numbers), 7, dtype=kinds[kernel.kind(name)])
        counts = {name: kernel.count(name, tokens, Numbers) for name in kernel.counts}
        passed = {name: counts.get(name, tensors.get(name)) for name in kernel.step.arguments}
        grid = kernel.grid(config, tokens, Numbers)
        kernel.step.kernel[grid](**passed, **kernel.step.constants, **config.options())
    expected = reference(tensors, activation, on_input)
    assert float((tensors["combined"].double() - expected).norm() / expected.norm()) < 1e-6  # sums in another order


def test_no_tokens_touch_nothing():
    tensors = inputs(0, torch.float32, gated=True)
    layer = Layer(tuple(name for name in plugin.INPUTS if tensors[name] is not None), Activation())
    shapes = [tuple(tensors[name].shape) for name in layer.tensors]
    layer.run(shapes, torch.float32, [0] * len(shapes), 0, 0, torch.device("cpu"))
    assert layer.workspace_bytes(shapes, torch.float32) >= 0


def test_enqueue_runs_the_layer_on_the_pointers_it_is_given(monkeypatch):
    trt = pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(plugin, "where", lambda: torch.device("cpu"))
    tensors = inputs(4, torch.float32, gated=True)
    layer = Layer(tuple(name for name in plugin.INPUTS if tensors[name] is not None), Activation("gelu"))
    collection = plugin._collection(trt, plugin.to_fields(layer))
    made = plugin.creator(trt).create_plugin("experts", collection, trt.TensorRTPhase.RUNTIME)
    given, workspace = buffers(tensors, layer, 4)
    kinds = [trt.DataType.INT64 if t.dtype == torch.int64 else trt.DataType.FLOAT for t in given]
    described = [SimpleNamespace(dims=tuple(t.shape), type=kind) for t, kind in zip(given, kinds, strict=True)]
    output = torch.empty(4, L)
    made.enqueue(described, described[:1], [t.data_ptr() for t in given], [output.data_ptr()], workspace.data_ptr(), 0)
    expected = reference(tensors, Activation("gelu"), False)
    assert float((output - expected).norm() / expected.norm()) < 1e-6
