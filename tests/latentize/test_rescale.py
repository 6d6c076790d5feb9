"""Copies of experts leave the function unchanged for every routing, and the naive rule visibly does not."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from latentize.activations import Activation
from latentize.errors import LatentizeError
from latentize.reference import moe_forward, router_forward
from latentize.rescale import copy_experts, expand, simplex
from latentize.spec import ExpertsSpec, Groups, LatentSpec, MoESpec, RouterSpec

D, M, N, K, T = 12, 7, 8, 3, 400

# fp64 on both sides and no more than a dozen additions regrouped: a few hundred roundings of 1e-16.
EXACT = 1e-12
# Every naive rule below is off by far more than any rounding.
VISIBLE = 1e-3


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_spec(
    *, identities: int = 0, gated: bool = True, biases: bool = False, latent: int | None = None, **routing: object
) -> MoESpec:
    width = D if latent is None else latent
    rows = N + identities
    if routing.get("selection_bias") is True:
        routing["selection_bias"] = 0.3 * random(rows, seed=5)
    if routing.get("per_expert_scale") is True:
        routing["per_expert_scale"] = random(rows, seed=6).exp()
    router = RouterSpec(weight=random(rows, D, seed=1) / D**0.5, **{"top_k": K, **routing})  # type: ignore[arg-type]
    experts = ExpertsSpec(
        up=random(N, M, width, seed=2),
        down=random(N, width, M, seed=3),
        gate=random(N, M, width, seed=4) if gated else None,
        gate_bias=random(N, M, seed=7) if biases and gated else None,
        up_bias=random(N, M, seed=8) if biases else None,
        down_bias=random(N, width, seed=9) if biases else None,
        activation=Activation("silu"),
        num_identity=identities,
    )
    projections = None if latent is None else LatentSpec(random(latent, D, seed=10), random(D, latent, seed=11))
    return MoESpec(router, experts, projections, output_scale=1.5, output_bias=random(D, seed=12))


def change(spec: MoESpec, other: MoESpec) -> float:
    """Largest difference of the routed outputs relative to the output's norm, over random tokens."""
    x = random(T, D, seed=20)
    expected = moe_forward(spec, x)
    return ((moe_forward(other, x) - expected).norm() / expected.norm()).item()


NORMALIZATIONS = [
    {"normalize": "none"},
    {"normalize": "sum"},
    {"normalize": "sum", "eps": 0.5},
    {"normalize": "clamp", "eps": 1.2},
    {"normalize": "norm", "p": 2.0},
    {"normalize": "norm", "p": 3.0},
]
SELECTIONS = [
    {},
    {"selection_bias": True},
    {"selection_bias": True, "selection_bias_on": "logit"},
    {"groups": Groups(4, 2, "top2", "-inf"), "selection_bias": True},
    {"groups": Groups(4, 2, "max", "zero")},
    {"softcap": 1.5, "bias": random(N, seed=13), "per_expert_scale": True, "scale": 2.5},
]
ROUTINGS = [
    {"score": score, "order": order, **normalization, **selection}
    for score, order, normalization, selection in itertools.product(
        ("softmax", "sigmoid", "sqrt_softplus"), ("score_first", "topk_first"), NORMALIZATIONS, SELECTIONS
    )
    # Logits are negative half the time: masked experts, all at zero, would then win ties that no rule decides.
    if (order, getattr(selection.get("groups"), "fill", None)) != ("topk_first", "zero")
]


def name(routing: dict[str, object]) -> str:
    return "-".join(str(v) if isinstance(v, (str, float)) else k for k, v in routing.items())


@pytest.mark.parametrize("applies_to", ["output", "input"])
@pytest.mark.parametrize("routing", ROUTINGS, ids=name)
def test_copies_leave_every_routing_unchanged(routing: dict[str, object], applies_to: str) -> None:
    spec = make_spec(applies_to=applies_to, biases=True, **routing)
    for factor in (2, 3):
        expanded = expand(spec, factor, factor)
        assert (expanded.num_experts, expanded.top_k) == (factor * N, factor * K)
        assert change(spec, expanded) < EXACT


