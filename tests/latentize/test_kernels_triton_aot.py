"""The Triton kernels compile to machine code for GPUs that are not here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from latentize import kernels_triton
from latentize.activations import Activation
from latentize.errors import LatentizeError, MissingExtraError
from latentize.kernels_torch import Experts
from latentize.kernels_triton_aot import compile_for
from latentize.kernels_triton_steps import Cut, Problem, block_count, steps, workspaces

SILU = Activation("silu")


def problem(dtype=torch.bfloat16, *, gated=True, biases=False, width=64, activation=SILU) -> Problem:
    return Problem.contiguous(32, 4, width, 96, dtype, activation, gated=gated, biases=biases)


def assert_machine_code(compiled, target):
    for kernel in compiled.kernels:
        assert kernel.cubin.startswith(b"\x7fELF")
        assert f".entry {kernel.symbol}(" in kernel.ptx
        assert f".target sm_{target}" in kernel.ptx
        assert ".version 8.7" in kernel.ptx
        assert kernel.target == target
        assert kernel.threads in (128, 256)
        assert len(kernel.grid(3)) in (1, 2)


@pytest.mark.parametrize("target", [80, 90, 120])
def test_decode_compiles_for_each_generation_and_names_its_arguments(target):
    pytest.importorskip("triton")
    clamped = Activation("silu", 1.7, None, 7.0, -7.0, 7.0, 1.0)
    compiled = compile_for(target, problem(biases=True, activation=clamped), "decode")
    assert_machine_code(compiled, target)
    up, down = ([(a.name, a.type) for a in kernel.arguments] for kernel in compiled.kernels)
    bf16 = ("gate", "up", "gate_bias", "up_bias")
    assert up[:3] == [("hidden", "*bf16"), ("indices", "*i64"), ("weights", "*bf16")]
    assert up[3:7] == [(name, "*bf16") for name in bf16]
    assert up[7] == ("activated", "*fp32")
    assert [name for name, _ in down[:6]] == ["activated", "indices", "weights", "down", "down_bias", "combined"]
    assert all(name.startswith("scratch") and kind == "*i8" for name, kind in up[8:] + down[6:])


@pytest.mark.parametrize("target", [90, 120])
def test_grouped_compiles_to_tensor_core_products(target):
    pytest.importorskip("triton")
    compiled = compile_for(target, problem(gated=False, activation=Activation("relu_squared")), "grouped", tokens=512)
    assert_machine_code(compiled, target)
    count, place, up, down, combine = compiled.kernels
    for kernel in (up, down):
        assert ("wgmma.mma_async" if target == 90 else "mma.sync") in kernel.ptx
    names = [argument.name for argument in up.arguments]
    assert "gate" not in names
    assert "up_bias" not in names
    assert names[-3:] == ["activated", "scratch0", "scratch1"] or names[-1] == "activated"
    assert [a.type for a in count.arguments[:3]] == ["*i64", "i32", "*i32"]
    assert [a.type for a in place.arguments[:5]] == ["*i64", "*i32", "i32", "i32", "*i32"]
    assert [a.name for a in combine.arguments[:3]] == ["indices", "outputs", "combined"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_fused_compiles(dtype):
    pytest.importorskip("triton")
    compiled = compile_for(80, problem(dtype, width=32, gated=dtype == torch.float16), "fused", tokens=64)
    assert_machine_code(compiled, 80)
    fused = compiled.kernels[2]
    assert ("mma.sync" in fused.ptx) == (dtype == torch.float16)  # fp32 is multiplied exactly
    assert fused.shared <= 166912


def test_strides_past_two_to_the_31_are_64_bit_constants():
    pytest.importorskip("triton")
    far = Problem(2, 1, 16, 16, torch.float16, SILU, up=(2**31 + 16, 16), down=(2**31 + 16, 16))
    compiled = compile_for(80, far, "decode")
    assert str(2**31 + 16) in compiled.kernels[0].ptx or str(2 * (2**31 + 16)) in compiled.kernels[0].ptx


def test_what_cannot_be_compiled_is_one_line():
    pytest.importorskip("triton")
    with pytest.raises(LatentizeError, match=r"compute capability 7\.5 is not known: expected one of 8\.0, 8\.6"):
        compile_for(75, problem(), "decode")
    with pytest.raises(LatentizeError, match=r"fp32, bf16 and fp16, not torch\.float64"):
        compile_for(90, problem(torch.float64), "decode")


def test_interpreted_kernels_cannot_be_compiled():
    pytest.importorskip("triton")
    script = (
        "import torch\nfrom latentize.activations import Activation\nfrom latentize.errors import LatentizeError\n"
        "from latentize.kernels_triton_aot import compile_for\nfrom latentize.kernels_triton_steps import Problem\n"
        "p = Problem.contiguous(2, 1, 16, 16, torch.float16, Activation(), gated=False, biases=False)\n"
        "try:\n    compile_for(90, p, 'decode')\nexcept LatentizeError as error:\n    print(error)"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert "TRITON_INTERPRET is set" in done.stdout


def test_a_missing_triton_names_the_extra(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"'triton', which is not installed: pip install 'latentize\[triton\]'"):
        compile_for(90, problem(), "decode")


class Driver:
    """A device as far as Triton asks about one before it launches."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.mark.parametrize("form, tokens", [("decode", 1), ("fused", 9)])
def test_what_a_launch_passes_is_what_the_kernels_take(form, tokens, monkeypatch):
    """Everything of a launch but the launch: arguments bound, specialised, compiled."""
    pytest.importorskip("triton")
    from triton.runtime import driver

    up, down = torch.randn(3, 16, 16).half(), torch.randn(3, 16, 16).half()
    experts = Experts(up, up, down, None, up[:, 0], None)
    hidden, indices = torch.randn(tokens, 16).half(), torch.zeros(tokens, 2, dtype=torch.int64)
    p = kernels_triton.problem_of(hidden, indices, experts, Activation("gelu", gate_max=7.0), False)
    cut = Cut.of(p, tokens, form)
    values = {"hidden": hidden, "indices": indices, "weights": hidden[:, :2], **experts._asdict(), "combined": hidden}
    values |= {name: torch.empty(s, dtype=dtype) for name, (s, dtype) in workspaces(p, tokens, cut).items()}
    values |= {"pairs": 2 * tokens, "blocks": block_count(p, 2 * tokens, cut.block)}
    monkeypatch.setattr(driver, "_active", Driver())
    for step in steps(p, cut):
        config = step.configs[0]
        arguments, grid = [values[name] for name in step.arguments], step.grid(tokens, config.constants)
        compiled = step.kernel.warmup(*arguments, grid=grid, **step.constants, **config.options())
        assert compiled.asm["cubin"].startswith(b"\x7fELF")
