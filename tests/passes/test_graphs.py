"""Blocks in every form a model comes in: FX graphs, wrapped, compiled, in half precision, on meta, in training mode."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path

import codings
import contract
import pytest
import torch
from codings_base import HIDDEN, example
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_base import PassBase, PassResult
from torch.fx.passes.infra.pass_manager import PassManager

import latentize

FRESH = ((3, 11, 8), (2, 33, 9))
SHORT, LONG = ("FusedGateUp", "GatherBmm", "BiasOnScore"), ("MultiHot", "TransposedStacks", "GatedShared")
EXPORTED = SHORT + LONG  # by how long their graphs of ATen alone are
TRACED = ("MultiHot", "KthThreshold", "RepeatedArgmax")
EXACT = {"variant": "acc", "experts_factor": 2, "topk_factor": 2, "heal_steps": 0, "latent_dim": HIDDEN}


def make(name: str) -> codings.Coding:
    return codings.build(codings.MOES[name])


def plain(model: nn.Module, inputs: contract.Inputs) -> Tensor:
    return model(*inputs[0], **inputs[1])


def held(build: Callable[[], nn.Module], run: contract.Run = plain, blocks: int = 1, tolerance: float = 1e-4) -> None:
    contract.assert_lifted(build, ((example(),), {}), [((example(*f),), {}) for f in FRESH], run, blocks, tolerance)


def exported(name: str, decomposed: bool = False) -> fx.GraphModule:
    dynamic = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    program = torch.export.export(make(name), (example(),), dynamic_shapes=dynamic, strict=False)
    return (program.run_decompositions() if decomposed else program).module()


def frozen(module: fx.GraphModule) -> fx.GraphModule:
    """Exported modules have no eval(); the checks here never call it."""
    module.training = False
    return module


@pytest.mark.parametrize("name", EXPORTED)
def test_exported_graph_is_lifted(name: str) -> None:
    held(lambda: frozen(exported(name)))


@pytest.mark.parametrize("name", [*SHORT, *(pytest.param(name, marks=pytest.mark.slow) for name in LONG)])
def test_decomposed_graph_is_lifted(name: str) -> None:
    held(lambda: frozen(exported(name, decomposed=True)))


@pytest.mark.parametrize("name", TRACED)
def test_traced_graph_is_lifted(name: str) -> None:
    held(lambda: fx.symbolic_trace(Untyped(make(name))).eval())


class Untyped(nn.Module):
    """Rank is known, sizes are not: what symbolic_trace can follow."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.out = block, nn.Linear(HIDDEN, HIDDEN)
        with torch.no_grad():
            self.out.weight.copy_(torch.randn(HIDDEN, HIDDEN, generator=torch.Generator().manual_seed(5)) * 0.2)
            self.out.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        return self.out(self.block.dense(flat, self.block.combine(flat)) + flat).view(x.shape)