@pytest.mark.parametrize("factor", [1, 2, 3, 5])
@pytest.mark.parametrize("experts", [{"gated": False}, {"biases": True}, {"latent": 5, "biases": True}], ids=str)
def test_copies_leave_every_kind_of_expert_unchanged(experts: dict[str, object], factor: int) -> None:
    spec = make_spec(normalize="sum", **experts)
    assert change(spec, expand(spec, factor, factor)) < EXACT


@pytest.mark.parametrize("applies_to", ["output", "input"])
@pytest.mark.parametrize("per_expert_scale", [None, True])
@pytest.mark.parametrize(
    "routing",
    [
        {},
        {"normalize": "sum", "eps": 0.5},
        {"score": "sigmoid"},
        {"score": "sigmoid", "selection_bias": True},
        {"groups": Groups(5, 2)},
    ],
    ids=name,
)
def test_identity_experts_keep_their_share(
    routing: dict[str, object], per_expert_scale: object, applies_to: str
) -> None:
    spec = make_spec(identities=2, top_k=4, applies_to=applies_to, per_expert_scale=per_expert_scale, **routing)
    for factor in (2, 3):
        expanded = expand(spec, factor, factor)
        assert expanded.experts.num_identity == 2 * factor
        assert len(expanded.router.weight) == factor * (N + 2)
        assert change(spec, expanded) < EXACT


def test_child_c_of_expert_e_is_number_c_times_n_plus_e() -> None:
    expanded = expand(make_spec(), 3, 3)
    for child in range(3):
        assert torch.equal(expanded.experts.up[child * N + 5], expanded.experts.up[5])
        assert torch.equal(expanded.router.weight[child * N + 5], expanded.router.weight[5])


def naive(spec: MoESpec, factor: int, **router: object) -> MoESpec:
    """Exact copies, with what the naive rule would have left as it was."""
    copies = expand(spec, factor, factor)
    return replace(copies, router=replace(copies.router, **router))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("routing", "left_alone"),
    [
        ({"score": "sigmoid"}, {"scale": 1.0}),
        ({"score": "sqrt_softplus"}, {"scale": 1.0}),
        ({"score": "sigmoid", "order": "topk_first"}, {"scale": 1.0}),
        ({"score": "sigmoid", "normalize": "sum", "eps": 0.5}, {"eps": 0.5}),
        ({"score": "sqrt_softplus", "normalize": "clamp", "eps": 4.0}, {"eps": 4.0}),
        ({"score": "softmax", "normalize": "sum", "eps": 0.5}, {"eps": 1.0}),  # scores shrink, so eps must not grow
        ({"score": "softmax", "normalize": "norm", "p": 2.0}, {"scale": 1.0}),
        ({"score": "sigmoid", "normalize": "norm", "p": 3.0}, {"scale": 1.0}),
        ({"selection_bias": 0.3 * random(N, seed=5)}, {"selection_bias": 0.3 * random(N, seed=5).repeat(2)}),
        ({}, {"scale": 0.5}),  # softmax over all experts has divided already
        ({"order": "topk_first"}, {"scale": 0.5}),
    ],
    ids=str,
)
def test_the_naive_rule_changes_the_function(routing: dict[str, object], left_alone: dict[str, object]) -> None:
    spec = make_spec(**routing)
    assert change(spec, expand(spec, 2, 2)) < EXACT
    assert change(spec, naive(spec, 2, **left_alone)) > VISIBLE


def test_dividing_the_weight_of_an_input_weighted_expert_changes_the_function() -> None:
    spec = make_spec(applies_to="input", normalize="sum")
    copies = expand(spec, 2, 2)
    divided = replace(
        copies,
        router=replace(copies.router, scale=spec.router.scale),
        experts=replace(copies.experts, down=copies.experts.down * 2),
    )
    assert change(spec, copies) < EXACT
    assert change(spec, divided) > VISIBLE


def test_an_undivided_bias_of_an_input_weighted_expert_changes_the_function() -> None:
    spec = make_spec(applies_to="input", normalize="sum", biases=True)
    copies = expand(spec, 2, 2)
    assert copies.experts.down_bias is not None
    undivided = replace(copies, experts=replace(copies.experts, down_bias=copies.experts.down_bias * 2))
    assert change(spec, undivided) > VISIBLE


