from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch.testing import assert_close

from latentize.reference import expert_forward, experts_forward, moe_forward, router_forward
from latentize.routing import Routing
from latentize.spec import ExpertsSpec, LatentSpec, MoESpec, RouterSpec


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def block(n: int = 4, m: int = 5, width: int = 6, d: int = 6, k: int = 2, **options) -> MoESpec:
    torch.manual_seed(0)
    experts = ExpertsSpec(normal(n, m, width), normal(n, width, m), normal(n, m, width))
    return MoESpec(RouterSpec(normal(n + options.pop("identity", 0), d), k, **options), experts)


def test_one_expert_is_a_feed_forward_network():
    e = replace(block().experts, gate_bias=normal(4, 5), up_bias=normal(4, 5), down_bias=normal(4, 6))
    x = normal(3, 6)
    hidden = F.silu(F.linear(x, e.gate[2], e.gate_bias[2])) * F.linear(x, e.up[2], e.up_bias[2])
    assert_close(expert_forward(e, 2, x), F.linear(hidden, e.down[2], e.down_bias[2]))


def test_block_is_the_weighted_sum_over_the_selected_experts():
    spec, x = block(), normal(7, 6)
    routing = router_forward(spec, x)
    expected = torch.stack(
        [
            sum(w * expert_forward(spec.experts, int(e), x[t : t + 1])[0] for w, e in zip(*pair, strict=True))
            for t, pair in enumerate(zip(routing.weights, routing.indices, strict=True))
        ]
    )
    assert_close(moe_forward(spec, x), expected)


def test_router_bias_enters_the_logits():
    spec, x = block(), normal(3, 6)
    biased = replace(spec, router=replace(spec.router, bias=normal(4)))
    assert_close(router_forward(biased, x).logits, x @ spec.router.weight.T + biased.router.bias)


def test_weight_on_the_input_is_not_weight_on_the_output():
    spec, x = block(), normal(5, 6)
    on_input = replace(spec, router=replace(spec.router, applies_to="input"))
    routing = Routing(normal(5, 4), torch.full((5, 1), 0.5, dtype=torch.float64), torch.ones(5, 1, dtype=torch.int64))
    assert_close(experts_forward(on_input, x, routing), expert_forward(spec.experts, 1, x * 0.5))
    assert_close(experts_forward(spec, x, routing), expert_forward(spec.experts, 1, x) * 0.5)


def test_latent_block_projects_down_runs_the_experts_and_projects_up_once():
    spec, x = block(width=3, d=6), normal(5, 6)
    latent = replace(spec, latent=LatentSpec(normal(3, 6), normal(6, 3)))
    routing = router_forward(latent, x)
    inner = experts_forward(spec, x @ latent.latent.down.T, routing)
    assert_close(moe_forward(latent, x), inner @ latent.latent.up.T)


def test_identity_experts_pass_the_full_width_input():
    spec, x = block(width=3, d=6, identity=2), normal(9, 6)
    spec = replace(spec, latent=LatentSpec(normal(3, 6), normal(6, 3)), experts=replace(spec.experts, num_identity=2))
    routing = router_forward(spec, x)
    assert (routing.indices >= 4).any()
    without = experts_forward(replace(spec, experts=replace(spec.experts, num_identity=0)), x, routing)
    passed = (routing.weights * (routing.indices >= 4)).sum(1, keepdim=True)
    assert_close(moe_forward(spec, x), without + passed * x)


def test_output_scale_and_bias_come_last():
    spec, x = block(), normal(5, 6)
    bias = normal(6)
    assert_close(moe_forward(replace(spec, output_scale=2.5, output_bias=bias), x), 2.5 * moe_forward(spec, x) + bias)


def test_router_may_read_other_hidden_states():
    spec, x, seen = block(), normal(5, 6), normal(5, 6)
    assert_close(moe_forward(spec, x, seen), experts_forward(spec, x, router_forward(spec, seen)))


def test_no_tokens():
    assert moe_forward(block(), normal(0, 6)).shape == (0, 6)
