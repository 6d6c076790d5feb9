"""The plugin layer: described, negotiated, built into engines without a GPU, run on CPU buffers by the interpreter."""

from __future__ import annotations

import gc
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from latentize.activations import Activation
from latentize.errors import LatentizeError
from latentize.exporters import tensorrt_plugin as plugin
from latentize.exporters.tensorrt import build
from latentize.exporters.tensorrt_plugin import Layer, from_fields, to_fields
from latentize.exporters.tensorrt_profiles import Profile
from latentize.kernels_triton_steps import Cut
from latentize.moe import LatentMoE
from latentize.spec import ExpertsSpec, LatentSpec, MoESpec, RouterSpec

D, L, M, N, K = 16, 8, 16, 6, 2
CLAMPED = Activation("silu", 1.5, None, 7.0, -7.0, 7.0, 1.0)
UNGATED = ("hidden", "indices", "weights", "up", "down", "up_bias")


def make_block(*, gated: bool = True) -> LatentMoE:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3

    experts = ExpertsSpec(
        draw(N, M, L), draw(N, L, M), draw(N, M, L) if gated else None, up_bias=draw(N, M), activation=CLAMPED
    )
    return LatentMoE(MoESpec(RouterSpec(draw(N, D), K, normalize="sum"), experts, LatentSpec(draw(L, D), draw(D, L))))


def write_onnx(block: LatentMoE, folder: Path) -> None:
    pytest.importorskip("onnxscript")
    from latentize.exporters.onnx import export_onnx

    export_onnx(block, (torch.zeros(2, 5, D),), {}, folder / "model.onnx")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_layers_run_on_raw_buffers():
    """The cases are in test_tensorrt_plugin_interpreted.py."""
    cases = Path(__file__).with_name("test_tensorrt_plugin_interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", str(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@pytest.mark.parametrize("targets", [("portable", "SM120"), pytest.param(("SM80", "SM89"), marks=pytest.mark.slow)])
def test_engines_with_the_plugin_are_built_without_a_gpu(tmp_path, targets):
    pytest.importorskip("tensorrt_rtx")
    write_onnx(make_block(gated=False), tmp_path)
    engines = build(tmp_path, targets=targets, profiles=(Profile((1, 1, 2), (1, 16, 32)),), experts="plugin")
    for engine, target in zip(engines, targets, strict=True):
        content = (tmp_path / engine.file).read_bytes()
        assert engine.file == f"model.{target}.engine"
        assert engine.plugins == 1
        assert b"LatentExperts" in content  # looked up by this name when the engine is loaded
        assert " ".join(UNGATED).encode() in content
        assert len(content) > 4 * N * M * L * 2  # the experts' weights are in it
    assert list(engines[0].profiles[0].values()) == [((1, 1, D), (1, 16, D), (2, 32, D))]


def test_nodes_become_plugins_that_name_their_inputs(tmp_path):
    onnx = pytest.importorskip("onnx")
    write_onnx(make_block(gated=False), tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    assert plugin.name_plugins(model) == 1
    assert len(model.functions) == 0
    (node,) = (node for node in model.graph.node if node.op_type == "LatentExperts")
    values = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    assert values["tensors"].decode().split() == list(UNGATED)
    assert len(node.input) == len(UNGATED)
    assert "" not in node.input
    assert (values["plugin_version"], values["plugin_namespace"]) == (b"1", b"latentize")


@pytest.mark.parametrize("layer", [Layer(UNGATED, CLAMPED, True), Layer(plugin.INPUTS, Activation("gelu"))])
def test_a_layer_survives_its_fields(layer):
    assert from_fields(to_fields(layer)) == layer


@pytest.mark.parametrize("tensors", [None, "hidden indices weights up", "hidden indices weights up down other"])
def test_an_engine_of_another_version_is_refused_with_what_to_do(tensors):
    values = {"activation": "silu"} | ({"tensors": tensors} if tensors else {})
    with pytest.raises(LatentizeError, match=r"expected the inputs hidden, indices.*build the engine again"):
        from_fields(values)


def test_the_library_gives_back_the_layer_it_was_given():
    """Through the creator in both phases: from an ONNX node's fields, and from what an engine keeps."""
    trt = pytest.importorskip("tensorrt_rtx")
    plugin.register(trt)
    plugin.register(trt)
    creator = trt.get_plugin_registry().get_creator("LatentExperts", "1", "latentize")
    assert creator is not None
    layer = Layer(UNGATED, CLAMPED, True)
    built = plugin.creator(trt).create_plugin("n", plugin._collection(trt, to_fields(layer)), trt.TensorRTPhase.BUILD)
    assert built.layer == layer
    kept = built.clone().get_fields_to_serialize()
    gc.collect()
    assert plugin.creator(trt).create_plugin("n", kept, trt.TensorRTPhase.RUNTIME).layer == layer
    assert built.attach_to_context(None).layer == layer


def test_formats_and_types_are_negotiated():
    trt = pytest.importorskip("tensorrt_rtx")
    made = plugin.creator(trt).create_plugin("n", plugin._collection(trt, to_fields(Layer(UNGATED, CLAMPED))), None)

    def description(kind, form=trt.TensorFormat.LINEAR):
        dynamic = trt.DynamicPluginTensorDesc()
        dynamic.desc.type, dynamic.desc.format = kind, form
        return dynamic

    half, whole, long = trt.DataType.HALF, trt.DataType.FLOAT, trt.DataType.INT64

    def supported(position, *kinds, form=trt.TensorFormat.LINEAR):
        return made.supports_format_combination(position, [description(kind, form) for kind in kinds], len(UNGATED))

    assert supported(0, half)
    assert not supported(0, trt.DataType.INT8)
    assert not supported(0, half, form=trt.TensorFormat.CHW4)
    assert supported(1, half, long)
    assert not supported(1, half, trt.DataType.INT32)
    assert supported(2, half, long, half)
    assert not supported(2, half, long, whole)
    assert supported(6, half, long, half, half, half, half, half)  # the output
    assert made.get_output_data_types([half, long]) == [half]


@pytest.mark.parametrize(
    ("most", "experts", "width", "intermediate"), [(33000, 512, 64, 32), (32800, 512, 1024, 768), (70000, 8, 16, 8)]
)
def test_the_workspace_suffices_around_powers_of_two(most, experts, width, intermediate):
    problem = plugin.Problem.contiguous(
        experts, 1, width, intermediate, torch.bfloat16, CLAMPED, gated=True, biases=False
    )
    given = plugin._most_workspace(problem, most)
    around = {2**power + step for power in range(1, 17) for step in (-1, 0, 1)} | {most, most - 1, plugin.SETTLED}
    assert all(plugin._workspace_bytes(problem, tokens) <= given for tokens in around if 1 <= tokens <= most)


@pytest.mark.parametrize("most", [1, 7, 300])
def test_the_workspace_suffices_for_every_number_of_tokens(most):
    layer = Layer(UNGATED, CLAMPED)

    def shapes(tokens):
        return [(tokens, L), (tokens, K), (tokens, K), (N, M, L), (N, L, M), (N, M)]

    given = layer.workspace_bytes(shapes(most), torch.float16)
    problem = layer.problem(shapes(most), torch.float16)
    for tokens in range(1, most + 1):
        needed = plugin.workspaces(problem, tokens, Cut.of(problem, tokens)).values()
        assert sum(256 * -(-torch.Size(shape).numel() * kind.itemsize // 256) for shape, kind in needed) <= given
    assert problem.up == (M * L, L)
    assert problem.down == (L * M, M)
    assert (problem.gate, problem.up_bias, problem.down_bias) == (None, M, None)
