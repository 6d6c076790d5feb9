"""The linear bypass: fitted as it says, worth having on fresh tokens, and carried wherever a block goes."""

from __future__ import annotations

import json

import pytest
import torch
from small_moe import Net
from torch import Tensor, nn
from torch.testing import assert_close

import latentize
from latentize import run_report, store
from latentize.bypass import fit_bypass
from latentize.errors import LatentizeError
from latentize.forecast import Curve
from latentize.heal_job import RATE_FACTORS
from latentize.heal_state import Trainables
from latentize.initialise import initialise
from latentize.moe import LatentExperts, LatentMoE
from latentize.output_fit import ridge_for
from latentize.plan import make_plan, options_of
from latentize.recipe import Recipe
from latentize.reference import moe_forward
from latentize.spec import ExpertsSpec, LatentSpec, MoESpec, RouterSpec
from latentize.statistics import collect

D, T = 10, 4000
WIDTH = 16


def net(blocks=2) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Net() for _ in range(blocks)), nn.Linear(WIDTH, 3)).eval()


def example(rows=40, seed=1) -> Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def data(batches=4) -> list[tuple[Tensor]]:
    return [(example(64, seed),) for seed in range(batches)]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(seed: int) -> Tensor:
    root = random(D, D, seed=seed)
    return root @ root.T / D + 0.1 * torch.eye(D, dtype=torch.float64)


def cost(down: Tensor, up: Tensor, x: Tensor, missing: Tensor, weights: Tensor, metric: Tensor) -> float:
    """What `fit_bypass` minimises, its ridge included."""
    rows = (missing - x @ down.T @ up.T) * weights
    ridge = ridge_for((x * weights).square().sum().item(), D, len(x))
    product = up @ down
    return (((rows @ metric) * rows).sum() + ridge * (metric @ product @ product.T).trace()).item()


@pytest.mark.parametrize("rank", [1, 3, 9])
def test_a_map_of_low_rank_is_recovered(rank: int) -> None:
    x, truth = random(T, D, seed=0), random(D, rank, seed=1) @ random(rank, D, seed=2)
    down, up = fit_bypass(x, x @ truth.T, torch.ones(T, 1, dtype=x.dtype), positive(3), rank)
    assert (down.shape, up.shape) == ((rank, D), (D, rank))
    assert_close(up @ down, truth, rtol=0.02, atol=0.02)  # the ridge pulls it a little towards zero
    assert_close(up.T @ up, torch.eye(rank, dtype=x.dtype))


def test_nothing_of_the_same_rank_fits_better() -> None:
    x, weights, metric = random(T, D, seed=0), random(T, 1, seed=4).exp(), positive(3)
    missing = x @ random(D, D, seed=1) + random(T, D, seed=2)
    down, up = fit_bypass(x, missing, weights, metric, 3)
    found = [p.clone().requires_grad_() for p in (down, up)]
    rows = (missing - x @ found[0].T @ found[1].T) * weights
    ridge = ridge_for((x * weights).square().sum().item(), D, T)
    product = found[1] @ found[0]
    loss = ((rows @ metric) * rows).sum() + ridge * (metric @ product @ product.T).trace()
    assert loss.item() == pytest.approx(cost(down, up, x, missing, weights, metric))
    for gradient in torch.autograd.grad(loss, found):
        assert gradient.abs().max() < 1e-8 * loss.item()
    for seed in range(5, 15):  # stationary points of lesser eigenvectors are found from here by descent, never below
        other = [p + 0.3 * random(*p.shape, seed=seed) for p in (down, up)]
        assert cost(*other, x, missing, weights, metric) > loss.item()
    plain = fit_bypass(x, missing, torch.ones_like(weights), torch.eye(D, dtype=x.dtype), 3)
    assert cost(*plain, x, missing, weights, metric) > loss.item() * 1.001  # weights and metric are both heard


def spec(d=16, m=12, n=6, k=2, **changes) -> MoESpec:
    experts = ExpertsSpec(
        random(n, m, d, seed=2) / d**0.5, random(n, d, m, seed=3) / m**0.5, random(n, m, d, seed=4) / d**0.5
    )
    return MoESpec(RouterSpec(random(n, d, seed=1) / d**0.5, k, normalize="sum"), experts, **changes)


def hidden(count: int, seed: int, d=16) -> Tensor:
    """Tokens [count, d] with a decaying spectrum, around a mean."""
    return random(count, d, seed=seed) * torch.linspace(0, 2, d, dtype=torch.float64).neg().exp() * 3 + 0.5


