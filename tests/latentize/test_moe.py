from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from random_blocks import random_block
from torch import Tensor
from torch.testing import assert_close

from latentize import ops
from latentize.moe import LatentMoE
from latentize.reference import moe_forward
from latentize.spec import Groups, LatentSpec, MoESpec


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def block(d=8, width=3, m=5, n=6, k=2, **options) -> MoESpec:
    torch.manual_seed(0)
    return random_block(normal, d, width, m, n, k, **options)


VARIANTS = {
    "latent": {},
    "standard": {"latent": False},
    "ungated": {"gated": False},
    "biases": {"biases": True},
    "identity": {"identity": 3},
    "bypass": {"bypass": 2},
    "bypass, identity, biases": {"bypass": 7, "identity": 3, "biases": True},
    "input": {"applies_to": "input"},
    "topk first": {"order": "topk_first"},
    "sigmoid": {"score": "sigmoid", "normalize": "sum", "eps": 1e-20, "scale": 2.5},
    "scales": {"per_expert_scale": torch.rand(6)},
    "groups -inf": {"groups": Groups(3, 2), "selection_bias": torch.linspace(-2, -1, 6), "score": "sigmoid"},
    "groups zero": {"groups": Groups(3, 2, "max", "zero"), "selection_bias": torch.linspace(-2, -1, 6)},
    "softcap": {"softcap": 1.0, "normalize": "clamp", "eps": 0.3},
}


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
def test_module_is_the_reference(options):
    spec, x = block(**options), normal(20, 8)
    assert_close(LatentMoE(spec)(x), moe_forward(spec, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_bypass_is_added_before_the_scale_and_the_bias(scale):
    spec, x = replace(block(bypass=2), output_scale=scale, output_bias=normal(8)), normal(20, 8)
    without = replace(spec, latent=replace(spec.latent, bypass_down=None, bypass_up=None), output_bias=None)
    around = x @ (spec.latent.bypass_up @ spec.latent.bypass_down).T
    expected = moe_forward(without, x) + scale * around + spec.output_bias
    assert_close(moe_forward(spec, x), expected, rtol=1e-12, atol=1e-12)
    assert_close(LatentMoE(spec)(x), expected, rtol=1e-12, atol=1e-12)


def test_projections_by_hand():
    spec, x = block(k=1), normal(1, 8)
    expert = int((x @ spec.router.weight.T).argmax())
    z = x @ spec.latent.down.T
    h = F.silu(z @ spec.experts.gate[expert].T) * (z @ spec.experts.up[expert].T)
    weight = (x @ spec.router.weight.T).softmax(-1)[0, expert]
    assert_close(LatentMoE(spec)(x), weight * (h @ spec.experts.down[expert].T) @ spec.latent.up.T)


def test_identity_projections_make_a_standard_block():
    spec, x = block(latent=False), normal(20, 8)
    eye = torch.eye(8, dtype=torch.float64)
    assert_close(LatentMoE(replace(spec, latent=LatentSpec(eye, eye)))(x), LatentMoE(spec)(x))


def test_router_reads_the_full_width():
    spec, x = block(), normal(20, 8)
    module = LatentMoE(spec)
    seen = []
    module.router.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    module(x)
    assert torch.equal(seen[0], x)
    # What the projection drops does not reach the experts, but may still turn the router.
    dropped = torch.linalg.svd(spec.latent.down).Vh[-1]
    assert_close((x + 3 * dropped) @ spec.latent.down.T, x @ spec.latent.down.T)
    assert not torch.equal(module.router(x).indices, module.router(x + 3 * dropped).indices)


def test_router_may_read_other_hidden_states():
    spec, x, seen = block(), normal(4, 5, 8), normal(4, 5, 8)
    expected = moe_forward(spec, x.view(20, 8), seen.view(20, 8)).view(4, 5, 8)
    assert_close(LatentMoE(spec)(x, seen), expected)


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (2, 0, 8), (2, 3, 8), (8,)])
def test_any_leading_shape(shape):
    spec, x = block(identity=1), normal(*shape)
    output = LatentMoE(spec)(x)
    assert output.shape == x.shape
    assert_close(output, moe_forward(spec, x.reshape(-1, 8)).view(shape))


