"""Exported graphs that hold for some sizes alone: proved at those they take, and refused for what they do there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.export import Dim

import latentize

D, N, M, K = 16, 4, 24, 2
EXACT = latentize.Recipe(latent_dim=D, variant="acc", experts_factor=2, topk_factor=2, heal_steps=0)
BATCH, TOKENS = 2, 20


class Lm(nn.Module):
    """Combines by a scatter into zeros of so many tokens."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm, self.head = nn.Embedding(50, D), nn.LayerNorm(D), nn.Linear(D, 50)
        self.router = nn.Linear(D, N, bias=False)
        self.gate, self.up = (nn.Parameter(torch.randn(N, M, D) * D**-0.5) for _ in range(2))
        self.down = nn.Parameter(torch.randn(N, D, M) * M**-0.5)

    def combine(self, logits: Tensor) -> Tensor:
        weights, chosen = logits.softmax(-1).topk(K, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        return torch.zeros(logits.shape[0], N, dtype=logits.dtype).scatter(1, chosen, weights)

    def block(self, x: Tensor) -> Tensor:
        rows = self.norm(x).reshape(-1, D)
        h = F.silu(torch.einsum("td,emd->tem", rows, self.gate)) * torch.einsum("td,emd->tem", rows, self.up)
        y = torch.einsum("tem,edm->ted", h, self.down)
        return x + (self.combine(self.router(rows)).unsqueeze(-1) * y).sum(1).view(x.shape)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.block(self.embed(ids)))


class OnHidden(Lm):
    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)


class Dropping(OnHidden):
    """Gives an expert no more tokens than its share and a half: the example has no expert that is as busy."""

    def combine(self, logits: Tensor) -> Tensor:
        dense = super().combine(logits)
        place = (dense > 0).long().cumsum(0)
        return dense * (place <= logits.shape[0] * 3 // 4)


class OverTokens(OnHidden):
    """Scores that look at the other tokens."""

    def combine(self, logits: Tensor) -> Tensor:
        return super().combine(logits - logits.mean(0))


def given(case: type[Lm], batch: int = BATCH, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if case is Lm:
        return torch.randint(0, 50, (batch, tokens), generator=generator)
    return torch.randn(batch, tokens, D, generator=generator)


def exported(case: type[Lm], dynamic: Any, *, guards: bool) -> fx.GraphModule:
    program = torch.export.export(case().eval(), (given(case),), dynamic_shapes=dynamic, strict=False)
    return program.module(check_guards=guards)


@pytest.mark.parametrize("guards", [True, False])
@pytest.mark.parametrize("case", [Lm, OnHidden])
@pytest.mark.parametrize(
    ("dynamic", "fresh"),
    [
        (None, [(2, 20)]),
        (({1: Dim("tokens", min=2, max=64)},), [(2, 20), (2, 3), (2, 33)]),
        (({0: Dim.AUTO, 1: Dim.AUTO},), [(2, 20), (1, 5), (3, 9)]),
    ],
)
def test_a_graph_is_proved_at_the_sizes_that_it_takes(
    case: type[Lm], dynamic: Any, fresh: list[tuple[int, int]], guards: bool
) -> None:
    graph = exported(case, dynamic, guards=guards)
    result = latentize.convert(graph, args=(given(case),), recipe=EXACT)
    (block,) = result.blocks
    assert (block.status, block.reason) == ("moe", "")
    assert dynamic is not None or any("equal tokens" in probe.name for probe in block.evidence)
    for seed, (batch, tokens) in enumerate(fresh, start=1):
        x = given(case, batch, tokens, seed)
        with torch.no_grad():
            torch.testing.assert_close(result.model(x), graph(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("guards", [True, False])
@pytest.mark.parametrize("case", [Dropping, OverTokens])
def test_a_graph_of_one_size_that_computes_something_else_is_refused(case: type[Lm], guards: bool) -> None:
    graph = exported(case, None, guards=guards)
    (block,) = latentize.inspect(graph, args=(given(case),))
    assert block.status == "refused"
    assert block.reason
