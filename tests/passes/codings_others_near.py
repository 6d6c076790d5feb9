"""Look-alikes of unrelated authors: what else selects, mixes, remembers or draws; and cases that may be either."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from codings_base import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, Coding, Listed, Stacked
from codings_refused import MIXES, NEAREST, NO_ROUTING, RANDOM, STATEFUL
from torch import Tensor, nn

from latentize.spec import MoESpec

N, D, M = EXPERTS, HIDDEN, INTERMEDIATE


def _spread(p: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros_like(p).scatter(-1, index, weights)


class _Near(Stacked):
    why = NEAREST


class SoftmaxOverTokens(_Near):
    """Scores are a softmax over the sequence."""

    why = MIXES

    def combine(self, x: Tensor) -> Tensor:
        p = self.r(x).softmax(1)
        weights, index = p.topk(TOP_K, -1)
        return _spread(p, index, weights)


class BalancedInForward(_Near):
    """A bias on the scores moves toward equal loads with every call, in evaluation too."""

    why = STATEFUL

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tilt", torch.zeros(N))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.r(x).softmax(-1)
        index = (p + self.tilt).topk(TOP_K, -1).indices
        load = F.one_hot(index, N).to(p).mean((0, 1, 2))
        self.tilt.add_(2.0 * (1 / N - load).sign())
        return p.gather(-1, index), index


class EveryThirdCall(_Near):
    """Every third call uses the least likely experts."""

    why = STATEFUL

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.calls += 1
        weights, index = self.r(x).softmax(-1).topk(TOP_K, -1, largest=self.calls % 2 == 1)
        return weights / weights.sum(-1, keepdim=True), index


class SampledSecond(_Near):
    """The second expert is drawn by its probability."""

    why = RANDOM

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.r(x).softmax(-1)
        best = p.argmax(-1, keepdim=True)
        rest = p.scatter(-1, best, 0.0)
        drawn = torch.multinomial(rest.view(-1, N), 1).view_as(best)
        index = torch.cat([best, drawn], -1)
        weights = p.gather(-1, index)
        return weights / weights.sum(-1, keepdim=True), index


class SwappedWeights(_Near):
    """Each of the two chosen experts gets the other's weight."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = super().route(x)
        return weights.flip(-1), index


class FactorisedMemory(Coding):
    """The best slots of a memory by a linear score, and a weighted sum of their values: no feed-forward in it."""

    why = NO_ROUTING

    def __init__(self) -> None:
        super().__init__()
        self.keys = nn.Linear(D, N, bias=False)
        self.values = nn.Embedding(N, D)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.keys(x).topk(TOP_K, -1)
        return torch.einsum("btk,btkd->btd", weights.softmax(-1), self.values(index))


