"""Projections against the truncated SVD they stand for."""

from __future__ import annotations

import torch
from torch import Tensor

from latentize.projections import gram, input_projection, metric, output_gram, reconstruction, shrink, spectrum
from latentize.spec import ExpertsSpec

D, M, N, T = 12, 7, 4, 300


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_experts(*, gated: bool = True) -> ExpertsSpec:
    return ExpertsSpec(random(N, M, D, seed=1), random(N, D, M, seed=2), random(N, M, D, seed=3) if gated else None)


def stacked(experts: ExpertsSpec, loads: Tensor) -> Tensor:
    parts = [w for w in (experts.gate, experts.up) if w is not None]
    return torch.cat([w[e] * loads[e].sqrt() for w in parts for e in range(N)])


def test_grams_are_those_of_the_stack() -> None:
    loads = random(N, seed=4).exp()
    for gated in (True, False):
        experts = make_experts(gated=gated)
        stack = stacked(experts, loads)
        torch.testing.assert_close(gram(experts, loads, loads), stack.T @ stack)
    columns = torch.cat([make_experts().down[e] * loads[e].sqrt() for e in range(N)], dim=1)
    torch.testing.assert_close(output_gram(make_experts(), loads), columns @ columns.T)


def test_the_projection_reaches_the_truncated_svd_of_the_whitened_stack() -> None:
    experts, loads, rank = make_experts(), random(N, seed=4).exp(), 5
    hidden = random(T, D, seed=5) * torch.linspace(0, 3, D, dtype=torch.float64).neg().exp()
    moment = hidden.T @ hidden / T
    stack = stacked(experts, loads)
    projection = input_projection(gram(experts, loads, loads), moment, rank)
    torch.testing.assert_close(projection @ projection.T, torch.eye(rank, dtype=torch.float64))
    weights = stack @ reconstruction(projection, moment)
    lost = (hidden @ stack.T - hidden @ projection.T @ weights.T).square().sum() / T
    values = spectrum(gram(experts, loads, loads), moment)
    torch.testing.assert_close(lost, values[rank:].square().sum())  # Eckart-Young
    torch.testing.assert_close(values[: len(stack)], torch.linalg.svdvals(hidden @ stack.T / T**0.5)[:D])


def test_plain_svd_is_worse_on_the_data() -> None:
    experts, loads, rank = make_experts(), torch.ones(N, dtype=torch.float64), 5
    hidden = random(T, D, seed=5) * torch.linspace(0, 3, D, dtype=torch.float64).neg().exp()
    moment = hidden.T @ hidden / T
    stack = stacked(experts, loads)

    def lost(projection: Tensor, guess: Tensor) -> float:
        return (hidden @ stack.T - hidden @ projection.T @ (stack @ guess).T).square().sum().item()

    white = input_projection(gram(experts, loads, loads), torch.eye(D, dtype=torch.float64), rank)
    seeing = input_projection(gram(experts, loads, loads), moment, rank)
    assert lost(seeing, reconstruction(seeing, moment)) < 0.7 * lost(white, white.T)


def test_shrinkage_fades_with_tokens_and_never_leaves_a_singular_moment() -> None:
    spread = torch.linspace(1, 2, D, dtype=torch.float64).diag()
    few, many = shrink(spread, 3), shrink(spread, 10**6)
    torch.testing.assert_close(many, spread, rtol=1e-3, atol=1e-3)
    assert (few - spread).norm() > 0.5 * (spread - spread.trace() / D * torch.eye(D)).norm()
    torch.testing.assert_close(few.trace(), spread.trace())
    rank_one = torch.zeros(D, D, dtype=torch.float64)
    rank_one[0, 0] = 1.0
    assert torch.linalg.eigvalsh(shrink(rank_one, 100)).min() > 0
    assert torch.equal(shrink(torch.zeros(D, D, dtype=torch.float64), 5), torch.eye(D, dtype=torch.float64))


def test_the_metric_has_mean_one_and_is_never_singular() -> None:
    half = random(D, 2, seed=6)
    values = torch.linalg.eigvalsh(metric(half @ half.T, D))
    assert 1.0 <= values.mean() <= 1.02
    assert values.min() > 5e-3
    assert torch.equal(metric(None, D), torch.eye(D, dtype=torch.float64))


def test_grams_of_bf16_weights_are_summed_beyond_their_precision() -> None:
    experts = make_experts()
    rounded = ExpertsSpec(experts.up.bfloat16(), experts.down.bfloat16(), experts.gate.bfloat16())
    exact = ExpertsSpec(rounded.up.double(), rounded.down.double(), rounded.gate.double())
    loads = random(N, seed=4).exp()
    torch.testing.assert_close(gram(rounded, loads, loads), gram(exact, loads, loads), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output_gram(rounded, loads), output_gram(exact, loads), rtol=1e-5, atol=1e-5)
