from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch

from latentize.activations import Activation
from latentize.spec import ExpertsSpec, Groups, LatentSpec, MoESpec, RouterSpec


def block(
    d: int = 6, width: int = 6, m: int = 5, n: int = 4, k: int = 2, *, biases: bool = False, latent: bool = False
):
    router = RouterSpec(torch.randn(n, d), k, bias=torch.randn(n) if biases else None, normalize="sum")
    bias = [torch.randn(n, m), torch.randn(n, m), torch.randn(n, width)] if biases else [None, None, None]
    experts = ExpertsSpec(torch.randn(n, m, width), torch.randn(n, width, m), torch.randn(n, m, width), *bias)
    return MoESpec(router, experts, LatentSpec(torch.randn(width, d), torch.randn(d, width)) if latent else None)


def test_sizes_of_a_standard_block():
    spec = block()
    sizes = (spec.hidden_size, spec.latent_dim, spec.intermediate_size, spec.num_experts, spec.top_k)
    assert sizes == (6, 6, 5, 4, 2)
    assert spec.gated


def test_sizes_of_a_latent_block():
    spec = block(d=8, width=3, latent=True)
    assert (spec.hidden_size, spec.latent_dim) == (8, 3)
    assert spec.router.weight.shape[1] == 8


def test_tensors_lists_every_tensor_by_its_path_and_nothing_else():
    spec = replace(block(biases=True, width=3, latent=True), output_bias=torch.zeros(6))
    assert set(spec.tensors()) == {
        "router.weight", "router.bias", "experts.up", "experts.down", "experts.gate", "experts.gate_bias",
        "experts.up_bias", "experts.down_bias", "latent.down", "latent.up", "output_bias",
    }  # fmt: skip
    assert spec.tensors()["experts.up"] is spec.experts.up


def test_map_tensors_reaches_all_and_leaves_the_original():
    spec = block(biases=True, width=3, latent=True)
    doubled = spec.map_tensors(lambda t: t * 2)
    for name, tensor in spec.tensors().items():
        torch.testing.assert_close(doubled.tensors()[name], tensor * 2, rtol=0, atol=0)
    assert doubled.router.normalize == "sum"


def test_to_changes_the_dtype_of_all():
    spec = block(biases=True, width=3, latent=True).to(torch.float64)
    assert {t.dtype for t in spec.tensors().values()} == {torch.float64}


def test_expert_bytes_counts_one_expert_with_its_biases():
    assert block().expert_bytes() == 3 * 5 * 6 * 4
    assert block(biases=True).expert_bytes() == (3 * 5 * 6 + 5 + 5 + 6) * 4
    assert block().to(torch.bfloat16).expert_bytes() == 3 * 5 * 6 * 2


def test_it_is_frozen():
    with pytest.raises(FrozenInstanceError):
        block().output_scale = 2.0


def test_describe_a_plain_block():
    assert block().describe() == "softmax → top-2, ÷ sum; N 4 experts 6→5→6, silu GLU"


def test_describe_names_everything_that_is_there():
    spec = block(d=8, width=3, latent=True, biases=True)
    router = replace(
        spec.router, score="sqrt_softplus", groups=Groups(2, 1, "max"), selection_bias=torch.zeros(4), softcap=30.0,
        scale=2.5, per_expert_scale=torch.ones(4), applies_to="input", normalize="norm", p=2.0,
    )  # fmt: skip
    experts = replace(spec.experts, num_identity=2, activation=Activation("gelu_tanh", gate_max=7.0))
    assert replace(spec, router=router, experts=experts).describe() == (
        "√softplus → top-2, 1 of 2 groups by max, selection bias on score, ÷ 2-norm, softcap 30, × 2.5, "
        "× per-expert scale, weights on the input; "
        "N 4 experts 3→5→3, gelu_tanh GLU, gate_max 7, biases, 2 identity experts, latent 8→3"
    )


def test_describe_topk_first_ungated():
    spec = block()
    spec = replace(spec, router=replace(spec.router, order="topk_first", normalize="clamp"))
    spec = replace(spec, experts=replace(spec.experts, gate=None, activation=Activation("relu_squared")))
    assert spec.describe() == "top-2 → softmax, ÷ max(sum, min); N 4 experts 6→5→6, relu_squared"
    assert not spec.gated
