"""Calibration statistics against direct fp64 sums, and every fault that calibration data can have."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from latentize.errors import LatentizeError
from latentize.moe import LatentMoE
from latentize.reference import experts_forward, router_forward
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec
from latentize.statistics import collect

D, M, N, K = 12, 5, 6, 2


def make_spec(*, identities: int = 0, seed: int = 0, **changes: object) -> MoESpec:
    g = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    router = RouterSpec(random(N + identities, D) / D**0.5, K, normalize="sum")
    experts = ExpertsSpec(random(N, M, D), random(N, D, M), random(N, M, D), num_identity=identities)
    return replace(MoESpec(router, experts), **changes)  # type: ignore[arg-type]


class Net(nn.Module):
    """Two MoE blocks in a residual stream; the second one's router may read something else than its experts."""

    def __init__(self, first: MoESpec, second: MoESpec, *, router_scale: float | None = None) -> None:
        super().__init__()
        self.first, self.second = LatentMoE(first), LatentMoE(second)
        self.router_scale = router_scale
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        x = self.dropout(x * scale)
        x = x + self.first(x)
        if self.router_scale is None:
            return x + self.second(x)
        return x + self.second(x, x * self.router_scale)

    @property
    def blocks(self) -> dict[str, LatentMoE]:
        return {"first": self.first, "second": self.second}


def net(**kwargs: object) -> Net:
    return Net(make_spec(seed=1), make_spec(seed=2), **kwargs)  # type: ignore[arg-type]


