"""The start: exact where nothing is dropped, better with data than without, and sound on every kind of block."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from latentize.activations import Activation
from latentize.errors import LatentizeError
from latentize.initialise import PRIOR_TOKENS, initialise, input_sensitivity, local_guesses, routed_only
from latentize.moe import LatentMoE
from latentize.plan import make_plan
from latentize.projections import reconstruction
from latentize.recipe import Recipe
from latentize.reference import experts_forward, moe_forward, router_forward
from latentize.reread import Reading
from latentize.routing import Routing
from latentize.spec import ExpertsSpec, Groups, MoESpec, RouterSpec
from latentize.statistics import BlockStatistics, collect

D, M, N, K = 16, 12, 6, 2

# fp64 on both sides and a few additions regrouped.
EXACT = 1e-12


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_spec(
    *,
    identities: int = 0,
    gated: bool = True,
    biases: bool = False,
    activation: Activation | None = None,
    output_scale: float = 1.0,
    output_bias: bool = False,
    **routing: object,
) -> MoESpec:
    router = RouterSpec(
        **{"weight": random(N + identities, D, seed=1) / D**0.5, "top_k": K, "normalize": "sum", **routing}  # type: ignore[arg-type]
    )
    experts = ExpertsSpec(
        up=random(N, M, D, seed=2) / D**0.5,
        down=random(N, D, M, seed=3) / M**0.5,
        gate=random(N, M, D, seed=4) / D**0.5 if gated else None,
        gate_bias=random(N, M, seed=5) if biases and gated else None,
        up_bias=random(N, M, seed=6) if biases else None,
        down_bias=random(N, D, seed=7) if biases else None,
        activation=activation or Activation("silu"),
        num_identity=identities,
    )
    return MoESpec(router, experts, None, output_scale, random(D, seed=8) if output_bias else None)


def text_like(tokens: int, seed: int = 9, rank: int = D) -> Tensor:
    """Tokens [tokens, d] with a decaying spectrum in a random basis, as hidden states have."""
    basis = torch.linalg.qr(random(D, D, seed=10))[0]
    scales = torch.linspace(0, 3, D, dtype=torch.float64).neg().exp()
    scales[rank:] = 0
    return random(tokens, D, seed=seed) * scales @ basis.T * 3


def measure(spec: MoESpec, hidden: Tensor) -> BlockStatistics:
    block = LatentMoE(spec)
    return collect(block, {"block": block}, [(part.to(spec.experts.up.dtype),) for part in hidden.split(256)])["block"]


def start(spec: MoESpec, statistics: BlockStatistics | None, **recipe: object) -> MoESpec:
    named = None if statistics is None else {"block": statistics}
    plan = make_plan({"block": spec}, Recipe(**recipe), named)["block"]
    return initialise(spec, plan, statistics, seed=0)


def error(spec: MoESpec, latent: MoESpec, hidden: Tensor) -> float:
    expected = moe_forward(spec, hidden)
    return ((moe_forward(latent, hidden) - expected).norm() / expected.norm()).item()


KINDS = {
    "gated": {},
    "ungated relu²": {"gated": False, "activation": Activation("relu_squared")},
    "biases": {"biases": True},
    "clamped glu": {
        "biases": True,
        "activation": Activation("silu", 1.702, gate_max=7.0, up_min=-7.0, up_max=7.0, up_offset=1.0),
    },
    "input weighted": {"applies_to": "input", "biases": True, "score": "sigmoid", "normalize": "none"},
    "identities": {"identities": 2},
    "identities, input weighted": {"identities": 2, "applies_to": "input", "normalize": "none"},
    "output scale and bias": {"output_scale": 2.5, "output_bias": True},
    "sigmoid with selection bias": {"score": "sigmoid", "selection_bias": 0.1 * random(N, seed=11), "scale": 2.0},
    "groups": {"score": "sigmoid", "groups": Groups(3, 2), "normalize": "sum", "eps": 1e-20},
}


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_at_full_width(kind: str, factor: int, with_data: bool) -> None:
    spec = make_spec(**KINDS[kind])
    statistics = measure(spec, text_like(500)) if with_data else None
    latent = start(spec, statistics, latent_dim=D, experts_factor=factor, topk_factor=factor)
    assert latent.latent is not None
    assert torch.equal(latent.latent.down, torch.eye(D, dtype=torch.float64))
    assert torch.equal(latent.latent.up, torch.eye(D, dtype=torch.float64))
    assert error(spec, latent, text_like(300, seed=20)) < EXACT


@pytest.mark.parametrize("variant", ["fixed", "acc"])
@pytest.mark.parametrize("kind", KINDS)
def test_inputs_that_fit_the_latent_width_lose_nothing_but_the_output_side(kind: str, variant: str) -> None:
    """Tokens of rank 6 through a latent of 12: P drops nothing; U, at 12 of 16, drops what the outputs have beyond."""
    spec = make_spec(**KINDS[kind])
    hidden = text_like(2000, rank=6)
    latent = start(spec, measure(spec, hidden), latent_dim=12, variant=variant)
    assert latent.latent is not None
    projection = latent.latent.down
    seen = hidden @ projection.T
    lost = hidden - seen @ torch.linalg.lstsq(seen, hidden).solution
    assert lost.norm() < 1e-6 * hidden.norm()
    assert error(spec, latent, hidden) < 0.3


@pytest.mark.parametrize("kind", KINDS)
def test_data_beats_weights_alone(kind: str) -> None:
    spec = make_spec(**KINDS[kind])
    statistics = measure(spec, text_like(4000))
    fresh = text_like(1000, seed=21)
    blind = start(spec, None, latent_dim=8, variant="fixed", init="weights")
    seeing = start(spec, statistics, latent_dim=8, variant="fixed")
    assert error(spec, seeing, fresh) < 0.8 * error(spec, blind, fresh)
    assert error(spec, blind, fresh) < 1.0


@pytest.mark.parametrize(
    # Where scores do not sum to one, telling siblings apart also moves their common weight: allowed a few percent.
    "kind, allowed",
    [("gated", 1.0), ("biases", 1.02), ("sigmoid with selection bias", 1.05), ("groups", 1.05)],
)
def test_more_experts_and_active_ones_start_no_worse_and_differ(kind: str, allowed: float) -> None:
    spec = make_spec(**KINDS[kind])
    statistics = measure(spec, text_like(8000))
    fresh = text_like(2000, seed=22)
    fixed = start(spec, statistics, latent_dim=4, variant="fixed")
    more = start(spec, statistics, latent_dim=4, experts_factor=2, topk_factor=2)
    assert (more.num_experts, more.top_k) == (2 * N, 2 * K)
    assert error(spec, more, fresh) < allowed * error(spec, fixed, fresh)
    assert not torch.equal(more.router.weight[:N], more.router.weight[N:])
    assert not torch.equal(more.experts.down[:N], more.experts.down[N:])


def test_more_experts_and_no_more_active_ones_start_no_worse_and_all_alive() -> None:
    spec = make_spec()
    statistics = measure(spec, text_like(8000))
    fresh = text_like(4000, seed=22)
    fixed = start(spec, statistics, latent_dim=8, variant="fixed")
    eff = start(spec, statistics, latent_dim=8, variant="eff")
    assert (eff.num_experts, eff.top_k) == (2 * N, K)
    assert error(spec, eff, fresh) < 1.02 * error(spec, fixed, fresh)
    load = torch.bincount(router_forward(eff, fresh).indices.flatten(), minlength=2 * N).double()
    assert load.min() > 0.1 * load.mean()


def test_an_expert_guesses_the_input_from_its_own_tokens() -> None:
    hidden, projection = text_like(400), torch.eye(D, dtype=torch.float64)[:8]
    moment = hidden.T @ hidden / 400
    routing = router_forward(make_spec(), hidden)
    weights = (routing.weights[:, :, None] * torch.nn.functional.one_hot(routing.indices, N)).sum(1)
    for expert, guess in enumerate(local_guesses(projection, moment, hidden, routing, N)):
        rows = hidden * weights[:, expert : expert + 1]
        count = int((weights[:, expert] > 0).sum())
        own = rows.T @ rows
        own += PRIOR_TOKENS * moment * own.trace() / count / moment.trace()
        expected = own @ projection.T @ torch.linalg.inv(projection @ own @ projection.T)
        torch.testing.assert_close(guess, expected, rtol=1e-8, atol=1e-8)  # solve against inv


def test_an_expert_without_tokens_guesses_from_all_of_them() -> None:
    hidden, projection = text_like(400), torch.eye(D, dtype=torch.float64)[:8]
    moment = hidden.T @ hidden / 400
    routing = Routing(hidden[:, :0], torch.ones(400, 1, dtype=torch.float64), torch.zeros(400, 1, dtype=torch.long))
    guesses = list(local_guesses(projection, moment, hidden, routing, 2))
    torch.testing.assert_close(guesses[1], reconstruction(projection, moment), rtol=1e-12, atol=1e-12)


def test_a_block_makes_up_for_what_it_reads_instead() -> None:
    spec, hidden = make_spec(), text_like(2000)
    statistics, shifted = measure(spec, hidden), hidden @ (torch.eye(D) + 0.2 * random(D, D, seed=30) / D**0.5).double()
    plan = make_plan({"block": spec}, Recipe(latent_dim=12, variant="fixed"), {"block": statistics})["block"]
    expected = moe_forward(spec, hidden)

    def missed(reading: Reading | None) -> float:
        latent = initialise(spec, plan, statistics, reading=reading)
        return ((moe_forward(latent, shifted) - expected).norm() / expected.norm()).item()

    assert missed(Reading(shifted, None)) < 0.8 * missed(None)


def test_the_router_reads_the_full_width() -> None:
    spec = make_spec()
    latent = start(spec, measure(spec, text_like(500)), latent_dim=8, variant="fixed")
    assert torch.equal(latent.router.weight, spec.router.weight)
    hidden = text_like(200, seed=23)
    assert torch.equal(router_forward(latent, hidden).indices, router_forward(spec, hidden).indices)


def test_projections_are_orthonormal() -> None:
    spec = make_spec()
    latent = start(spec, measure(spec, text_like(2000)), latent_dim=6, variant="fixed")
    assert latent.latent is not None
    eye = torch.eye(6, dtype=torch.float64)
    torch.testing.assert_close(latent.latent.down @ latent.latent.down.T, eye)
    torch.testing.assert_close(latent.latent.up.T @ latent.latent.up, eye)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "recipe", [{"variant": "acc"}, {"variant": "eff"}, {"variant": "fixed"}, {"init": "weights"}], ids=str
)
def test_the_dtype_of_the_block_is_kept(dtype: torch.dtype, recipe: dict[str, object]) -> None:
    spec = make_spec(biases=True, output_bias=True).to(dtype)
    hidden = text_like(1000)
    latent = start(spec, None if "init" in recipe else measure(spec, hidden), latent_dim=8, **recipe)
    for name, tensor in latent.tensors().items():
        banks = name == "router.weight" and recipe.get("variant") == "eff"
        assert tensor.dtype == (torch.float32 if banks else dtype), name
        assert tensor.is_contiguous()
    shared = {t.data_ptr() for t in spec.tensors().values()}
    assert all(t.data_ptr() not in shared for t in latent.tensors().values())


def test_the_same_inputs_give_the_same_start() -> None:
    spec = make_spec()
    statistics = measure(spec, text_like(1000))
    one, two = (start(spec, statistics, latent_dim=8) for _ in range(2))
    for name, tensor in one.tensors().items():
        assert torch.equal(tensor, two.tensors()[name]), name


def test_an_expert_that_no_token_reached_keeps_its_own_outputs() -> None:
    spec = make_spec()
    bias = torch.zeros(N, dtype=torch.float64)
    bias[2] = -1e4
    away = replace(spec, router=replace(spec.router, bias=bias))
    statistics = measure(away, text_like(3000))
    assert statistics.unreached == [2]
    latent = start(away, statistics, latent_dim=12, variant="fixed")
    alone = replace(away.router, bias=-bias, top_k=1)
    hidden = text_like(500, seed=24)
    expected, found = (replace(block, router=alone) for block in (away, latent))
    assert error(expected, found, hidden) < 0.7


def test_fewer_tokens_than_the_width_still_start() -> None:
    spec = make_spec()
    statistics = measure(spec, text_like(7))
    assert statistics.warnings
    latent = start(spec, statistics, latent_dim=8)
    assert all(t.isfinite().all() for t in latent.tensors().values())
    assert error(spec, latent, text_like(500, seed=25)) < 1.0


def test_a_plan_for_another_block_is_refused() -> None:
    spec = make_spec()
    plan = make_plan({"block": spec}, Recipe(latent_dim=8))["block"]
    other = replace(spec, router=replace(spec.router, top_k=1))
    with pytest.raises(LatentizeError, match="block: the plan is for hidden size 16, 6 experts, top-k 2"):
        initialise(other, plan, None, seed=0)


def test_weights_that_are_not_finite_are_named() -> None:
    spec = make_spec()
    spec.experts.down[3, 2, 1] = float("nan")
    plan = make_plan({"block": make_spec()}, Recipe(latent_dim=8))["block"]
    with pytest.raises(LatentizeError, match=r"block: experts.down \[6, 16, 12\] is not finite"):
        initialise(spec, plan, None, seed=0)


@pytest.mark.parametrize("kind", ["gated", "ungated relu²", "input weighted", "identities"])
def test_input_sensitivity_is_the_mean_squared_jacobian(kind: str) -> None:
    spec = make_spec(**KINDS[kind])
    hidden = text_like(600)
    routing = router_forward(spec, hidden)
    metric = torch.diag(random(D, seed=30).exp())
    found = input_sensitivity(spec, hidden, routing, metric, seed=0)

    def output(x: Tensor) -> Tensor:
        return experts_forward(routed_only(spec), x, routing).sum(0)

    jacobians = torch.autograd.functional.jacobian(output, hidden).transpose(0, 1)  # [T, d out, d in]
    expected = (jacobians.transpose(1, 2) @ metric @ jacobians).mean(0)
    # 4 random products for each of 600 tokens.
    assert (found - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize("kind", ["gated", "biases", "identities"])
def test_second_moments_alone_beat_weights_alone(kind: str) -> None:
    spec, hidden = make_spec(**KINDS[kind]), text_like(2048)
    statistics = measure(spec, hidden)
    sample = statistics.sample
    none = replace(sample, hidden=sample.hidden[:0], weights=sample.weights[:0], indices=sample.indices[:0])
    moments = start(spec, replace(statistics, sample=none), latent_dim=8, variant="fixed")
    assert error(spec, moments, hidden) < 0.8 * error(spec, start(spec, None, latent_dim=8, variant="fixed"), hidden)
    assert error(spec, start(spec, statistics, latent_dim=8, variant="fixed"), hidden) < error(spec, moments, hidden)