def test_undivided_identity_experts_change_the_function() -> None:
    spec = make_spec(applies_to="input", identities=2)
    copies = expand(spec, 2, 2)
    assert change(spec, copies) < EXACT
    assert change(spec, replace(copies, router=replace(copies.router, per_expert_scale=None))) > VISIBLE


def test_siblings_in_one_group_change_the_function() -> None:
    """Child c of expert e at a * e + c: a sum-of-top-2 score then counts one parent twice."""
    spec = make_spec(score="sigmoid", groups=Groups(4, 2, "top2"))
    copies = expand(spec, 2, 2)
    order = torch.arange(2 * N).view(2, N).T.flatten()
    together = replace(
        copies,
        router=replace(copies.router, weight=copies.router.weight[order], groups=Groups(4, 2, "top2")),
        experts=replace(
            copies.experts,
            up=copies.experts.up[order],
            down=copies.experts.down[order],
            gate=copies.experts.gate[order] if copies.experts.gate is not None else None,
        ),
    )
    assert change(spec, copies) < EXACT
    assert change(spec, together) > VISIBLE


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("order", ["score_first", "topk_first"])
@pytest.mark.parametrize("factors", [(2, 1), (3, 1), (4, 1), (3, 2)], ids=str)
@pytest.mark.parametrize(
    "routing",
    [
        {},
        {"selection_bias": True},
        {"normalize": "sum", "eps": 0.5},
        {"normalize": "clamp", "eps": 0.7},
        {"normalize": "norm", "p": 2.0},
        {"normalize": "sum", "applies_to": "input", "biases": True},
    ],
    ids=name,
)
def test_more_experts_and_no_more_active_ones_start_near_the_original_with_no_expert_dead(
    score: str, order: str, factors: tuple[int, int], routing: dict[str, object]
) -> None:
    a, b = factors
    spec = make_spec(score=score, order=order, **routing)
    expanded = expand(spec, a, b)
    assert (expanded.num_experts, expanded.top_k) == (a * N, b * K)
    # Logits move by a thousandth: weights with them, and one or two of the 400 tokens select another last expert.
    assert change(spec, expanded) < 4e-2
    tokens = random(20 * T, D, seed=20)  # of so many, every parent's children get enough for their shares to tell
    load = torch.bincount(router_forward(expanded, tokens).indices.flatten(), minlength=a * N).double()
    parents = torch.bincount(router_forward(spec, tokens).indices.flatten(), minlength=N).double()
    share = load.view(a, N) / parents
    assert share.min() > 0.2 * b / a


def test_more_experts_without_banks_change_the_function() -> None:
    spec = make_spec(normalize="sum")
    copies = copy_experts(spec, 2, 1)
    assert change(spec, copies) > 0.1


def test_bank_directions_survive_half_precision_routers() -> None:
    expanded = expand(make_spec().to(torch.bfloat16), 2, 1)
    assert expanded.router.weight.dtype == torch.float32
    assert expanded.experts.up.dtype == torch.bfloat16
    assert not torch.equal(expanded.router.weight[:N], expanded.router.weight[N:])


def test_factor_one_returns_the_block_itself() -> None:
    spec = make_spec()
    assert expand(spec, 1, 1) is spec


def test_a_simplex_has_equal_angles() -> None:
    for count in (2, 3, 4, 7):
        corners = simplex(count)
        expected = torch.full((count, count), -1.0 / (count - 1), dtype=torch.float64).fill_diagonal_(1.0)
        torch.testing.assert_close(corners @ corners.T, expected)


@pytest.mark.parametrize(
    ("spec", "factors", "message"),
    [
        ({}, (1, 2), "top-k factor 2 is larger than experts factor 1"),
        ({}, (0, 0), "at least 1"),
        ({"groups": Groups(4, 2)}, (2, 1), "4 routing groups"),
        ({"identities": 2}, (2, 1), "2 identity experts"),
        ({"identities": 4, "groups": Groups(2, 1)}, (2, 2), "group of 6 holds both"),
    ],
    ids=str,
)
def test_what_cannot_be_expanded_is_refused(spec: dict[str, object], factors: tuple[int, int], message: str) -> None:
    with pytest.raises(LatentizeError, match=message):
        expand(make_spec(**spec), *factors)