class CountNodes(PassBase):
    """A user's own pass that changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        self.seen.append(len(graph_module.graph.nodes))
        return PassResult(graph_module, False)


@torch.no_grad()
def test_pass_works_between_other_passes() -> None:
    from latentize.passes import LatentizePass

    before, after = CountNodes(), CountNodes()
    rewrite = LatentizePass(latentize.Recipe(**EXACT))
    graph = exported("FusedGateUp")
    original = copy.deepcopy(graph)
    result = PassManager(passes=[before, rewrite, after], steps=1)(graph)
    assert result.modified
    assert [b.status for b in rewrite.blocks] == ["moe"]
    assert after.seen[0] < before.seen[0]
    for shape in FRESH:
        x = example(*shape)
        assert contract.relative(result.graph_module(x), original(x)) <= 1e-5


@torch.no_grad()
def test_pass_reports_that_it_changed_nothing() -> None:
    from latentize.passes import LatentizePass

    dense = nn.Sequential(nn.Linear(HIDDEN, 64), nn.GELU(), nn.Linear(64, HIDDEN)).eval()
    graph = torch.export.export(dense, (example(),)).module()
    code = graph.code
    rewrite = LatentizePass()
    result = rewrite(graph)
    assert not result.modified
    assert rewrite.blocks == []
    assert result.graph_module.code == code


class Wrapped(nn.Module):
    """Blocks in a ModuleList in a Sequential, one behind an indirection."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Sequential(nn.Sequential(make("SplitCat")), nn.Identity()))
        self.more = nn.ModuleList([make("NonzeroHit"), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.body(x)
        for layer in self.more:
            x = x + layer(x)
        return x


def test_wrapped_blocks_are_lifted() -> None:
    held(lambda: Wrapped().eval(), blocks=2)


def test_one_module_under_two_names_is_one_block() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = make("SplitCat")
            self.second = self.first

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first(x)
            return x + self.second(x)

    held(lambda: Shared().eval())


def test_compiled_model_is_lifted() -> None:
    held(lambda: torch.compile(Wrapped().eval(), backend="eager"), blocks=2)


def test_data_parallel_wrapper_is_lifted() -> None:
    held(lambda: nn.DataParallel(make("FusedGateUp")).eval())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["FusedGateUp", "SplitCat", "GatherBmm"])
def test_half_precision_block_is_lifted(name: str, dtype: torch.dtype) -> None:
    def run(model: nn.Module, inputs: contract.Inputs) -> Tensor:
        return model(inputs[0][0].to(dtype))

    inputs = ((example().to(dtype),), {})
    fresh = [((example(*f).to(dtype),), {}) for f in FRESH]
    contract.assert_lifted(lambda: make(name).to(dtype), inputs, fresh, run, tolerance=3e-2)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_runs_inside_the_callers_grad_mode(context: Callable[[], object]) -> None:
    model, x = make("SplitCat"), example()
    with context():
        assert [b.status for b in latentize.inspect(model, args=(x,))] == ["moe"]
        result = latentize.convert(model, args=(x,), recipe=latentize.Recipe(**EXACT))
        assert contract.relative(result.model(example(1, 5, 2)).detach(), model(example(1, 5, 2)).detach()) <= 1e-5


def test_training_mode_is_looked_at_in_eval_and_restored() -> None:
    model = make("TrainOnly").train()
    tilt, state = model.tilt.clone(), torch.get_rng_state()
    blocks = latentize.inspect(model, args=(example(),))
    assert [b.status for b in blocks] == ["moe"]
    assert model.training
    assert model.drop.training
    assert torch.equal(model.tilt, tilt)
    assert torch.equal(torch.get_rng_state(), state)


def test_random_states_are_left_alone() -> None:
    model = make("SplitCat")
    random.seed(3)
    states = random.getstate(), torch.get_rng_state()
    latentize.convert(model, args=(example(),), recipe=latentize.Recipe(**EXACT))
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])


def test_hooks_stay_and_do_not_run_during_inspection_results() -> None:
    model = Wrapped().eval()
    calls: list[tuple[int, ...]] = []
    handle = model.body.register_forward_hook(lambda module, args, out: calls.append(tuple(out.shape)))
    latentize.inspect(model, args=(example(),))
    assert model.body._forward_hooks
    calls.clear()
    converted = latentize.convert(model, args=(example(),), recipe=latentize.Recipe(**EXACT)).model
    calls.clear()
    converted(example(1, 4, 1))
    assert calls == [(1, 4, HIDDEN)]
    handle.remove()


def test_meta_model_is_read_by_structure_only() -> None:
    with torch.device("meta"):
        model = codings.MOES["FusedGateUp"]().eval()
        x = torch.empty(2, 24, HIDDEN)
    (block,) = latentize.inspect(model, args=(x,))
    assert block.status == "moe"
    assert block.max_error is None
    assert (block.spec.num_experts, block.spec.top_k, block.spec.hidden_size) == (8, 2, HIDDEN)
    with pytest.raises(latentize.LatentizeError):
        latentize.convert(model, args=(x,))


def test_short_example_still_reaches_every_expert() -> None:
    for name in ("SplitCat", "AnyContinue"):
        blocks = latentize.inspect(make(name), args=(example(1, 1, 0),))
        assert [b.status for b in blocks] == ["moe"], (name, [b.reason for b in blocks])
        assert blocks[0].spec.num_experts == 8


