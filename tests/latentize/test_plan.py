"""The plan: sizes, bytes and FLOPs counted by hand, warnings, and refusals that name the block."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from latentize.errors import LatentizeError
from latentize.forecast import Curve, Forecast
from latentize.plan import BlockPlan, check_bypass, effective_rank, make_plan
from latentize.recipe import Recipe
from latentize.spec import ExpertsSpec, Groups, LatentSpec, MoESpec, RouterSpec
from latentize.statistics import BlockStatistics, Sample

D, M, N, K = 32, 6, 8, 2


def make_spec(
    *, n: int = N, k: int = K, d: int = D, m: int = M, gated: bool = True, dtype: torch.dtype = torch.float32
) -> MoESpec:
    g = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    experts = ExpertsSpec(random(n, m, d), random(n, d, m), random(n, m, d) if gated else None)
    return MoESpec(RouterSpec(random(n, d), k, normalize="sum"), experts)


def make_statistics(moment: Tensor, warnings: tuple[str, ...] = ()) -> BlockStatistics:
    empty = torch.zeros(0, D)
    return BlockStatistics(
        tokens=1000,
        batches=1,
        skipped=0,
        input_moment=moment,
        output_moment=torch.eye(D, dtype=torch.float64),
        counts=torch.full((N,), 250),
        weight_mass=torch.full((N,), 125.0, dtype=torch.float64),
        sample=Sample(empty, None, torch.zeros(0, K), torch.zeros(0, K, dtype=torch.long)),
        warnings=warnings,
    )


def plan(spec: MoESpec, statistics: BlockStatistics | None = None, **recipe: object) -> BlockPlan:
    named = None if statistics is None else {"layer": statistics}
    return make_plan({"layer": spec}, Recipe(**recipe), named)["layer"]


def test_sizes_bytes_and_flops_by_hand() -> None:
    p = plan(make_spec(), compression=2)
    assert (p.hidden_size, p.latent_dim, p.intermediate_size) == (32, 16, 6)
    assert (p.num_experts, p.new_num_experts, p.top_k, p.new_top_k) == (8, 16, 2, 4)
    assert p.expert_bytes_before == 2 * 3 * 6 * 32 * 4
    assert p.expert_bytes_after == 4 * 3 * 6 * 16 * 4
    assert p.dispatched_bytes_before == 2 * 2 * 32 * 4
    assert p.dispatched_bytes_after == 2 * 4 * 16 * 4
    assert p.projection_bytes == 2 * 32 * 16 * 4
    assert p.flops_before == 2 * 32 * 8 + 2 * 2 * 3 * 6 * 32
    assert p.flops_after == 2 * 32 * 16 + 2 * 4 * 3 * 6 * 16 + 2 * 2 * 32 * 16
    assert p.warnings == ()


def test_a_bypass_is_counted_beside_the_projections_and_there_is_none_at_the_full_width() -> None:
    bare, p = plan(make_spec(), compression=2), plan(make_spec(), compression=2, bypass=5)
    assert (p.bypass_rank, p.bypass_bytes) == (5, 2 * 32 * 5 * 4)
    assert (p.projection_bytes, p.expert_bytes_after) == (bare.projection_bytes, bare.expert_bytes_after)
    assert p.flops_after == bare.flops_after + 2 * 2 * 32 * 5
    assert plan(make_spec(), compression=2, bypass=5, dtype="bfloat16").bypass_bytes == 2 * 32 * 5 * 2
    assert (bare.bypass_rank, bare.bypass_bytes) == (0, 0)
    full = plan(make_spec(), latent_dim=D, bypass=5)
    assert (full.bypass_rank, full.bypass_bytes) == (0, 0)


@pytest.mark.parametrize("rank", [D, D + 1])
def test_a_bypass_as_wide_as_the_block_is_refused(rank: int) -> None:
    with pytest.raises(LatentizeError, match=rf"layer: bypass {rank} is not below the hidden size 32"):
        plan(make_spec(), compression=2, bypass=rank)


def test_a_bypass_without_tokens_is_refused() -> None:
    spec = make_spec()
    for statistics in (None, make_statistics(torch.eye(D, dtype=torch.float64))):
        with pytest.raises(LatentizeError, match="layer: bypass 5 is fitted to calibration data, and none reaches"):
            check_bypass(spec, plan(spec, compression=2, bypass=5), statistics)
        check_bypass(spec, plan(spec, latent_dim=D, bypass=5), statistics)
        check_bypass(spec, plan(spec, compression=2), statistics)


def test_variants_dtype_and_ungated_experts() -> None:
    fixed = plan(make_spec(gated=False, dtype=torch.bfloat16), compression=2, variant="fixed")
    assert (fixed.new_num_experts, fixed.new_top_k) == (8, 2)
    assert fixed.expert_bytes_after == 2 * 2 * 6 * 16 * 2
    eff = plan(make_spec(), compression=2, variant="eff", dtype="bfloat16")
    assert (eff.new_num_experts, eff.new_top_k) == (16, 2)
    assert eff.expert_bytes_after == 2 * 3 * 6 * 16 * 2
    assert eff.expert_bytes_before == 2 * 3 * 6 * 32 * 4


def test_the_predicted_error_falls_with_the_latent_size_and_ends_at_zero() -> None:
    scales = torch.linspace(0, 4, D, dtype=torch.float64).exp().reciprocal()
    statistics = make_statistics(scales.diag())
    errors = [plan(make_spec(), statistics, latent_dim=size).predicted_error for size in (4, 8, 16, 24, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.5
    assert errors[-1] == pytest.approx(0.0, abs=1e-6)


def test_a_low_rank_input_shows_in_the_spectrum() -> None:
    moment = torch.zeros(D, D, dtype=torch.float64)
    moment[:4, :4] = torch.eye(4, dtype=torch.float64)
    values = plan(make_spec(), make_statistics(moment), compression=2).spectrum
    assert list(values) == sorted(values, reverse=True)
    # Shrinkage keeps directions that were never seen at a hundredth of the others, no more.
    assert values[4] < 0.2 * values[3]
    assert plan(make_spec(), make_statistics(moment), compression=2).effective_rank < 5


def test_effective_rank_counts_equal_directions() -> None:
    assert effective_rank(torch.tensor([3.0, 3.0, 3.0, 0.0])) == pytest.approx(3.0)
    assert effective_rank(torch.tensor([2.0, 0.0])) == pytest.approx(1.0)
    assert effective_rank(torch.ones(7)) == pytest.approx(math.exp(math.log(7)))


def test_consumer_limits_are_said_before_the_work() -> None:
    warnings = plan(make_spec(n=128, k=8), compression=3, latent_dim=11, experts_factor=3, topk_factor=3).warnings
    assert warnings == (
        "layer: top-k 8 → 24 passes 8, 16, 22, where some serving kernels stop",
        "layer: experts 128 → 384 passes 128, 256, where some serving kernels stop",
    )
    assert plan(make_spec(n=128, k=8), compression=2, variant="fixed").warnings == ()


def test_sizes_that_serving_kernels_do_not_take_are_said_before_the_work() -> None:
    assert plan(make_spec(d=64, m=12), latent_dim=33, variant="fixed").warnings == (
        "layer: latent size 33 is no multiple of 8, which kernels for 16-bit experts ask for",
        "layer: intermediate size 12 is no multiple of 8, which kernels for 16-bit experts ask for",
    )
    assert plan(make_spec(d=64, m=16), latent_dim=40, variant="fixed").warnings == ()
    assert plan(make_spec(n=2, d=1024, m=128), latent_dim=264, variant="fixed").warnings == (
        "layer: latent size 264 is no multiple of 128, the blocks in which fp8 experts are scaled",
    )


def test_warnings_of_the_statistics_are_passed_on() -> None:
    statistics = make_statistics(torch.eye(D, dtype=torch.float64), ("layer: few tokens",))
    assert plan(make_spec(), statistics, compression=2).warnings == ("layer: few tokens",)


@pytest.mark.parametrize(
    ("spec", "recipe", "message"),
    [
        (make_spec(), {"latent_dim": 33}, "layer: latent size 33 is not between 1 and the hidden size 32"),
        (make_spec(), {"experts_factor": 1, "compression": 2}, "layer: top-k factor 2 is larger than experts factor 1"),
        (
            replace(make_spec(), router=replace(make_spec().router, groups=Groups(4, 2))),
            {"compression": 2, "variant": "eff"},
            "layer: 2 times the experts with only 1 times as many selected .* 4 routing groups",
        ),
        (
            replace(make_spec(), latent=LatentSpec(torch.zeros(D, 64), torch.zeros(64, D))),
            {"compression": 2},
            "layer: already latent",
        ),
    ],
    ids=["latent", "factors", "groups", "already"],
)
def test_impossible_plans_name_the_block(spec: MoESpec, recipe: dict[str, object], message: str) -> None:
    with pytest.raises(LatentizeError, match=message):
        plan(spec, **recipe)


def test_a_block_whose_output_side_cannot_be_fitted_says_so_before_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = make_statistics(torch.eye(D, dtype=torch.float64))
    tokens = Sample(torch.zeros(64, D), None, torch.zeros(64, K), torch.zeros(64, K, dtype=torch.long))
    statistics = replace(statistics, sample=tokens)
    assert plan(make_spec(), statistics, compression=2).warnings == ()
    monkeypatch.setattr("latentize.plan.FIT_BYTES", 1000)
    (warning,) = plan(make_spec(), statistics, compression=2).warnings
    assert warning.startswith("layer: its output side is truncated and not fitted: a fit would take")


def test_a_block_that_no_trial_was_made_of_says_what_its_error_rests_on() -> None:
    tokens = Sample(torch.zeros(64, D), None, torch.zeros(64, K), torch.zeros(64, K, dtype=torch.long))
    statistics = {"layer": replace(make_statistics(torch.eye(D, dtype=torch.float64)), sample=tokens)}
    untried = make_plan({"layer": make_spec()}, Recipe(), statistics, Forecast({}))["layer"]
    assert untried.warnings == ("layer: too large to try widths on: its error is predicted from spectra",)
    curve = Curve((16, 32), (0.25, 0.0), (0.01, 0.0))
    forecast = Forecast({"layer": curve}, ((0.01, 0.03),))
    tried = make_plan({"layer": make_spec()}, Recipe(), statistics, forecast)["layer"]
    assert tried.warnings == ()
    assert (tried.predicted_error, tried.predicted_loss) == (0.25, pytest.approx(0.03))
