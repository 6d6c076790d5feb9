from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

from latentize import kernels_native, kernels_torch, ops
from latentize.activations import Activation
from latentize.kernels_torch import Experts

SILU = Activation("silu")


def arguments():
    torch.manual_seed(0)
    experts = Experts(torch.randn(4, 6, 3), torch.randn(4, 6, 3), torch.randn(4, 3, 6), None, None, None)
    return torch.randn(5, 3), torch.randint(0, 4, (5, 2)), torch.rand(5, 2), experts, SILU, False


def test_import_compiles_nothing(tmp_path):
    environment = {**os.environ, "LATENTIZE_CACHE": str(tmp_path / "cache")}
    script = "import latentize, latentize.moe, latentize.ops"
    subprocess.run([sys.executable, "-c", script], check=True, env=environment)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("switch", [{"CXX": "false", "PATH": "/usr/bin:/bin"}, {"LATENTIZE_NATIVE": "0"}])
def test_falls_back_to_torch_with_one_line(tmp_path, monkeypatch, caplog, switch):
    for name, value in {"LATENTIZE_CACHE": str(tmp_path), **switch}.items():
        monkeypatch.setenv(name, value)
    kernels_native._load.cache_clear()
    hidden, indices, weights, experts, *_ = arguments()
    try:
        with caplog.at_level(logging.INFO, logger="latentize.kernels_native"):
            assert kernels_native.load() is None
            output = ops.compute(hidden, indices, weights, *experts, SILU, False)
        assert_close(output, kernels_torch.forward(*arguments()), rtol=0, atol=0)
    finally:
        kernels_native._load.cache_clear()
    lines = [record.message for record in caplog.records if "plain torch is used" in record.message]
    assert len(lines) == (1 if "CXX" in switch else 0)


def test_wide_bf16_experts_with_many_tokens_leave_it_to_torch_where_it_multiplies_tiles(monkeypatch):
    monkeypatch.setattr(kernels_native, "_has_bf16_tiles", lambda: True)
    wide = Experts(None, torch.empty(2, 256, 256, dtype=torch.bfloat16), torch.empty(0), None, None, None)
    assert kernels_native.pays(torch.zeros(20, 2), wide)
    assert not kernels_native.pays(torch.zeros(24, 2), wide)
    assert kernels_native.pays(torch.zeros(24, 2), wide._replace(up=wide.up.float()))


@pytest.mark.slow
def test_compiles_once_into_the_cache(tmp_path):
    if kernels_native.load() is None:
        pytest.skip("no C++ compiler here")
    environment = {**os.environ, "LATENTIZE_CACHE": str(tmp_path / "cache")}
    script = "import latentize.kernels_native as k; assert k.load() is not None"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", script], check=True, env=environment)
        (library,) = (tmp_path / "cache").iterdir()
        seen = library.stat().st_mtime_ns
    assert library.suffix == ".so"
    assert library.stat().st_mtime_ns == seen


@pytest.mark.slow
@pytest.mark.parametrize("instructions", ["-march=x86-64", "-march=x86-64-v3"])
def test_narrower_instruction_sets_compute_the_same(tmp_path, monkeypatch, instructions):
    if kernels_native.load() is None or os.uname().machine != "x86_64":
        pytest.skip("needs a C++ compiler for x86-64")
    monkeypatch.setenv("LATENTIZE_CACHE", str(tmp_path))
    monkeypatch.setattr(kernels_native, "_VARIANTS", ((instructions,),))
    kernels_native._load.cache_clear()
    try:
        hidden, indices, weights, experts, *rest = arguments()
        for repeat in (1, 20):
            call = (hidden.repeat(repeat, 1), indices.repeat(repeat, 1), weights.repeat(repeat, 1), experts, *rest)
            # fp32 sums in another order.
            assert_close(kernels_native.forward(*call), kernels_torch.forward(*call), rtol=1e-5, atol=1e-5)
            grads = (module.backward(call[0], *call, True) for module in (kernels_native, kernels_torch))
            for ours, theirs in zip(*grads, strict=True):
                assert_close(ours, theirs, rtol=1e-5, atol=1e-4)
    finally:
        kernels_native._load.cache_clear()