class HeadsOfAttention(Coding):
    """A router picks which heads' queries attend; the values come from the whole sequence."""

    why = MIXES

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Linear(D, N, bias=False)
        self.q = nn.Parameter(torch.randn(N, 8, D) * 0.2)
        self.k, self.v = nn.Linear(D, 8), nn.Linear(D, 8)
        self.o = nn.Parameter(torch.randn(N, D, 8) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.r(x).softmax(-1).topk(TOP_K, -1)
        combine = torch.zeros(*x.shape[:2], N, dtype=x.dtype).scatter(-1, index, weights)
        q = torch.einsum("btd,ehd->beth", x, self.q)
        mixed = (q @ self.k(x).mT.unsqueeze(1) / 8**0.5).softmax(-1) @ self.v(x).unsqueeze(1)
        return torch.einsum("beth,edh,bte->btd", mixed, self.o, combine)


class SoftmaxNeurons(_Near):
    """The experts' inner function is a softmax over their neurons."""

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        hidden = torch.einsum("...d,eid->...ei", x, self.a).softmax(-1) * torch.einsum("...d,eid->...ei", x, self.b)
        return torch.einsum("...ei,edi,...e->...d", hidden, self.c, combine)


class PriorityDropping(_Near):
    """Each expert keeps its twelve surest tokens of the batch."""

    why = MIXES

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        combine = self.combine(flat)
        floor = combine.topk(min(12, len(flat)), 0).values[-1]
        return self.dense(flat, combine * (combine >= floor)).view(x.shape)


class TokenTable(Coding):
    """Experts by a table of the tokens' signs; weights by a router that selects nothing."""

    why = NO_ROUTING

    def __init__(self) -> None:
        super().__init__()
        self.inner = Listed()

    def forward(self, x: Tensor) -> Tensor:
        place = ((x[..., :3] > 0).long() * torch.tensor([1, 2, 4])).sum(-1)
        index = torch.stack([place, (place + 3) % N], -1)
        weights = self.inner.r(x).sigmoid().gather(-1, index)
        return self.inner.dense(x, torch.zeros(*x.shape[:2], N, dtype=x.dtype).scatter(-1, index, weights))


class MinimumSecond(_Near):
    """The second expert takes part only where its probability is at least a fifth of the first's."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.r(x).softmax(-1).topk(TOP_K, -1)
        weights = weights * (weights >= 0.2 * weights[..., :1])
        return weights / weights.sum(-1, keepdim=True), index


class FrozenAfterFirst(_Near):
    """Experts are chosen at the first call with a shape and kept for later ones."""

    why = STATEFUL

    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[torch.Size, Tensor] = {}
        self.turn = 0

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.r(x).softmax(-1)
        if x.shape not in self.kept:
            self.kept[x.shape] = p.topk(TOP_K, -1).indices
        else:
            self.kept[x.shape] = self.kept[x.shape].roll(1, 1)
        index = self.kept[x.shape]
        return p.gather(-1, index), index


class DampedByNorm(_Near):
    """Routing weights shrink with the size of the token."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = super().route(x)
        return weights / (1 + x.square().mean(-1, keepdim=True)), index


class SecondFromRest(_Near):
    """The second weight is a softmax over the experts that are left."""

    rule = {"normalize": "none"}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.r(x)
        first, best = logits.softmax(-1).max(-1, keepdim=True)
        left = logits.scatter(-1, best, float("-inf")).softmax(-1)
        second, next_best = left.max(-1, keepdim=True)
        return torch.cat([first, second], -1), torch.cat([best, next_best], -1)


class WarmPath(_Near):
    """Sequences longer than forty tokens skip the experts of their last token."""

    def combine(self, x: Tensor) -> Tensor:
        combine = super().combine(x)
        if x.shape[1] > 40:
            combine = torch.cat([combine[:, :-1], combine[:, -1:] * 0], 1)
        return combine


NOT_MOES = {
    c.__name__: c
    for c in (
        SoftmaxOverTokens, BalancedInForward, EveryThirdCall, SampledSecond, SwappedWeights, FactorisedMemory,
        HeadsOfAttention, SoftmaxNeurons, PriorityDropping, TokenTable, MinimumSecond, FrozenAfterFirst,
        DampedByNorm, SecondFromRest, WarmPath,
    )
}  # fmt: skip


class OtherTensor(Stacked):
    """The router reads a second argument."""

    @staticmethod
    def arguments(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (x, x.roll(1, -1)), {}

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        return self.dense(x, self.combine(seen))


class TwinExperts(Listed):
    """Two experts are one module."""

    def build(self) -> None:
        super().build()
        self.ffns[5] = self.ffns[2]


class HiddenRouter(Stacked):
    """The router has a hidden layer; the experts read what its first layer reads."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Sequential(nn.Linear(D, D), nn.Tanh(), nn.Linear(D, N, bias=False))

    def truth(self) -> MoESpec:
        raise NotImplementedError


class ScaledByCount(Stacked):
    """The routed output is divided by the number of chosen experts, found at run time."""

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        return super().dense(x, combine) / (combine > 0).sum(-1, keepdim=True)


class FirstHalfOnly(Stacked):
    """The experts read the first half of what the router reads, and its absolute values."""

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        return super().dense(torch.cat([x[..., : D // 2], x[..., : D // 2].abs()], -1), combine)


class PairwiseRouter(Stacked):
    """Logits by broadcasting: the root of the width divides products that are summed by a mean."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = ((x.unsqueeze(-2) * self.r.weight).mean(-1) * D**0.5).softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


#: Lifted exactly with what is around it, or refused.
EITHER = {c.__name__: c for c in (OtherTensor, TwinExperts, HiddenRouter, ScaledByCount, FirstHalfOnly, PairwiseRouter)}
