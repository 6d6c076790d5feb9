"""Experts that are multiplied without being copied compute what copies compute."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from latentize import rescale
from latentize.activations import Activation
from latentize.moe import LatentMoE
from latentize.passes.siblings import TOKENS, multiplied
from latentize.spec import ExpertsSpec, Groups, MoESpec, RouterSpec

D, M, N, IDENTITIES = 12, 8, 4, 2


def block(applies_to: str = "output", *, identities: int = 0, groups: Groups | None = None) -> MoESpec:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.5

    router = RouterSpec(
        drawn(N + identities, D), 2, score="sigmoid", selection_bias=0.1 * drawn(N + identities), groups=groups,
        normalize="sum", eps=1e-3, scale=1.5, applies_to=applies_to,  # type: ignore[arg-type]
    )  # fmt: skip
    experts = ExpertsSpec(
        drawn(N, M, D), drawn(N, D, M), drawn(N, M, D), None, drawn(N, M), drawn(N, D), Activation("silu"), identities
    )
    return MoESpec(router, experts)


BLOCKS = {
    "weights on outputs": block(),
    "weights on inputs": block("input"),
    "identity experts": block(identities=IDENTITIES),
    "identity experts, weights on inputs": block("input", identities=IDENTITIES),
    "groups": block(groups=Groups(2, 1)),
    "scaled": replace(block(), output_scale=0.3, output_bias=torch.ones(D, dtype=torch.float64)),
}


@pytest.mark.parametrize("factor", [1, 2, 3])
@pytest.mark.parametrize("name", BLOCKS)
def test_it_computes_what_copies_compute(name: str, factor: int) -> None:
    spec = BLOCKS[name]
    hidden = torch.randn(2 * TOKENS + 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shared, copied = multiplied(spec, factor), LatentMoE(rescale.expand(spec, factor, factor))
    routing = shared.router(hidden)
    assert routing.indices.shape[1] == factor * spec.top_k
    assert torch.equal(routing.indices, copied.router(hidden).indices)
    torch.testing.assert_close(shared(hidden), copied(hidden), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", BLOCKS)
def test_it_holds_the_experts_once(name: str) -> None:
    spec = BLOCKS[name]
    found = multiplied(spec, 2).experts
    assert found.up is not None
    assert found.up.data_ptr() == spec.experts.up.data_ptr()
    assert found.up.shape == spec.experts.up.shape


def test_wrong_experts_show() -> None:
    spec = BLOCKS["weights on outputs"]
    other = replace(spec, experts=replace(spec.experts, down=spec.experts.down.roll(1, 0)))
    hidden = torch.randn(8, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    apart = (multiplied(spec, 2)(hidden) - multiplied(other, 2)(hidden)).norm() / multiplied(spec, 2)(hidden).norm()
    assert apart > 0.1