def started(block: MoESpec, x: Tensor, **recipe) -> MoESpec:
    teacher = LatentMoE(block)
    statistics = collect(teacher, {"b": teacher}, [(part,) for part in x.split(256)])["b"]
    plan = make_plan({"b": block}, Recipe(**recipe), {"b": statistics})["b"]
    return initialise(block, plan, statistics)


@pytest.mark.parametrize("variant", ["fixed", "acc"])
@pytest.mark.parametrize(
    "changes", [{}, {"output_scale": 2.5, "output_bias": torch.ones(16, dtype=torch.float64)}], ids=["plain", "around"]
)
def test_a_start_with_a_bypass_is_closer_on_fresh_tokens(variant: str, changes: dict) -> None:
    block, x, fresh = spec(**changes), hidden(4000, 5), hidden(1000, 6)
    wanted, errors = moe_forward(block, fresh), []
    for rank in (0, 4, 15):
        start = started(block, x, latent_dim=4, variant=variant, bypass=rank)
        assert start.latent.bypass_rank == rank
        errors.append(((moe_forward(start, fresh) - wanted).norm() / wanted.norm()).item())
        assert_close(LatentMoE(start)(fresh), moe_forward(start, fresh), rtol=1e-12, atol=1e-12)
    assert errors[1] < 0.98 * errors[0]
    assert errors[2] < 0.99 * errors[1]


def test_there_is_none_at_the_full_width_and_none_without_data() -> None:
    block = spec()
    assert started(block, hidden(500, 5), latent_dim=16, variant="fixed", bypass=4).latent.bypass_rank == 0
    plan = make_plan({"b": block}, Recipe(latent_dim=4, bypass=4))["b"]
    with pytest.raises(LatentizeError, match="b: bypass 4 is fitted to calibration data, and none reaches this block"):
        initialise(block, plan, None)


def test_half_a_bypass_is_no_spec() -> None:
    with pytest.raises(ValueError, match="bypass_down and bypass_up: one is missing"):
        LatentSpec(torch.ones(2, 4), torch.ones(4, 2), bypass_up=torch.ones(4, 1))


def test_a_spec_with_a_bypass_is_mapped_named_described_stored_and_read() -> None:
    start = started(spec(), hidden(500, 5), latent_dim=4, variant="fixed", bypass=3)
    assert {"latent.bypass_down", "latent.bypass_up"} < set(start.tensors())
    assert start.to(torch.float32).latent.bypass_up.dtype == torch.float32
    assert start.describe().endswith("latent 16→4, bypass of rank 3")
    kept: dict[str, Tensor] = {}

    def put(name: str, tensor: Tensor) -> str:
        kept[name] = tensor
        return name

    text = json.loads(json.dumps(store.encode(start, put)))
    again = store.decode(MoESpec, text, kept.__getitem__)
    assert torch.equal(again.latent.bypass_down, start.latent.bypass_down)
    for name in ("bypass_down", "bypass_up"):  # as it was written before there were bypasses
        del text["latent"][name]
    assert store.decode(MoESpec, text, kept.__getitem__).latent.bypass_rank == 0


@pytest.fixture(scope="module")
def converted():
    recipe = Recipe(latent_dim=8, bypass=3, heal_steps=6)
    return latentize.convert(net(), args=(example(),), recipe=recipe, calibration=data())


def test_a_conversion_has_it_in_plan_blocks_and_healing(converted) -> None:
    for name, block in converted.rewritten.items():
        plan = converted.plan[name]
        assert (plan.bypass_rank, plan.bypass_bytes) == (3, 2 * 3 * WIDTH * 4)
        assert plan.predicted_error < plan.error_without_bypass
        assert block.experts.bypass_down.shape == (3, WIDTH)
        assert block.experts.bypass_up.shape == (WIDTH, 3)
    report = run_report._plan(converted.plan["0.moe"], 0, 0)
    assert report.bypass_bytes == 2 * 3 * WIDTH * 4
    assert report.weight_bytes_after == sum(
        (converted.plan["0.moe"].expert_bytes_after, report.projection_bytes, report.bypass_bytes)
    )


def test_healing_steps_as_far_as_with_projections() -> None:
    block = LatentMoE(started(spec(), hidden(500, 5), latent_dim=4, variant="fixed", bypass=3))
    names = [name for _, name in Trainables({"b": block}, torch.nn.Module()).names]
    factors = {name: next((f for part, f in RATE_FACTORS.items() if part in name), 1.0) for name in names}
    assert factors["experts.bypass_down"] == factors["experts.bypass_up"] == factors["experts.latent_up"] != 1.0