def test_output_scale_and_bias():
    spec, x = replace(block(), output_scale=0.5, output_bias=normal(8)), normal(7, 8)
    assert_close(LatentMoE(spec)(x), moe_forward(spec, x))


def test_spec_gives_back_what_the_module_was_made_of():
    spec = replace(block(biases=True, identity=1, per_expert_scale=torch.rand(7)), output_bias=normal(8))
    module = LatentMoE(spec)
    again = module.spec
    assert again.describe() == spec.describe()
    assert set(again.tensors()) == set(spec.tensors())
    for name, tensor in spec.tensors().items():
        assert again.tensors()[name].data_ptr() == tensor.data_ptr(), name
    with torch.no_grad():
        module.experts.down.mul_(2)
    assert_close(module.spec.experts.down, spec.experts.down)


def test_state_dict_round_trip():
    spec = block(biases=True, selection_bias=torch.rand(6), groups=Groups(3, 2))
    x, module = normal(9, 8), LatentMoE(spec)
    other = LatentMoE(spec.map_tensors(torch.zeros_like))
    assert not torch.equal(other(x), module(x))
    missing = other.load_state_dict(module.state_dict(), strict=True)
    assert not missing.missing_keys
    assert not missing.unexpected_keys
    assert torch.equal(other(x), module(x))
    assert "router.selection_bias" in module.state_dict()


def test_every_parameter_learns_as_in_the_reference():
    spec, x = replace(block(biases=True, normalize="sum"), output_bias=normal(8)), normal(40, 8)
    module = LatentMoE(spec)
    module(x).square().sum().backward()
    named = dict(module.named_parameters())
    leaves = {name: t.detach().clone().requires_grad_() for name, t in spec.tensors().items()}
    copied = iter(leaves.values())
    moe_forward(spec.map_tensors(lambda _: next(copied)), x).square().sum().backward()
    inner = {"latent.down": "latent_down", "latent.up": "latent_up", "output_bias": "output_bias"}
    renamed = {name: f"experts.{own}" for name, own in inner.items()}
    assert len(named) == len(leaves)
    for name, leaf in leaves.items():
        assert_close(named[renamed.get(name, name)].grad, leaf.grad, rtol=1e-9, atol=1e-9, msg=name)


def test_routing_is_computed_in_fp32_at_low_precision():
    spec = block().to(torch.bfloat16)
    module, x = LatentMoE(spec), normal(30, 8).bfloat16()
    routing = module.router(x)
    assert routing.logits.dtype == torch.float32
    assert_close(routing.logits, x.float() @ spec.router.weight.float().T)
    output = module(x)
    assert output.dtype == torch.bfloat16
    exact = moe_forward(spec.to(torch.float64), x.double())
    # Latent, hidden, combined and output are each rounded to 8 bits.
    assert float((output.detach().double() - exact).norm() / exact.norm()) < 2e-2


def test_autocast_narrows_the_projections_only():
    module, x = LatentMoE(block().to(torch.float32)), normal(30, 8).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = module(x).detach().float()
    exact = module(x).detach()
    assert float((output - exact).norm() / exact.norm()) < 2e-2


def test_checked_mode_counts_identity_experts():
    module = LatentMoE(block(identity=2))
    weights, latent = torch.ones(1, 1, dtype=torch.float64), normal(1, 3)
    with ops.checked():
        module.experts.combine(latent, torch.tensor([[7]]), weights)
        with pytest.raises(ValueError, match=r"\[0, 8\)"):
            module.experts.combine(latent, torch.tensor([[8]]), weights)


def test_exported_block_holds_one_node_for_all_experts():
    module, x = LatentMoE(block()), normal(5, 8)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    for graph in (program.graph, program.run_decompositions().graph):
        assert sum(node.target is ops.latent_experts for node in graph.nodes) == 1
    for tokens in (1, 9):
        y = normal(tokens, 8)
        assert_close(program.module()(y), module(y))


def test_printing_names_the_sizes():
    text = repr(LatentMoE(block()))
    assert "hidden_size=8, num_experts=6, top_k=2" in text
    assert "hidden_size=8, latent_dim=3, num_experts=6, intermediate_size=5" in text
