"""Kernels that engines embed: the graph's nodes, what TensorRT is told of them, and what it would launch."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import small_lm as cases
import tensorrt_stand_in as stand_in
import torch

pytest.importorskip("triton")
onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")

from latentize import store  # noqa: E402
from latentize.activations import Activation  # noqa: E402
from latentize.errors import LatentizeError  # noqa: E402
from latentize.exporters import tensorrt  # noqa: E402
from latentize.exporters.tensorrt_quick import embed, kernels, register  # noqa: E402
from latentize.kernels_triton_aot import compile_for  # noqa: E402
from latentize.kernels_triton_steps import Problem, block_count  # noqa: E402

L, M, N, K = cases.L, cases.M, cases.N, cases.K
CLAMPED = Activation("silu", 1.5, None, 7.0, -7.0, 7.0, 1.0)
DECODE, FUSED, GROUPED = 1, 64, 4096


def problem(dtype=torch.float16, *, width=32, biases=True) -> Problem:
    return Problem.contiguous(16, 2, width, 48, dtype, CLAMPED, gated=True, biases=biases)


def descriptions(kernel, tokens):
    """What TensorRT says of a kernel's inputs."""
    p = kernel.problem
    shapes = {"hidden": (tokens, p.width), "indices": (tokens, p.top_k), "weights": (tokens, p.top_k),
              "gate": (p.num_experts, p.intermediate, p.width), "up": (p.num_experts, p.intermediate, p.width),
              "down": (p.num_experts, p.width, p.intermediate), "gate_bias": (p.num_experts, p.intermediate),
              "up_bias": (p.num_experts, p.intermediate), "down_bias": (p.num_experts, p.width)}  # fmt: skip
    blocks = block_count(p, tokens * p.top_k, kernel.cut.block)
    shapes |= {"activated": (tokens * p.top_k, p.intermediate), "order": (tokens * p.top_k,),
               "outputs": (tokens * p.top_k, kernel.cut.splits, p.width)}  # fmt: skip
    shapes["chunk_counts"] = (-(-tokens * p.top_k // kernel.cut.chunk), p.constants["EXPERTS"])
    shapes |= dict.fromkeys(("block_expert", "block_start", "block_rows"), (blocks,))
    kinds = [stand_in.DataType(kernel.kind(name)) for name in kernel.inputs]
    given = [stand_in.from_shape_expr(shapes[n], kind) for n, kind in zip(kernel.inputs, kinds, strict=True)]
    return given, shapes


def parameters(ptx: str, symbol: str) -> list[str]:
    declared = re.search(rf"\.entry {symbol}\((.*?)\)", ptx, re.DOTALL).group(1)
    return [line.split()[1] for line in declared.strip().split(",\n")]


@pytest.mark.parametrize(
    ("target", "usual", "width"), [(80, FUSED, 32), (90, DECODE, 32), (120, GROUPED, 320), (90, FUSED, 32)]
)
def test_tensorrt_is_told_shapes_launches_and_arguments_in_its_order(target, usual, width):
    trtp, made = stand_in.Plugin(), problem(width=width)
    register(trtp, stand_in.Trt, [made], usual, target)
    chain = kernels(made, usual)
    assert set(trtp.known) == {f"latentize::{kernel.name}" for kernel in chain}
    for kernel in chain:
        known = trtp.known[f"latentize::{kernel.name}"]
        for tokens in (1, 7, 300):
            given, shapes = descriptions(kernel, tokens)
            described = known.describe(*given)
            outputs = described if isinstance(described, tuple) else (described,)
            shapes["combined"] = (tokens, made.width)
            assert [tuple(map(stand_in.number, o.shape_expr)) for o in outputs] == [shapes[n] for n in kernel.outputs]
            assert [o.dtype.value for o in outputs] == [kernel.kind(name) for name in kernel.outputs]
            (tuned,) = known.autotune(*given, outputs)
            assert len(tuned.kinds.split(", ")) == len(kernel.inputs) + len(kernel.outputs)
            assert tuned.layout == "LINEAR"
            for tactic in (0, tuned.tactics[-1]) if tokens == 7 else (0,):
                symbol, ptx, launch, counts = known.aot_impl(*given, outputs, tactic)
                config = kernel.configs[max(0, tactic - 1)]
                grid = kernel.step.grid(tokens, config.constants)
                assert (launch.grid_x, launch.grid_y, launch.grid_z) == (*grid, 1, 1)[:3]
                assert (launch.block_x, launch.shared_mem <= 48 << 10) == (32 * config.num_warps, True)
                pairs = tokens * made.top_k
                assert [stand_in.number(count) for count in counts] == [
                    {"pairs": pairs, "blocks": block_count(made, pairs, kernel.cut.block)}[n] for n in kernel.counts
                ]
                kinds = [".u64"] * len(kernel.inputs) + [".u32"] * len(kernel.counts) + [".u64"] * len(kernel.outputs)
                assert parameters(ptx, symbol) == kinds


@pytest.mark.parametrize("target", [80, 90, 120])
def test_what_is_embedded_assembles(target, tmp_path):
    import triton.backends.nvidia

    binaries = Path(triton.backends.nvidia.__file__).with_name("bin")
    named = binaries / ("ptxas-blackwell" if target >= 100 else "ptxas")
    assembler = named if named.exists() else binaries / "ptxas"
    for kernel in compile_for(target, problem(torch.bfloat16), "decode").kernels:
        (tmp_path / "kernel.ptx").write_text(kernel.bare_ptx)
        source, made = tmp_path / "kernel.ptx", tmp_path / "out"
        command = [assembler, f"--gpu-name=sm_{target}{'a' * (target >= 90)}", source, "-o", made]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert made.read_bytes().startswith(b"\x7fELF")


@pytest.mark.parametrize("tokens", [DECODE, FUSED])
def test_nodes_of_the_graph_become_a_chain_of_plugins(tmp_path, tokens):
    path = cases.write_onnx(tmp_path)
    model = ir.load(path)
    model.functions.clear()
    (found,) = embed(model, tokens)
    ir.save(model, tmp_path / "embedded.onnx")
    graph = onnx.load(tmp_path / "embedded.onnx").graph
    nodes = [node for node in graph.node if node.domain == "latentize"]
    chain = kernels(found, tokens)
    assert [node.op_type for node in nodes] == [kernel.name for kernel in chain] * 2
    for node, kernel in zip(nodes, [*chain, *chain], strict=True):
        assert [(a.name, a.s) for a in node.attribute] == [("plugin_namespace", b"latentize")]
        assert (len(node.input), len(node.output)) == (len(kernel.inputs), len(kernel.outputs))
    made = {name for node in graph.node for name in node.output} | {v.name for v in (*graph.input, *graph.initializer)}
    assert all(name in made for node in graph.node for name in node.input if name)
    assert {output.name for output in graph.output} <= made
    assert (found.num_experts, found.top_k, found.width, found.intermediate) == (N, K, L, M)
    again = store.decode(Problem, store.encode(found, pytest.fail), pytest.fail)
    assert again == found  # it travels to the process that builds


def test_kernels_that_need_more_shared_memory_than_any_launch_gets_are_refused():
    (*_, fused, _) = kernels(problem(torch.float32, width=256), FUSED)
    with pytest.raises(LatentizeError, match=r"kernel fused at l 256, m 48 needs more than 48 KiB of shared memory"):
        _ = fused.configs


def test_devices_and_dtypes_that_are_not_served_are_one_line(tmp_path):
    with pytest.raises(LatentizeError, match=r"compute capability 7\.5: embedded kernels are compiled for 8\.0"):
        register(stand_in.Plugin(), stand_in.Trt, [problem()], 1, 75)


def test_without_the_full_library_it_is_said_before_the_work(tmp_path):
    if tensorrt.tensorrt_library.find("") == "tensorrt":
        pytest.skip("the full library is installed here")
    cases.write_onnx(tmp_path)
    with pytest.raises(LatentizeError, match=r"only the full tensorrt \(10\.9 or newer\) embeds kernels"):
        tensorrt.build(tmp_path, experts="embedded")
