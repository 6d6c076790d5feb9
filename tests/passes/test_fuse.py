"""Fusion passes: the same numbers with fewer nodes, and what must be left as it is."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.infra.pass_manager import PassManager
from torch.testing import assert_close

from latentize.activations import Activation
from latentize.moe import LatentMoE
from latentize.passes.fuse import FoldScale, FuseProjections, FuseUp, fuse
from latentize.spec import ExpertsSpec, LatentSpec, MoESpec, RouterSpec

D, L, M, N, K = 12, 5, 7, 6, 2


def moe(dtype=torch.float64, scale=1.5, bypass=0) -> LatentMoE:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) / shape[-1] ** 0.5).to(dtype)

    experts = ExpertsSpec(normal(N, M, L), normal(N, L, M), normal(N, M, L), activation=Activation("silu"))
    latent = LatentSpec(normal(L, D), normal(D, L))
    if bypass:
        latent = replace(latent, bypass_down=normal(bypass, D), bypass_up=normal(D, bypass))
    return LatentMoE(MoESpec(RouterSpec(normal(N, D), K, normalize="sum"), experts, latent, output_scale=scale))


class Block(nn.Module):
    """A latent block beside a shared expert, in a residual stream [B, T, d]."""

    def __init__(self, dtype=torch.float64, scale=1.5) -> None:
        super().__init__()
        self.moe = moe(dtype, scale)
        self.gate, self.up = (nn.Linear(D, M, bias=False, dtype=dtype) for _ in range(2))
        self.down = nn.Linear(M, D, bias=False, dtype=dtype)

    def shared(self, hidden: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(hidden)) * self.up(hidden))

    def forward(self, x: Tensor) -> Tensor:
        hidden = x.reshape(-1, D)
        return (self.moe(hidden) + self.shared(hidden)).view(x.shape)


def graph_of(module: nn.Module, dtype=torch.float64) -> fx.GraphModule:
    axes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    exported = torch.export.export(module.eval().requires_grad_(False), (tokens(2, 5, dtype),), dynamic_shapes=axes)
    graph = exported.module()
    assert isinstance(graph, fx.GraphModule)
    return graph


def tokens(batch: int, length: int, dtype=torch.float64) -> Tensor:
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(length), dtype=torch.float64).to(dtype)


def operations(graph: fx.GraphModule) -> Counter[str]:
    return Counter(str(node.target).split(".")[1] for node in graph.graph.nodes if str(node.target).startswith("aten."))


def assert_same(graph: fx.GraphModule, module: nn.Module, tolerance=1e-14) -> None:
    for batch, length in ((2, 5), (1, 1), (3, 17)):
        x = tokens(batch, length)
        assert_close(graph(x), module(x), rtol=tolerance, atol=tolerance)


def test_all_of_them_keep_the_output_with_two_products_instead_of_six():
    block = Block()
    graph = graph_of(block)
    assert operations(graph)["linear"] == 6
    assert fuse(graph).modified
    assert (operations(graph)["linear"], operations(graph)["addmm"]) == (2, 1)
    assert_same(graph, block)
    assert not fuse(graph).modified
    names = {name.partition(".")[0] for name, _ in graph.named_parameters()}
    assert names == {"fused_projections_0", "latent_up_scaled_0", "moe", "down"}
    axes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    assert_same(torch.export.export(graph, (tokens(2, 5),), dynamic_shapes=axes).module(), block)


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_a_bypass_is_kept(scale: float):
    block = Block()
    block.moe = moe(scale=scale, bypass=3)
    graph = graph_of(block)
    before = operations(graph)["linear"]
    assert before == 8
    assert fuse(graph).modified
    assert sum(operations(graph)[name] for name in ("linear", "addmm")) <= before - 3
    assert_same(graph, block)
    without = Block()
    without.moe = moe(scale=scale)
    assert not torch.allclose(graph(tokens(2, 5)), without(tokens(2, 5)))


def test_they_stand_in_a_pass_manager():
    block = Block()
    result = PassManager(passes=[FoldScale(), FuseUp()])(graph_of(block))
    assert result.modified
    assert operations(result.graph_module)["linear"] == 5
    assert_same(result.graph_module, block)


class ScaleReadTwice(Block):
    """The up-projection's output is read before its scale too."""

    def forward(self, x: Tensor) -> Tensor:
        plain = self.moe(x.reshape(-1, D))
        return (2.0 * plain + plain.relu()).view(x.shape)


def test_a_scale_that_not_all_readers_see_is_left():
    block = ScaleReadTwice(scale=1.0)
    graph = graph_of(copy.deepcopy(block))
    assert not FoldScale()(graph).modified
    assert_same(graph, block)
    up = graph.moe.experts.latent_up  # the naive rule, for comparison: it changes what the other reader sees
    up.mul_(2.0)
    assert not torch.allclose(graph(tokens(1, 3)), block(tokens(1, 3)))