def tokens(batches: int = 3, length: int = 40, seed: int = 5) -> list[tuple[Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [(torch.randn(2, length, D, generator=g, dtype=torch.float64),) for _ in range(batches)]


def test_moments_and_loads_are_the_direct_sums() -> None:
    model = net().eval()
    statistics = collect(model, model.blocks, tokens())
    hidden = torch.cat([x.flatten(0, 1) for (x,) in tokens()])
    spec = model.first.spec
    routing = router_forward(spec, hidden)
    share = routing.weights.square().sum(-1, keepdim=True)
    routed = experts_forward(spec, hidden, routing)
    first = statistics["first"]
    assert (first.tokens, first.batches, first.skipped) == (240, 3, 0)
    # The same fp64 sums in another order.
    torch.testing.assert_close(first.input_moment, hidden.T @ (share * hidden) / 240, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(first.output_moment, routed.T @ routed / 240, rtol=1e-12, atol=1e-12)
    assert torch.equal(first.counts, torch.bincount(routing.indices.flatten(), minlength=N))
    mass = torch.zeros(N, dtype=torch.float64).index_add_(0, routing.indices.flatten(), routing.weights.flatten())
    torch.testing.assert_close(first.weight_mass, mass)
    assert torch.equal(first.sample.hidden, hidden)
    assert torch.equal(first.sample.indices, routing.indices)
    assert first.sample.router_hidden is None
    assert first.warnings == ()


def test_the_second_block_sees_what_the_first_made() -> None:
    model = net().eval()
    statistics = collect(model, model.blocks, tokens())
    (x,) = tokens()[0]
    expected = (x + model.first(x)).flatten(0, 1)
    torch.testing.assert_close(statistics["second"].sample.hidden[: len(expected)], expected.detach())


def test_the_routed_output_excludes_identity_experts_scale_and_bias() -> None:
    bias = torch.randn(D, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    spec = make_spec(seed=1, identities=2, output_scale=3.0, output_bias=bias)
    model = Net(spec, make_spec(seed=2)).eval()
    statistics = collect(model, {"first": model.first}, tokens())["first"]
    hidden = torch.cat([x.flatten(0, 1) for (x,) in tokens()])
    plain = replace(spec, experts=replace(spec.experts, num_identity=0), output_scale=1.0, output_bias=None)
    routed = experts_forward(plain, hidden, router_forward(spec, hidden))
    torch.testing.assert_close(statistics.output_moment, routed.T @ routed / 240, rtol=1e-10, atol=1e-10)
    assert len(statistics.counts) == N + 2


def test_what_a_router_reads_elsewhere_is_kept_beside() -> None:
    model = net(router_scale=0.5).eval()
    statistics = collect(model, model.blocks, tokens())
    second = statistics["second"].sample
    assert statistics["first"].sample.router_hidden is None
    assert second.router_hidden is not None
    torch.testing.assert_close(second.router_hidden, 0.5 * second.hidden)


def test_training_mode_is_left_as_it_was_and_not_used() -> None:
    model = net().train()
    model.second.eval()
    statistics = collect(model, model.blocks, tokens())
    assert torch.equal(statistics["first"].sample.hidden[:80], tokens()[0][0].flatten(0, 1))
    assert model.training
    assert model.dropout.training
    assert not model.second.training
    assert not model.first.router._forward_hooks
    assert not model.first.experts._forward_hooks


def test_dicts_and_one_shot_iterators_are_taken() -> None:
    model = net().eval()
    done: list[tuple[int, int | None]] = []
    batches = ({"x": x, "scale": 2.0} for (x,) in tokens())
    statistics = collect(model, model.blocks, batches, progress=lambda i, total: done.append((i, total)))
    assert torch.equal(statistics["first"].sample.hidden[:80], 2.0 * tokens()[0][0].flatten(0, 1))
    assert done == [(1, None), (2, None), (3, None)]


def test_the_sample_is_bounded_uniform_and_repeatable() -> None:
    model = net().eval()
    batches = tokens(20, 50)
    one, two = (collect(model, model.blocks, batches, max_tokens=300)["first"].sample for _ in range(2))
    assert len(one.hidden) == len(one.weights) == len(one.indices) == 300
    assert torch.equal(one.hidden, two.hidden)
    stream = torch.cat([x.flatten(0, 1) for (x,) in batches])
    position = (one.hidden[:, None, 0] == stream[None, :, 0]).double().argmax(1)
    assert torch.equal(stream[position], one.hidden)
    assert (position.diff() > 0).all()
    # 300 of 2000 uniform positions: their mean is 1000 within 5 standard errors of 577 / sqrt(300).
    assert abs(position.double().mean().item() - 1000) < 5 * 577 / 300**0.5
    other = collect(model, model.blocks, batches, max_tokens=300, seed=1)["first"].sample
    assert not torch.equal(one.hidden, other.hidden)


def test_a_batch_with_non_finite_activations_is_skipped_and_named() -> None:
    model = net().eval()
    batches = tokens()
    batches[1][0][0, 3, 2] = float("nan")
    statistics = collect(model, model.blocks, batches)["second"]
    clean = collect(model, model.blocks, [batches[0], batches[2]])["second"]
    assert (statistics.tokens, statistics.skipped) == (160, 1)
    torch.testing.assert_close(statistics.input_moment, clean.input_moment)
    assert statistics.warnings == ("second: activations not finite in calibration batch 1: 1 skipped",)


def test_only_non_finite_batches_is_an_error() -> None:
    model = net().eval()
    with pytest.raises(LatentizeError, match="first: activations are not finite in any of the 2 calibration batches"):
        collect(model, model.blocks, [(x * float("inf"),) for (x,) in tokens(2)])


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "calibration is empty"),
        ([(torch.zeros(1, 4, D, dtype=torch.float64),), (torch.zeros(1, 4, D + 1, dtype=torch.float64),)], "batch 1 "),
        ([{"y": torch.zeros(1)}], "unexpected keyword argument 'y'"),
        ([torch.zeros(1, 4, D)], "batch 0: expected a tuple of arguments or a dict of keywords, found Tensor"),
    ],
    ids=["empty", "shape", "keyword", "type"],
)
def test_calibration_faults_are_named(calibration: list[object], message: str) -> None:
    model = net().train()
    with pytest.raises(LatentizeError, match=message):
        collect(model, model.blocks, calibration)
    assert model.training
    assert not model.first.experts._forward_hooks


def test_an_iterable_that_fails_is_named() -> None:
    def batches() -> object:
        yield tokens()[0]
        raise OSError("no such file")

    model = net()
    with pytest.raises(LatentizeError, match="batch 1: producing it failed: OSError: no such file"):
        collect(model, model.blocks, batches())  # type: ignore[arg-type]


def test_few_tokens_and_unreached_experts_are_recorded() -> None:
    model = net().eval()
    statistics = collect(model, model.blocks, [(torch.ones(1, 3, D, dtype=torch.float64),)])["first"]
    assert statistics.tokens == 3
    assert len(statistics.unreached) == N - K
    assert "3 calibration tokens for width 12" in statistics.warnings[0]
    assert "no calibration token reached 4 of 6 experts" in statistics.warnings[1]


def test_a_block_that_is_never_called_is_recorded() -> None:
    model = net().eval()
    idle = LatentMoE(make_spec())
    statistics = collect(model, {**model.blocks, "idle": idle}, tokens())["idle"]
    assert statistics.tokens == 0
    assert statistics.sample.hidden.shape == (0, D)
    assert statistics.warnings == ("idle: calibration never reached this block: its weights alone decide",)