def test_all_zero_router_and_bias_hide_nothing() -> None:
    def build() -> nn.Module:
        model = make("GroupsTop2Inf")
        nn.init.zeros_(model.e_bias)
        return model

    (block,) = latentize.inspect(build(), args=(example(),))
    assert block.spec.router.selection_bias is not None, "a bias that happens to be zero belongs to the block"


@torch.no_grad()
def test_router_keeps_its_choice_at_a_smaller_latent() -> None:
    model, x = make("FusedGateUp"), example(3, 11, 8)
    recipe = latentize.Recipe(latent_dim=HIDDEN // 2, variant="fixed", heal_steps=0)
    result = latentize.convert(model, args=(example(),), recipe=recipe)
    (block,) = result.rewritten.values()
    ours, theirs = block.router(x.reshape(-1, HIDDEN)).indices, model.route(x.reshape(-1, HIDDEN))[1]
    assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)


@torch.no_grad()
def test_everything_outside_the_blocks_is_the_same_tensors() -> None:
    model = codings.build(codings.MOES["DecoderModel"])
    result = latentize.convert(model, kwargs={"ids": torch.arange(40).view(2, 20)}, recipe=latentize.Recipe(**EXACT))
    ours, theirs = dict(result.model.named_parameters()), dict(model.named_parameters())
    outside = [n for n in theirs if ".ff." not in n]
    assert len(outside) > 8
    assert all(ours[n].data_ptr() == theirs[n].data_ptr() for n in outside)


class Around(nn.Module):
    """Loops over hit experts with a norm, a shared projection and a residual in the same forward."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.block, self.norm, self.shared = make("NonzeroHit"), nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        flat = h.reshape(-1, HIDDEN)
        weights, index = self.block.route(flat)
        return x + self.shared(h) + self.block.dispatch(flat, weights, index).view(x.shape)


@pytest.mark.slow
def test_loop_over_hit_experts_with_work_around_it_is_lifted() -> None:
    held(lambda: Around().eval())


@torch.no_grad()
@pytest.mark.parametrize("build", [lambda: frozen(exported("FusedGateUp")), lambda: Around().eval()])
def test_rewritten_graph_keeps_no_replaced_weight(build: Callable[[], nn.Module], tmp_path: Path) -> None:
    model = build()
    recipe = latentize.Recipe(compression=4, variant="fixed", heal_steps=0)
    result = latentize.convert(model, args=(example(),), recipe=recipe)
    (block,) = result.rewritten.values()
    experts = {t.data_ptr() for t in model.parameters() if t.dim() == 3}
    assert len(experts) >= 2
    kept = dict(result.model.named_parameters())
    assert not experts & {t.data_ptr() for t in kept.values()}
    outside = sum(t.numel() for t in model.parameters() if t.dim() < 3 and t.shape != block.router.weight.shape)
    assert sum(t.numel() for t in kept.values()) <= outside + sum(t.numel() for t in block.parameters())
    result.save(tmp_path / "out")
    saved = sum(f.stat().st_size for f in (tmp_path / "out").rglob("*.safetensors"))
    assert saved < 0.6 * sum(t.numel() * t.element_size() for t in model.parameters())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_graph_can_be_trained_whole_and_the_original_only_in_place(inplace: bool) -> None:
    model = exported("GatedShared")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    data = [(example(4, 64, 10 + seed),) for seed in range(12)]
    recipe = latentize.Recipe(compression=2, variant="fixed", init="weights", heal_steps=12, heal_train="all")
    result = latentize.convert(model, args=data[0], recipe=recipe, calibration=data, inplace=inplace)
    assert result.healing is not None
    assert result.healing.outside > 0
    trained = {name: p for name, p in result.model.named_parameters() if "latent_moe" not in name}
    assert {name.partition(".")[0] for name in trained} == {"always", "how_much"}  # the shared expert and its gate
    assert not any(torch.equal(p, before[name]) for name, p in trained.items())
    if inplace:
        assert all(p is model.get_parameter(name) for name, p in trained.items())
    else:
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