class TiedRouter(Block):
    """The router's rows are read by something else as well."""

    def forward(self, x: Tensor) -> Tensor:
        return self.moe(x.reshape(-1, D)).view(x.shape) + self.moe.router.weight.sum(0)


def test_parameters_that_others_read_stay_where_they_are():
    block = TiedRouter()
    graph = graph_of(block)
    assert not FuseProjections()(graph).modified
    assert "moe.router.weight" in dict(graph.named_parameters())
    assert_same(graph, block)


def test_memory_under_two_names_is_left():
    block = Block()
    block.gate.weight = block.up.weight
    graph = graph_of(block)
    fuse(graph)
    assert operations(graph)["linear"] == 4  # router and down-projection together; gate, up and down as they were
    assert {"gate.weight", "up.weight"} & set(dict(graph.named_parameters(remove_duplicate=False)))
    assert_same(graph, block)


def test_the_router_stays_apart_in_16_bits():
    """Its logits are computed in fp32, from weights that are widened for it."""
    block = Block(torch.bfloat16)
    graph = graph_of(block, torch.bfloat16)
    assert FuseProjections()(graph).modified  # the shared expert's gate and up with the down-projection
    assert "moe.router.weight" in dict(graph.named_parameters())
    x = tokens(2, 9, torch.bfloat16)
    assert_close(graph(x), block(x), rtol=2e-2, atol=2e-2)


class Sum(Block):
    """The up-projection's output in another kind of sum."""

    def __init__(self, kind: str) -> None:
        super().__init__(scale=1.0)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        routed = self.moe(x.reshape(-1, D))
        if self.kind == "broadcast":
            return (routed + x.new_ones(1, D)).view(x.shape)
        if self.kind == "alpha":
            return torch.add(routed, x.reshape(-1, D), alpha=2).view(x.shape)
        if self.kind == "itself":
            return (routed + routed).view(x.shape)
        if self.kind == "other rows":
            return routed.view(x.shape[0], -1, D // 2) + x.reshape(x.shape[0], -1, D // 2)
        return routed.view(x.shape) + x


@pytest.mark.parametrize("kind", ["broadcast", "alpha", "itself", "other rows"])
def test_sums_that_addmm_does_not_compute_are_left(kind):
    block = Sum(kind)
    graph = graph_of(block)
    assert not FuseUp()(graph).modified
    assert_same(graph, block)


def test_a_residual_in_the_shape_of_the_stream_is_fused():
    block = Sum("residual")
    graph = graph_of(block)
    assert FuseUp()(graph).modified
    assert operations(graph)["addmm"] == 1
    assert_same(graph, block)


def test_a_model_without_latent_experts_is_left():
    graph = graph_of(nn.Sequential(nn.Linear(D, D, bias=False), nn.Linear(D, D, bias=False)).double())
    before = str(graph.graph)
    assert not fuse(graph).modified
    assert str(graph.graph) == before


class WrittenBetween(Block):
    """The tokens change between the routed experts and the shared one."""

    def forward(self, x: Tensor) -> Tensor:
        stream = x.clone()
        hidden = stream.view(-1, D)
        routed = self.moe(hidden)
        stream.mul_(2.0)
        return (routed + self.shared(hidden)).view(x.shape)


def test_products_around_a_write_in_place_are_not_moved_past_it():
    block = WrittenBetween(scale=1.0)
    graph = graph_of(block)
    fuse(graph)
    assert "fused_projections_0" not in dict(graph.named_parameters())
    assert_same(graph, block)


class ViewedParts(Block):
    """The shared expert's products are viewed as one row."""

    def shared(self, hidden: Tensor) -> Tensor:
        both = F.silu(self.gate(hidden).view(-1)) * self.up(hidden).view(-1)
        return self.down(both.view(-1, M))


def test_views_of_merged_products_become_reshapes():
    block = ViewedParts()
    graph = graph_of(block)
    assert FuseProjections()(graph).modified
    assert_same(graph, block)


def test_what_learns_goes_on_learning_and_what_does_not_stays_apart():
    block = Block()
    axes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    block.moe.router.weight.requires_grad_(False)
    graph = torch.export.export(block, (tokens(2, 5),), dynamic_shapes=axes).module()
    with torch.no_grad():
        fuse(graph)
    learns = {name: parameter.requires_grad for name, parameter in graph.named_parameters()}
    assert learns["latent_up_scaled_0"]
    assert learns["fused_projections_0"] == (not learns.get("moe.router.weight", True))
    graph(tokens(1, 3)).sum().backward()
    assert dict(graph.named_parameters())["latent_up_scaled_0"].grad is not None


@pytest.mark.parametrize(("scale", "folded"), [(2.0, True), (1.5, False)])
def test_in_16_bits_only_powers_of_two_are_folded(scale, folded):
    graph = graph_of(Block(torch.bfloat16, scale), torch.bfloat16)
    assert FoldScale()(graph).modified == folded
