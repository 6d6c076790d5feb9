"""Tokens that are filled up to a multiple of some number before the experts, and cut off again after them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import latentize

D, N, M, K = 16, 4, 24, 2
EXACT = latentize.Recipe(latent_dim=D, variant="acc", experts_factor=2, topk_factor=2, heal_steps=0)


def hidden(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


class Padded(nn.Module):
    multiple = 8

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, N, bias=False)
        self.gate, self.up = (nn.Parameter(torch.randn(N, M, D) * D**-0.5) for _ in range(2))
        self.down = nn.Parameter(torch.randn(N, D, M) * M**-0.5)
        self.shared = nn.Linear(D, D)

    def route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.router(rows).softmax(-1).topk(K, -1)
        return weights / weights.sum(-1, keepdim=True), chosen

    def experts(self, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        dense = torch.zeros(rows.shape[0], N, dtype=rows.dtype).scatter(1, chosen, weights)
        h = F.silu(torch.einsum("td,emd->tem", rows, self.gate)) * torch.einsum("td,emd->tem", rows, self.up)
        return (dense.unsqueeze(-1) * torch.einsum("tem,edm->ted", h, self.down)).sum(1)

    def filled(self, rows: Tensor) -> Tensor:
        return F.pad(rows, (0, 0, 0, -rows.shape[0] % self.multiple))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        filled = self.filled(rows)
        return self.experts(filled, *self.route(filled))[: rows.shape[0]].view(x.shape)


class AfterRouting(Padded):
    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        weights, chosen = self.route(rows)
        routed = self.experts(self.filled(rows), self.filled(weights), self.filled(chosen))
        return routed[: rows.shape[0]].view(x.shape)


class BesideShared(Padded):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shared(x)


class ToSixteen(Padded):
    multiple = 16


class Shifted(Padded):
    """Fills up in front and cuts off at the end: every token gets the output of another."""

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        filled = F.pad(rows, (0, 0, -rows.shape[0] % self.multiple, 0))
        return self.experts(filled, *self.route(filled))[: rows.shape[0]].view(x.shape)


class Net(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.moe, self.head = nn.LayerNorm(D), block(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.moe(self.norm(x)))


@pytest.mark.parametrize("block", [Padded, AfterRouting, BesideShared, ToSixteen])
def test_padding_that_is_cut_off_again_changes_nothing(block: type[nn.Module]) -> None:
    model = Net(block).eval()
    result = latentize.convert(model, args=(hidden(2, 21),), recipe=EXACT)
    assert [(b.name, b.status, b.reason) for b in result.blocks] == [("moe", "moe", "")]
    for seed, shape in enumerate(((1, 1), (3, 11), (2, 24)), start=1):
        x = hidden(*shape, seed=seed)
        with torch.no_grad():
            torch.testing.assert_close(result.model(x), model(x), rtol=1e-4, atol=1e-5)


def test_padding_that_shifts_the_tokens_is_refused() -> None:
    (block,) = latentize.inspect(Net(Shifted).eval(), args=(hidden(2, 21),))
    assert block.status == "refused"
    assert block.reason
