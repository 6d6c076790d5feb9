"""The closed-form output side against dense least squares, its iterative form, and its optimality."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentize import output_fit
from latentize.output_fit import Features, coefficients, damping, explained, factorise, features, fit
from latentize.reference import experts_forward, router_forward
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec

D, M, N, K, T = 10, 6, 5, 2, 400


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_spec(*, biases: bool = False, applies_to: str = "output", gated: bool = True) -> MoESpec:
    router = RouterSpec(random(N, D, seed=1), K, normalize="sum", applies_to=applies_to)  # type: ignore[arg-type]
    experts = ExpertsSpec(
        random(N, M, D, seed=2),
        random(N, D, M, seed=3),
        random(N, M, D, seed=4) if gated else None,
        down_bias=random(N, D, seed=5) if biases else None,
    )
    return MoESpec(router, experts)


def dense(phi: Features) -> Tensor:
    matrix = torch.zeros(phi.count, len(phi.tokens), phi.width, dtype=torch.float64)
    for expert, (token, columns) in enumerate(zip(phi.tokens, phi.columns, strict=True)):
        matrix[token, expert] = columns
    return matrix.flatten(1)


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("applies_to", ["output", "input"])
def test_features_times_output_weights_are_the_routed_output(biases: bool, applies_to: str) -> None:
    spec = make_spec(biases=biases, applies_to=applies_to)
    x = random(T, D, seed=6)
    routing = router_forward(spec, x)
    phi = features(spec, x, routing)
    product = phi.times(coefficients(spec.experts.down, spec.experts.down_bias))
    torch.testing.assert_close(product, experts_forward(spec, x, routing))


def test_products_and_gram_are_those_of_the_dense_matrix() -> None:
    spec = make_spec()
    x, y = random(T, D, seed=6), random(T, D, seed=7)
    phi = features(spec, x, router_forward(spec, x), random(T, 1, seed=8).exp())
    matrix = dense(phi)
    torch.testing.assert_close(phi.gram(), matrix.T @ matrix)
    torch.testing.assert_close(phi.transposed_times(y).flatten(0, 1), matrix.T @ y)
    b = random(N, M, 3, seed=9)
    torch.testing.assert_close(phi.times(b), matrix @ b.flatten(0, 1))


@pytest.mark.parametrize("most", [output_fit.DENSE_FEATURES, 0], ids=["dense", "iterative"])
def test_the_fit_is_ridge_regression_towards_the_start(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_fit, "DENSE_FEATURES", most)
    monkeypatch.setattr(output_fit, "SWEEPS", 100)
    spec = make_spec()
    x, y = random(T, D, seed=6), random(T, D, seed=7)
    start = random(N, M, D, seed=9)
    phi = features(spec, x, router_forward(spec, x))
    matrix, before = dense(phi), start.flatten(0, 1)
    normal = matrix.T @ matrix + 3.0 * torch.eye(N * M, dtype=torch.float64)
    expected = before + torch.linalg.solve(normal, matrix.T @ (y - matrix @ before))
    torch.testing.assert_close(fit(phi, y, start, 3.0).flatten(0, 1), expected, rtol=1e-10, atol=1e-10)


def test_a_few_sweeps_over_the_experts_gain_nearly_all_there_is_to_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec()
    x = random(T, D, seed=6)
    phi = features(spec, x, router_forward(spec, x))
    y = phi.times(random(N, M, D, seed=7)) + 0.1 * random(T, D, seed=8)
    start = torch.zeros(N, M, D, dtype=torch.float64)

    def loss(fitted: Tensor) -> float:
        return ((y - phi.times(fitted)).square().sum() + 0.5 * fitted.square().sum()).item()

    best = loss(fit(phi, y, start, 0.5))
    monkeypatch.setattr(output_fit, "DENSE_FEATURES", 0)
    swept = fit(phi, y, start, 0.5)
    assert best <= loss(swept)
    assert loss(start) - loss(swept) > 0.97 * (loss(start) - best)
    assert not start.any()


@pytest.mark.parametrize("most", [output_fit.DENSE_FEATURES, 0], ids=["dense", "iterative"])
def test_what_is_explained_is_what_the_fit_predicts(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_fit, "DENSE_FEATURES", most)
    monkeypatch.setattr(output_fit, "SWEEPS", 1)
    spec = make_spec(biases=True)
    x, y = random(T, D, seed=6), random(T, D, seed=7)
    start = random(N, M + 1, D, seed=9)
    phi = features(spec, x, router_forward(spec, x))
    predicted, squares, kept = explained(phi, y, start, 3.0)
    fitted = fit(phi, y, start, 3.0)
    torch.testing.assert_close(predicted, phi.times(fitted))
    torch.testing.assert_close(squares, fitted.flatten(0, 1).T @ fitted.flatten(0, 1))
    if kept is not None:
        assert torch.equal(kept, fitted)
    assert (kept is None) == (most == 0)


@pytest.mark.parametrize("most", [output_fit.DENSE_FEATURES, 0], ids=["dense", "iterative"])
def test_a_fit_of_mixed_outputs_is_the_mixed_fit(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_fit, "DENSE_FEATURES", most)
    spec = make_spec()
    x, y, mix = random(T, D, seed=6), random(T, D, seed=7), random(D, 4, seed=8)
    start = random(1, M, D, seed=9)  # every expert's
    phi = features(spec, x, router_forward(spec, x))
    torch.testing.assert_close(fit(phi, y @ mix, start @ mix, 3.0), fit(phi, y, start, 3.0) @ mix)


def test_columns_that_are_not_kept_are_the_kept_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = make_spec(biases=True)
    x, weights = random(T, D, seed=6), random(T, 1, seed=8).exp()
    kept = features(spec, x, router_forward(spec, x), weights)
    monkeypatch.setattr(output_fit, "DENSE_FEATURES", 0)
    computed = features(spec, x, router_forward(spec, x), weights)
    assert isinstance(kept.columns, list)
    assert not isinstance(computed.columns, list)
    assert len(computed.columns) == N
    for one, other in zip(kept.columns, computed.columns, strict=True):
        assert torch.equal(one, other)


def test_an_expert_without_tokens_stays_at_the_start() -> None:
    spec = make_spec()
    x = random(T, D, seed=6)
    routing = router_forward(spec, x)
    routing = routing._replace(indices=torch.where(routing.indices == 3, (routing.indices + 1) % N, routing.indices))
    start = random(N, M, D, seed=9)
    phi = features(spec, x, routing)
    fitted = fit(phi, random(T, D, seed=7), start, damping(phi))
    torch.testing.assert_close(fitted[3], start[3])
    assert not torch.allclose(fitted[0], start[0])


def test_the_factors_are_the_best_of_their_rank_in_the_metric() -> None:
    spec = make_spec()
    x = random(T, D, seed=6)
    phi = features(spec, x, router_forward(spec, x))
    b = random(N, M, D, seed=9)
    half = random(D, D, seed=10)
    metric = half @ half.T + 0.1 * torch.eye(D, dtype=torch.float64)
    rows = b.flatten(0, 1)
    up, mix = factorise(phi.times(b), rows.T @ rows, metric, 4, 0.0)
    torch.testing.assert_close(up.T @ up, torch.eye(4, dtype=torch.float64))
    root = torch.linalg.cholesky(metric)
    lost = (phi.times(b) - phi.times(b @ mix) @ up.T) @ root
    best = torch.linalg.svdvals(phi.times(b) @ root)[4:].square().sum()  # Eckart-Young
    torch.testing.assert_close(lost.square().sum(), best)


def test_few_tokens_are_damped_more() -> None:
    spec = make_spec()
    x = random(T, D, seed=6)
    many = features(spec, x, router_forward(spec, x))
    few = features(spec, x[:6], router_forward(spec, x[:6]))
    assert damping(few) / few.gram().diagonal().mean() > 50 * damping(many) / many.gram().diagonal().mean()