def test_a_saved_model_comes_back_with_it(converted, tmp_path) -> None:
    converted.save(tmp_path / "out")
    again, x = latentize.load(tmp_path / "out", model=net()), example(7, seed=9)
    with torch.no_grad():
        assert torch.equal(again(x), converted.model(x))
        assert_close(again(x[:1]), converted.model(x[:1]))
        next(m for m in again.modules() if isinstance(m, LatentExperts)).bypass_up.zero_()
        assert not torch.allclose(again(x), converted.model(x))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "A linear map of rank 3 goes around the experts" in card
    assert "bypass: 3" in card


def test_a_model_saved_before_there_were_bypasses_still_loads(tmp_path) -> None:
    result = latentize.convert(net(), args=(example(),), recipe=Recipe(latent_dim=4, heal_steps=0))
    result.save(tmp_path / "out")
    file = tmp_path / "out" / "latentize.json"
    manifest = json.loads(file.read_text())
    del manifest["recipe"]["bypass"]
    for block in manifest["blocks"].values():
        for name in ("bypass_down", "bypass_up"):
            assert block["spec"]["latent"].pop(name) is None
    file.write_text(json.dumps(manifest))
    with torch.no_grad():
        assert torch.equal(latentize.load(tmp_path / "out", model=net())(example()), result.model(example()))


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_a_converted_model_is_latent_as_modules_and_as_a_graph(converted, scale: float) -> None:
    model = converted.model
    for block in converted.rewritten.values():
        block.experts.output_scale = scale
    try:
        again = latentize.convert(model, args=(example(),))
        assert [b.status for b in again.blocks] == ["latent", "latent"]
        assert again.model is model
        axes = ({0: torch.export.Dim.AUTO},)
        graph = torch.export.export(model, (example(),), dynamic_shapes=axes).module()
        done = latentize.passes.LatentizePass()
        result = done(graph)
        assert [b.status for b in done.blocks] == ["latent", "latent"]
        assert not result.modified
    finally:
        for block in converted.rewritten.values():
            block.experts.output_scale = 1.0


def test_what_cannot_have_one_is_refused_by_name() -> None:
    with pytest.raises(LatentizeError, match=rf"0\.moe: bypass {WIDTH} is not below the hidden size {WIDTH}"):
        latentize.convert(net(1), args=(example(),), recipe=Recipe(latent_dim=4, bypass=WIDTH), calibration=data(1))
    with pytest.raises(LatentizeError, match=r"0\.moe: bypass 3 is fitted to calibration data, and none reaches"):
        latentize.convert(net(1), args=(example(),), recipe=Recipe(latent_dim=4, bypass=3))


def test_the_dtype_of_the_recipe_is_its_dtype_too() -> None:
    recipe = Recipe(latent_dim=4, bypass=3, heal_steps=0, dtype="bfloat16")
    result = latentize.convert(net(1), args=(example(),), recipe=recipe, calibration=data(2))
    block = result.rewritten["0.moe"]
    assert block.experts.bypass_down.dtype == block.experts.bypass_up.dtype == torch.bfloat16
    assert result.plan["0.moe"].bypass_bytes == sum(
        t.nbytes for t in (block.experts.bypass_down, block.experts.bypass_up)
    )
    wide = recipe.model_copy(update={"dtype": None})
    exact = latentize.convert(net(1), args=(example(),), recipe=wide, calibration=data(2))
    x = example(9, seed=5)
    with torch.no_grad():
        assert_close(result.model(x), exact.model(x), rtol=0.05, atol=0.02)


def test_blocks_of_several_widths_each_have_one() -> None:
    recipe = Recipe(compression="auto", budget={"bytes": 0.5}, bypass=2, heal_steps=0)
    result = latentize.convert(net(), args=(example(),), recipe=recipe, calibration=data())
    for name, plan in result.plan.items():
        assert plan.bypass_rank == (2 if plan.latent_dim < WIDTH else 0)
        assert (result.rewritten[name].experts.bypass_down is None) == (plan.bypass_rank == 0)


def test_a_budget_of_flops_pays_for_it() -> None:
    block, curve = spec(), Curve((4, 16), (0.5, 0.0))
    costs = {
        rank: {o.latent_dim: o.cost for o in options_of(block, auto(rank), curve, "flops")} for rank in (0, 2)
    }
    assert costs[2][4] == costs[0][4] + 4 * 16 * 2
    assert costs[2][16] == costs[0][16]


def auto(rank: int) -> Recipe:
    return Recipe(compression="auto", budget={"flops": 0.5}, bypass=rank)
