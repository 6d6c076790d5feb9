"""A router that code around its block calls again: it answers in the shape it always did, and is no second block."""

from __future__ import annotations

import pytest
import torch
from codings_base import swiglu_loop
from torch import Tensor, nn
from torch.testing import assert_close

import latentize

D, N, M, K = 16, 4, 24, 2
EXACT = latentize.Recipe(latent_dim=D, variant="acc", experts_factor=2, topk_factor=2, heal_steps=0)


def hidden(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed))


def chosen(logits: Tensor) -> tuple[Tensor, Tensor]:
    weights, index = logits.softmax(-1).topk(K, -1)
    return weights / weights.sum(-1, keepdim=True), index


class Router(nn.Linear):
    """Returns (logits, weights, indices), shaped like what it is given, or flat."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__(D, N, bias=False)
        self.flat = flat

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = super().forward(x.reshape(-1, D) if self.flat else x)
        return logits, *chosen(logits)


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Parameter(torch.randn(N, M, D) * D**-0.5) for _ in range(2))
        self.down = nn.Parameter(torch.randn(N, D, M) * M**-0.5)

    def forward(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        return swiglu_loop(x, weights, index, self.gate, self.up, self.down)


class Parts(nn.Module):
    """Router and experts are submodules, with a shared expert beside them."""

    def __init__(self, *, flat: bool) -> None:
        super().__init__()
        self.router, self.experts, self.shared = Router(flat=flat), Experts(), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        _, weights, index = self.router(rows)
        return (self.experts(rows, weights, index) + self.shared(rows)).view(x.shape)


class Whole(nn.Module):
    """Nothing but a block, whose router is a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, N, bias=False), Experts()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D)
        return self.experts(rows, *chosen(self.router(rows))).view(x.shape)


class WithShared(Whole):
    """Must become a graph, in which there is no module for a router."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shared(x)


class Net(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.norm, self.moe, self.head = nn.LayerNorm(D), block, nn.Linear(D, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm(x)
        logits = self.moe.router(h)
        return self.head(x + self.moe(h)), logits if isinstance(logits, Tensor) else logits[0]


def net(block: type[nn.Module], **options: bool) -> Net:
    torch.manual_seed(0)
    return Net(block(**options)).eval()


@pytest.mark.parametrize(
    ("block", "options", "shape"),
    [(Parts, {"flat": True}, (21,)), (Parts, {"flat": False}, (3, 7)), (Whole, {}, (3, 7))],
)
def test_a_router_answers_calls_of_another_rank_in_its_own_shape(
    block: type[nn.Module], options: dict[str, bool], shape: tuple[int, ...]
) -> None:
    model = net(block, **options)
    result = latentize.convert(model, args=(hidden(2, 20),), recipe=EXACT)
    assert [(b.name, b.status) for b in result.blocks] == [("moe", "moe")]
    x = hidden(3, 7, seed=1)
    with torch.no_grad():
        (wanted, logits), (found, more) = model(x), result.model(x)
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert logits.shape == (*shape, N)
    assert more.shape == (*shape, 2 * N)
    assert_close(more[..., :N], logits, rtol=1e-4, atol=1e-5)


def test_the_block_that_is_reported_is_the_one_in_the_model() -> None:
    """A second call of the router must not make a graph of the whole model, in which the block is another one."""
    result = latentize.convert(
        net(Parts, flat=True), args=(hidden(2, 20),), recipe=latentize.Recipe(latent_dim=8, heal_steps=0)
    )
    (block,) = result.rewritten.values()
    assert {id(p) for p in block.parameters()} <= {id(p) for p in result.model.parameters()}


def test_a_router_that_a_graph_would_take_away_is_named() -> None:
    (block,) = latentize.inspect(net(WithShared), args=(hidden(2, 20),))
    assert (block.name, block.status) == ("moe", "refused")
    assert block.reason == (
        "the code around it uses 'router' of it, and to be rewritten its module must become a graph"
    )
