"""Look-alikes that are not a standard MoE, and cases where lifting and refusing are both right.

Every look-alike says in `why` how it differs, and a test shows it. NEAREST: it is not the standard MoE that a hasty
reader would take it for (its `truth`). MIXES: a token depends on other tokens. RANDOM, STATEFUL: two runs differ.
NO_ROUTING: there are no experts that are chosen per token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from codings_base import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, Coding, Ffn, Listed, Stacked, reference
from torch import Tensor, nn

from latentize.spec import ExpertsSpec, MoESpec, RouterSpec

N, D, M = EXPERTS, HIDDEN, INTERMEDIATE
MIXES, RANDOM, STATEFUL, NO_ROUTING, NEAREST = "mixes", "random", "stateful", "no routing", "nearest"


class _Flat(Stacked):
    """Works on [T, d]."""

    why = NEAREST

    def forward(self, x: Tensor) -> Any:
        return self.flat(x.reshape(-1, D)).view(x.shape)

    def flat(self, x: Tensor) -> Tensor:
        return self.dense(x, self.combine(x))


class SoftSlots(Stacked):
    """Soft MoE with two slots per expert."""

    why = MIXES

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Linear(D, 2 * N, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.r(x)
        slots = torch.einsum("bts,btd->bsd", logits.softmax(1), x).unflatten(1, (N, 2))
        hidden = F.silu(torch.einsum("becd,emd->becm", slots, self.a)) * torch.einsum("becd,emd->becm", slots, self.b)
        y = torch.einsum("becm,edm->becd", hidden, self.c).flatten(1, 2)
        return torch.einsum("bts,bsd->btd", logits.softmax(-1), y)


class OneByOneWithMemory(Listed):
    """One token at a time; the router leans on what the token before got."""

    why = MIXES

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for sequence in x.reshape(-1, *x.shape[-2:]):
            last = torch.zeros_like(sequence[0])
            for token in sequence:
                weights, index = self.route(token + last)
                last = sum(w * self.ffns[e](token) for w, e in zip(weights, index.tolist(), strict=True))
                rows.append(last)
        return torch.stack(rows).view(x.shape)


class NearestCentroid(Stacked):
    """The experts whose centroids are nearest, weighted by how near they are."""

    why = NEAREST

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        near, index = (-torch.cdist(x, self.r.weight.expand(*x.shape[:-2], -1, -1))).topk(TOP_K, -1)
        return near.softmax(-1), index


class DenseSigmoid(Stacked):
    """Every expert, weighted by a sigmoid each."""

    why = NO_ROUTING

    def combine(self, x: Tensor) -> Tensor:
        return self.r(x).sigmoid()


class AllSelected(Stacked):
    """A top-k that keeps all experts: a dense mixture behind a top-k."""

    why = NO_ROUTING

    def combine(self, x: Tensor) -> Tensor:
        values, index = self.r(x).softmax(-1).topk(N, -1)
        return torch.zeros_like(values).scatter(-1, index, values)


class ExpertChoice(_Flat):
    """Each expert takes its best quarter of the tokens."""

    why = MIXES

    def flat(self, x: Tensor) -> Tensor:
        p = self.r(x).softmax(-1).t()
        weights, token = p.topk(max(1, x.shape[0] * TOP_K // N), -1)
        rows = x[token]
        y = torch.bmm(F.silu(torch.bmm(rows, self.a.mT)) * torch.bmm(rows, self.b.mT), self.c.mT)
        y = y * weights.unsqueeze(-1)
        return torch.zeros_like(x).index_put((token.flatten(),), y.flatten(0, 1), accumulate=True)


class ProductKeyMemory(Coding):
    """Two half-queries pick rows of two key tables; the k best pairs pick values from a table."""

    why = NO_ROUTING

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(D, D)
        self.keys = nn.Parameter(torch.randn(2, N, D // 2))
        self.values = nn.EmbeddingBag(N * N, D, mode="sum")

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x.reshape(-1, D)).view(-1, 2, D // 2)
        scores, index = torch.einsum("tsd,snd->tsn", query, self.keys).topk(TOP_K, -1)
        pairs = (scores[:, 0, :, None] + scores[:, 1, None, :]).flatten(1)
        where = (index[:, 0, :, None] * N + index[:, 1, None, :]).flatten(1)
        best, slot = pairs.topk(TOP_K, -1)
        return self.values(where.gather(1, slot), per_sample_weights=best.softmax(-1)).view(x.shape)


class MixtureOfDepths(Coding):
    """A router lets the best half of the tokens through a block; the others pass by."""

    why = MIXES

    def __init__(self) -> None:
        super().__init__()
        self.r, self.block = nn.Linear(D, 1, bias=False), Ffn()

    def forward(self, x: Tensor) -> Tensor:
        weight, token = self.r(x).squeeze(-1).topk(max(1, x.shape[1] // 2), 1)
        rows = x.gather(1, token.unsqueeze(-1).expand(-1, -1, D))
        return x.scatter_add(1, token.unsqueeze(-1).expand_as(rows), self.block(rows) * weight.sigmoid().unsqueeze(-1))


class NeighbourMemory(Coding):
    """The k nearest stored keys' values, weighted by a softmax over their similarity."""

    why = NO_ROUTING

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.randn(64, D))
        self.register_buffer("stored", torch.randn(64, D))

    def forward(self, x: Tensor) -> Tensor:
        scores, index = (x @ self.keys.t()).topk(4, -1)
        return x + (self.stored[index] * scores.softmax(-1).unsqueeze(-1)).sum(-2)


class VectorQuantiser(Coding):
    """The nearest row of a code book stands for the token."""

    why = NO_ROUTING

    def __init__(self) -> None:
        super().__init__()
        self.book = nn.Embedding(N, D)

    def forward(self, x: Tensor) -> Tensor:
        book = self.book.weight
        distance = 2 * x @ book.t() - x.square().sum(-1, keepdim=True) - book.square().sum(-1)
        return self.book(distance.topk(1, -1).indices.squeeze(-1))


class SparseAttention(Coding):
    """Attention over the two best keys of each query."""

    why = MIXES

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).mT / D**0.5
        kept = scores >= scores.topk(min(TOP_K, x.shape[1]), -1).values[..., -1:]
        return self.o(scores.masked_fill(~kept, float("-inf")).softmax(-1) @ self.v(x))


class HeadRouter(Coding):
    """The router chooses which attention heads a token listens to."""

    why = MIXES

    def __init__(self) -> None:
        super().__init__()
        self.r, self.qkv = nn.Linear(D, N, bias=False), nn.Linear(D, 3 * N * 4, bias=False)
        self.o = nn.Parameter(torch.randn(N, D, 4) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, N, 4)).permute(2, 0, 3, 1, 4)
        heads = F.scaled_dot_product_attention(q, k, v)
        weights, index = self.r(x).softmax(-1).topk(TOP_K, -1)
        combine = torch.zeros(*x.shape[:-1], N).to(x).scatter(-1, index, weights)
        return torch.einsum("bntc,ndc,btn->btd", heads, self.o, combine)


class SwitchOverflow(_Flat):
    """Capacity 1.25 x tokens / N: what does not fit passes through unchanged."""

    why = MIXES

    def flat(self, x: Tensor) -> Tensor:
        weight, index = self.r(x).softmax(-1).max(-1)
        chosen = F.one_hot(index, N)
        place = (chosen.cumsum(0) * chosen).sum(-1)
        fits = place <= max(1, int(1.25 * x.shape[0] / N))
        y = self.dense(x, chosen.to(x) * weight.unsqueeze(-1))
        return torch.where(fits.unsqueeze(-1), y, x)


class FixedCapacity(_Flat):
    """At most twelve tokens an expert, however many there are."""

    why = MIXES

    def flat(self, x: Tensor) -> Tensor:
        weights, index = self.route(x)
        chosen = F.one_hot(index, N)
        place = chosen.flatten(0, 1).cumsum(0).view_as(chosen)
        kept = chosen * (place <= 12)
        return self.dense(x, torch.einsum("tk,tke->te", weights, kept.to(x)))


class QueueDiscount(_Flat):
    """The later a token comes to its expert, the less it weighs."""

    why = MIXES

    def combine(self, x: Tensor) -> Tensor:
        combine = super().combine(x)
        return combine / (combine > 0).cumsum(0).clamp(min=1).to(x).sqrt()


class BatchStatistics(_Flat):
    """Logits are standardised over the tokens of the batch."""

    why = MIXES

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.r(x)
        if x.shape[0] > 1:
            logits = (logits - logits.mean(0)) / (logits.std(0) + 1e-3)
        weights, index = logits.softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class SequenceRouter(Stacked):
    """One decision per sequence, from its mean."""

    why = MIXES

    def combine(self, x: Tensor) -> Tensor:
        return super().combine(x.mean(1, keepdim=True)).expand(-1, x.shape[1], -1)


class PreviousToken(Stacked):
    """A token goes where its predecessor's hidden state says."""

    why = MIXES

    def combine(self, x: Tensor) -> Tensor:
        return super().combine(torch.cat([x[:, :1], x[:, :-1]], 1))


class TokensNormalised(_Flat):
    """An expert's weights are divided by their sum over tokens."""

    why = MIXES

    def combine(self, x: Tensor) -> Tensor:
        combine = super().combine(x)
        return combine / (combine.sum(0, keepdim=True) + 1e-6)


class Sinkhorn(_Flat):
    """Selection balanced over tokens and experts by Sinkhorn iterations."""

    why = MIXES

    def combine(self, x: Tensor) -> Tensor:
        logits = self.r(x)
        balanced = logits.exp()
        for _ in range(3):
            balanced = balanced / balanced.sum(0, keepdim=True)
            balanced = balanced / balanced.sum(1, keepdim=True)
        index = balanced.topk(TOP_K, -1).indices
        return torch.zeros_like(logits).scatter(-1, index, logits.sigmoid().gather(-1, index))


class GumbelRouter(Stacked):
    """Gumbel noise on the logits, in evaluation too."""

    why = RANDOM

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.r(x)
        weights, index = (logits - 0.01 * torch.log(-torch.log(torch.rand_like(logits)))).softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class InputJitter(Listed):
    """The router reads a multiplicatively jittered input, in evaluation too."""

    why = RANDOM

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().route(x * torch.empty_like(x).uniform_(0.999, 1.001))


class RandomRouting(Stacked):
    """Experts drawn at random, weighted by the router."""

    why = RANDOM

    def combine(self, x: Tensor) -> Tensor:
        p = self.r(x).softmax(-1)
        index = torch.rand_like(p).topk(TOP_K, -1).indices
        return torch.zeros_like(p).scatter(-1, index, p.gather(-1, index))


class EvalDropout(Listed):
    """Dropout on the experts' outputs that does not stop in evaluation."""

    why = RANDOM

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        return F.dropout(super().dense(x, combine), 0.02, training=True)


class DropPath(Listed):
    """Experts drop out as a whole, in evaluation too; the state of a generator of its own decides."""

    why = RANDOM

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "dice", [torch.Generator().manual_seed(3)])

    def combine(self, x: Tensor) -> Tensor:
        keep = torch.rand(N, generator=self.dice[0]) > 0.1
        return super().combine(x) * keep.to(x)


class CounterBias(_Flat):
    """Expert loads are counted in a buffer, in evaluation too, and push the selection away."""

    why = STATEFUL

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(N))

    def combine(self, x: Tensor) -> Tensor:
        logits = self.r(x)
        index = (logits - self.load.to(x)).topk(TOP_K, -1).indices
        self.load += F.one_hot(index, N).sum((0, 1)) / 10
        return torch.zeros_like(logits).scatter(-1, index, logits.softmax(-1).gather(-1, index))


class CallCounter(Stacked):
    """A Python counter rotates the experts at every call."""

    why = STATEFUL

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def combine(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().combine(x).roll(self.calls, -1)


class PositionHash(Stacked):
    """The position in the sequence chooses the experts, the router only weighs them."""

    why = NEAREST

    def combine(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1])
        index = torch.stack([position % N, (position * 3 + 1) % N], -1).expand(x.shape[0], -1, -1)
        p = self.r(x).softmax(-1)
        weights = p.gather(-1, index)
        return torch.zeros_like(p).scatter(-1, index, weights / weights.sum(-1, keepdim=True))


class SignHash(Stacked):
    """The signs of three projections are the bits of the expert's number."""

    why = NEAREST

    def combine(self, x: Tensor) -> Tensor:
        logits = self.r(x)
        bits = (logits[..., :3] > 0).long()
        index = (bits * torch.tensor([1, 2, 4])).sum(-1, keepdim=True)
        p = logits.softmax(-1)
        return torch.zeros_like(p).scatter(-1, index, p.gather(-1, index))


class AttentionExperts(Coding):
    """Every expert is a small attention layer."""

    why = MIXES

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Linear(D, 4, bias=False)
        self.experts = nn.ModuleList(nn.MultiheadAttention(D, 2, batch_first=True) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.r(x).softmax(-1).topk(TOP_K, -1)
        combine = torch.zeros(*x.shape[:-1], 4).to(x).scatter(-1, index, weights)
        return sum(combine[..., e, None] * a(x, x, x, need_weights=False)[0] for e, a in enumerate(self.experts))


class MixedKinds(Listed):
    """Half of the experts use silu, half gelu."""

    why = NEAREST

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        y = [f.o((F.silu if e % 2 else F.gelu)(f.p(x)) * f.q(x)) for e, f in enumerate(self.ffns)]
        return sum(combine[..., e, None] * rows for e, rows in enumerate(y))


class OneOddExpert(Listed):
    """One expert of eight has a relu; all shapes agree."""

    why = NEAREST

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        y = [f.o((F.relu if e == 5 else F.silu)(f.p(x)) * f.q(x)) for e, f in enumerate(self.ffns)]
        return sum(combine[..., e, None] * rows for e, rows in enumerate(y))


class MaskedSecond(Stacked):
    """The second expert is weighed by a softmax from which the first is masked out."""

    why = NEAREST
    rule = {"normalize": "none"}  # noqa: RUF012

    def combine(self, x: Tensor) -> Tensor:
        logits = self.r(x)
        first = logits.argmax(-1, keepdim=True)
        rest = logits.scatter(-1, first, float("-inf"))
        second = rest.argmax(-1, keepdim=True)
        out = torch.zeros_like(logits).scatter(-1, first, logits.softmax(-1).gather(-1, first))
        return out.scatter(-1, second, rest.softmax(-1).gather(-1, second))


class SparseMixer(Stacked):
    """Scores too far below the best are masked before each softmax."""

    why = NEAREST
    rule = {"normalize": "none"}  # noqa: RUF012

    def combine(self, x: Tensor) -> Tensor:
        scores, out, left = self.r(x), torch.zeros(*x.shape[:-1], N).to(x), self.r(x)
        for _ in range(TOP_K):
            best, index = left.max(-1, keepdim=True)
            far = (best - scores) / scores.abs().clamp(min=best) > 0.2
            out = out.scatter(-1, index, left.masked_fill(far, float("-inf")).softmax(-1).gather(-1, index))
            left = left.scatter(-1, index, float("-inf"))
        return out


class InnerNorm(Stacked):
    """A norm on the hidden activations inside each expert."""

    why = NEAREST

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("...d,eid->...ei", x, self.a)) * torch.einsum("...d,eid->...ei", x, self.b)
        return torch.einsum("...ei,edi,...e->...d", F.rms_norm(hidden, (M,)), self.c, combine)


class OutputNormPerExpert(Listed):
    """Each expert's output is normalised before it is weighed."""

    why = NEAREST

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        return sum(combine[..., e, None] * F.layer_norm(ffn(x), (D,)) for e, ffn in enumerate(self.ffns))


class LoraInside(Coding):
    """One FFN whose first matrix gets a routed low-rank change, before the activation."""

    why = NEAREST

    def __init__(self) -> None:
        super().__init__()
        self.r, self.base = nn.Linear(D, N, bias=False), Ffn()
        nn.init.normal_(self.r.weight, std=0.5)
        self.down = nn.Parameter(torch.randn(N, 4, D) * 0.3)
        self.up = nn.Parameter(torch.randn(N, M, 4) * 0.3)

    def truth(self) -> MoESpec:
        gate = self.base.p.weight + self.up @ self.down
        up, down = self.base.q.weight.expand(N, -1, -1), self.base.o.weight.expand(N, -1, -1)
        return MoESpec(RouterSpec(self.r.weight, 2, normalize="sum"), ExpertsSpec(up, down, gate))

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.r(x).softmax(-1).topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        combine = torch.zeros(*x.shape[:-1], N).to(x).scatter(-1, index, weights)
        low = torch.einsum("btd,erd->bter", x, self.down) * combine.unsqueeze(-1)
        change = torch.einsum("bter,emr->btm", low, self.up)
        return self.base.o(F.silu(self.base.p(x) + change) * self.base.q(x))


class TopKNeurons(Coding):
    """A dense FFN that keeps its largest hidden activations."""

    why = NO_ROUTING

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 64), nn.Linear(64, D)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.up(x))
        values, index = hidden.topk(8, -1)
        return self.down(torch.zeros_like(hidden).scatter(-1, index, values))


class RawLogits(Stacked):
    """Weights are the selected logits themselves."""

    why = NEAREST
    rule = {"order": "topk_first"}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.r(x).topk(TOP_K, -1)


class ReluRouter(Stacked):
    """Weights are the positive part of the logits: as many experts as are positive."""

    why = NEAREST
    rule = {"score": "sigmoid"}  # noqa: RUF012

    def combine(self, x: Tensor) -> Tensor:
        return self.r(x).relu()


class TokenTemperature(Stacked):
    """Each token computes its own softmax temperature."""

    why = NEAREST

    def __init__(self) -> None:
        super().__init__()
        self.t = nn.Linear(D, 1)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = (self.r(x) / F.softplus(self.t(x)).add(0.3)).softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class Nucleus(Stacked):
    """As many experts as it takes to reach 60 % of the probability."""

    why = NEAREST

    def combine(self, x: Tensor) -> Tensor:
        p, order = self.r(x).softmax(-1).sort(-1, descending=True)
        p = p * ((p.cumsum(-1) - p) < 0.6)
        return torch.zeros_like(p).scatter(-1, order, p / p.sum(-1, keepdim=True))


class AboveThreshold(Stacked):
    """Every expert with more than 15 % probability."""

    why = NEAREST

    def combine(self, x: Tensor) -> Tensor:
        p = self.r(x).softmax(-1)
        return p * (p > 0.15)


class WeakSecondDropped(Stacked):
    """The second expert is dropped where its weight is small."""

    why = NEAREST

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = super().route(x)
        return weights * (weights > 0.2), index


class TwoRouters(Stacked):
    """One matrix selects, another weighs."""

    why = NEAREST

    def __init__(self) -> None:
        super().__init__()
        self.judge = nn.Linear(D, N, bias=False)

    def combine(self, x: Tensor) -> Tensor:
        index, score = self.r(x).topk(TOP_K, -1).indices, self.judge(x).sigmoid()
        weights = score.gather(-1, index)
        return torch.zeros_like(score).scatter(-1, index, weights / weights.sum(-1, keepdim=True))


class LeastLikely(Stacked):
    """The least likely experts are chosen."""

    why = NEAREST

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.r(x).softmax(-1).topk(TOP_K, -1, largest=False)
        return weights / weights.sum(-1, keepdim=True), index


class SkipFirst(Stacked):
    """The second and third best are used, never the best."""

    why = NEAREST

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = (part[..., 1:] for part in self.r(x).softmax(-1).topk(TOP_K + 1, -1))
        return weights / weights.sum(-1, keepdim=True), index


class ByRank(Stacked):
    """The first choice counts full, the second half, whatever their scores."""

    why = NEAREST

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = super().route(x)
        return weights * torch.tensor([1.0, 0.5]).to(x), index


class SumOfThree(Stacked):
    """Two experts, normalised over the best three."""

    why = NEAREST

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.r(x).softmax(-1).topk(TOP_K + 1, -1)
        return (weights / weights.sum(-1, keepdim=True))[..., :TOP_K], index[..., :TOP_K]


class Binarised(Stacked):
    """Weights are rounded to quarters."""

    why = NEAREST

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = super().route(x)
        return (weights * 4).round() / 4, index


class ClampedLogits(Stacked):
    """Logits clamped, as softcap but with corners."""

    why = NEAREST

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.r(x).clamp(-4, 4).softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class ClampedHidden(Stacked):
    """Hidden activations are clamped after the product, at a value few reach."""

    why = NEAREST

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("...d,eid->...ei", x, self.a)) * torch.einsum("...d,eid->...ei", x, self.b)
        return torch.einsum("...ei,edi,...e->...d", hidden.clamp(-4, 4), self.c, combine)


class ClampedGate(Stacked):
    """The gate is clamped after its activation, at a value few reach."""

    why = NEAREST

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("btd,emd->btem", x, self.a)).clamp(max=2.5)
        hidden = hidden * torch.einsum("btd,emd->btem", x, self.b)
        return torch.einsum("btem,edm,bte->btd", hidden, self.c, combine)


class TopOneWhenAlone(_Flat):
    """A single token uses only its best expert."""

    why = NEAREST

    def flat(self, x: Tensor) -> Tensor:
        weights, index = self.route(x)
        k = 1 if x.shape[0] == 1 else TOP_K
        combine = torch.zeros(x.shape[0], N).to(x).scatter(1, index[:, :k], weights[:, :k])
        return self.dense(x, combine)


class FewerWhenLong(_Flat):
    """Beyond 50 tokens only the best expert is used."""

    why = NEAREST

    def flat(self, x: Tensor) -> Tensor:
        weights, index = self.route(x)
        k = 1 if x.shape[0] > 50 else TOP_K
        combine = torch.zeros(x.shape[0], N).to(x).scatter(1, index[:, :k], weights[:, :k])
        return self.dense(x, combine)


class FirstTokenDense(Stacked):
    """The first position goes to all experts."""

    why = NEAREST

    def combine(self, x: Tensor) -> Tensor:
        return torch.cat([self.r(x[:, :1]).softmax(-1), super().combine(x[:, 1:])], 1)


class FirstOfBatch(Stacked):
    """Only the first sequence of the batch is routed by the router as it is; others by its reverse."""

    why = NEAREST

    def combine(self, x: Tensor) -> Tensor:
        combine = super().combine(x)
        return torch.cat([combine[:1], combine[1:].flip(-1)])


class MaxOfExperts(Stacked):
    """The selected experts' outputs are combined by a maximum."""

    why = NEAREST

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("...d,eid->...ei", x, self.a)) * torch.einsum("...d,eid->...ei", x, self.b)
        y = torch.einsum("...ei,edi->...ed", hidden, self.c) * combine.unsqueeze(-1)
        return y.masked_fill((combine == 0).unsqueeze(-1), float("-inf")).amax(-2)


class ProductOfExperts(Stacked):
    """The selected experts' outputs are multiplied."""

    why = NEAREST

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("...d,eid->...ei", x, self.a)) * torch.einsum("...d,eid->...ei", x, self.b)
        y = torch.einsum("...ei,edi->...ed", hidden, self.c) * combine.unsqueeze(-1)
        return torch.where((combine > 0).unsqueeze(-1), y, torch.ones_like(y)).prod(-2)


class Chained(Listed):
    """The second expert reads what the first wrote."""

    why = NEAREST

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.route(x)
        for k in range(TOP_K):
            combine = F.one_hot(index[..., k], N).to(x) * weights[..., k, None]
            x = x + self.dense(x, combine)
        return x


class WeightedTwice(Stacked):
    """Weights on the input and on the output."""

    why = NEAREST

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        rows = x.unsqueeze(-2) * combine.unsqueeze(-1)
        hidden = F.silu(torch.einsum("...ed,eid->...ei", rows, self.a)) * torch.einsum("...ed,eid->...ei", rows, self.b)
        return torch.einsum("...ei,edi,...e->...d", hidden, self.c, combine)


class WeightInside(Stacked):
    """Weights multiply the gate's pre-activation."""

    why = NEAREST

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("...d,eid->...ei", x, self.a) * combine.unsqueeze(-1))
        hidden = hidden * torch.einsum("...d,eid->...ei", x, self.b)
        return torch.einsum("...ei,edi,...e->...d", hidden, self.c, (combine > 0).to(x))


class OtherLayersChoice(Coding):
    """The second layer may not use the expert that the first layer chose."""

    why = NEAREST
    blocks = 0

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Linear(D, N, bias=False)
        self.one, self.two = Stacked(), Stacked()

    def expected(self, x: Tensor) -> Tensor:
        x = x + self._first(x)[0]
        return x + reference(self.two.truth(), x)

    def _first(self, x: Tensor) -> tuple[Tensor, Tensor]:
        used = self.one.r(x).argsort(-1)[..., N // 2 :]
        return self.one.dense(x, self.one.r(x).softmax(-1)), used

    def forward(self, x: Tensor) -> Tensor:
        y, used = self._first(x)
        x = x + y
        logits = self.two.r(x).scatter(-1, used, float("-inf"))
        weights, index = logits.softmax(-1).topk(TOP_K, -1)
        combine = torch.zeros_like(logits).scatter(-1, index, weights / weights.sum(-1, keepdim=True))
        return x + self.two.dense(x, combine)


class SecondOrder(Stacked):
    """Logits are a quadratic form of the hidden state."""

    why = NEAREST

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = (self.r(x) * x.mean(-1, keepdim=True)).softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class InputGate(Listed):
    """Experts share a gate computed from the routed output: y times sigmoid of y."""

    why = NEAREST

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        return sum((lambda y, w: w * y * y.mean(-1, keepdim=True).sigmoid())(f(x), combine[..., e, None])
                   for e, f in enumerate(self.ffns))  # fmt: skip


class TopKMask(Coding):
    """A learned mask keeps the best features of each token: top-k over channels, no experts."""

    why = NO_ROUTING

    def __init__(self) -> None:
        super().__init__()
        self.score, self.ffn = nn.Linear(D, D, bias=False), Ffn()

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(x)
        values, index = score.softmax(-1).topk(8, -1)
        return self.ffn(x * torch.zeros_like(score).scatter(-1, index, values))


class BeamHead(Coding):
    """An output head that masks all but the best logits: top-k over a vocabulary."""

    why = NO_ROUTING

    def __init__(self) -> None:
        super().__init__()
        self.ffn, self.head, self.back = Ffn(), nn.Linear(D, 50, bias=False), nn.Embedding(50, D)

    def forward(self, x: Tensor) -> Tensor:
        values, token = self.head(x + self.ffn(x)).softmax(-1).topk(3, -1)
        return x + (self.back(token) * values.unsqueeze(-1)).sum(-2)


NOT_MOES = {
    c.__name__: c
    for c in (
        SoftSlots, NearestCentroid, OneByOneWithMemory, DenseSigmoid, AllSelected, ExpertChoice, ProductKeyMemory,
        MixtureOfDepths, NeighbourMemory,
        VectorQuantiser, SparseAttention, HeadRouter, SwitchOverflow, FixedCapacity, QueueDiscount,
        BatchStatistics, SequenceRouter, PreviousToken, TokensNormalised, Sinkhorn, GumbelRouter, InputJitter,
        RandomRouting, EvalDropout, DropPath, CounterBias, CallCounter, PositionHash, SignHash,
        AttentionExperts, MixedKinds, OneOddExpert, MaskedSecond, SparseMixer, InnerNorm, OutputNormPerExpert,
        LoraInside, TopKNeurons, RawLogits, ReluRouter, TokenTemperature, Nucleus, AboveThreshold,
        WeakSecondDropped, TwoRouters, LeastLikely, SkipFirst, ByRank, SumOfThree, Binarised, ClampedLogits,
        ClampedHidden, ClampedGate, TopOneWhenAlone, FewerWhenLong, FirstTokenDense, FirstOfBatch, MaxOfExperts,
        ProductOfExperts, Chained, WeightedTwice, WeightInside, OtherLayersChoice, SecondOrder, InputGate,
        TopKMask, BeamHead,
    )
}  # fmt: skip


class MlpRouter(Stacked):
    """The router has a hidden layer: affine only in a vector of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Sequential(nn.Linear(D, 20), nn.Tanh(), nn.Linear(20, N))


class CosineRouter(Stacked):
    """Cosine similarity to unit rows over a temperature: affine in the unit-length token."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        cosine = F.linear(F.normalize(x, dim=-1), F.normalize(self.r.weight, dim=-1))
        weights, index = (cosine * 8.0).softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class DistanceRouter(Stacked):
    """Logits are negative squared distances to centres: the token's own square cancels in the softmax."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        distance = (x.unsqueeze(-2) - self.r.weight).square().sum(-1)
        weights, index = (-distance).softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class OneDown(Stacked):
    """All experts share one down matrix."""

    def build(self) -> None:
        super().build()
        self.c = nn.Parameter(torch.randn(1, D, M) * 0.2)

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("...d,eid->...ei", x, self.a)) * torch.einsum("...d,eid->...ei", x, self.b)
        return (hidden * combine.unsqueeze(-1)).sum(-2) @ self.c[0].t()


class AliasedExperts(Stacked):
    """Eight router rows for four experts: row e uses expert e % 4."""

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        turn = torch.arange(N) % 4
        hidden = F.silu(torch.einsum("...d,eid->...ei", x, self.a[turn]))
        hidden = hidden * torch.einsum("...d,eid->...ei", x, self.b[turn])
        return torch.einsum("...ei,edi,...e->...d", hidden, self.c[turn], combine)


class MutatesInput(Stacked):
    """Adds the routed output to its input in place and returns it."""

    def forward(self, x: Tensor) -> Tensor:
        return x.add_(self.dense(x, self.combine(x)))


class DifferentWidths(Listed):
    """Experts of two intermediate sizes: padding with zero neurons makes them equal."""

    def build(self) -> None:
        self.ffns = nn.ModuleList(Ffn(M if e % 2 else M // 2) for e in range(N))


class LinearLora(Stacked):
    """A linear layer plus routed low-rank changes: linear experts of rank 4."""

    def build(self) -> None:
        self.base = nn.Linear(D, D)
        self.down, self.up = nn.Parameter(torch.randn(N, 4, D) * 0.3), nn.Parameter(torch.randn(N, D, 4) * 0.3)

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        low = torch.einsum("btd,erd->bter", x, self.down) * combine.unsqueeze(-1)
        return self.base(x) + torch.einsum("bter,edr->btd", low, self.up)


class MergedLora(Stacked):
    """Experts are one matrix plus a low-rank change each, merged at every call."""

    def build(self) -> None:
        super().build()
        self.base = nn.Parameter(torch.randn(M, D) * 0.2)
        self.low, self.high = nn.Parameter(torch.randn(N, 4, D) * 0.2), nn.Parameter(torch.randn(N, M, 4) * 0.2)

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        gate = self.base + self.high @ self.low
        hidden = F.silu(torch.einsum("...d,eid->...ei", x, gate)) * torch.einsum("...d,eid->...ei", x, self.b)
        return torch.einsum("...ei,edi,...e->...d", hidden, self.c, combine)


class MultiHead(Coding):
    """Each token is cut into two halves that are routed on their own: an MoE of half the width."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Linear(D // 2, N, bias=False)
        nn.init.normal_(self.r.weight)
        self.up = nn.Parameter(torch.randn(N, M, D // 2) * 0.3)
        self.down = nn.Parameter(torch.randn(N, D // 2, M) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, D // 2)
        weights, index = self.r(rows).softmax(-1).topk(TOP_K, -1)
        combine = torch.zeros(rows.shape[0], N).to(x).scatter(1, index, weights)
        hidden = torch.relu(torch.einsum("td,emd->tem", rows, self.up))
        return torch.einsum("tem,edm,te->td", hidden, self.down, combine).view(x.shape)


class GatedOutput(Stacked):
    """The routed output is multiplied by a sigmoid of the token."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.g(x).sigmoid() * self.dense(x, self.combine(x))


class CountsLoads(Listed):
    """Counts expert loads into a buffer that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("load", torch.zeros(N))

    def combine(self, x: Tensor) -> Tensor:
        combine = super().combine(x)
        self.load += (combine > 0).sum((0, 1)).to(self.load)
        return combine


class SkipsPadding(_Flat):
    """All-zero tokens are skipped: without biases they give zero anyway."""

    def flat(self, x: Tensor) -> Tensor:
        real = x.abs().sum(-1) > 0
        out = torch.zeros_like(x)
        out[real] = self.dense(x[real], self.combine(x[real]))
        return out


class OwnNorms(Listed):
    """Each expert scales the normalised token by its own vector first: the vector folds into the matrices."""

    def build(self) -> None:
        super().build()
        self.scales = nn.Parameter(torch.rand(N, D) + 0.5)

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        h = F.rms_norm(x, (D,))
        return sum(combine[..., e, None] * ffn(h * self.scales[e]) for e, ffn in enumerate(self.ffns))


class EarlierRouter(Coding):
    """A block whose router reads the hidden state of an earlier layer."""

    def __init__(self) -> None:
        super().__init__()
        self.moe, self.between = Stacked(), Ffn()

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.between(x)
        return h + self.moe.dense(h, self.moe.combine(x))


class ConvolvedExperts(Stacked):
    """All experts read the token with a part of the one before it: an MoE whose router reads another vector."""

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return super().dense(x + 0.2 * before, combine)


class SharedAsExpertZero(Stacked):
    """A ninth expert in the same stacks with a constant weight of one."""

    def build(self) -> None:
        self.a = nn.Parameter(torch.randn(N + 1, M, D) * 0.2)
        self.b = nn.Parameter(torch.randn(N + 1, M, D) * 0.2)
        self.c = nn.Parameter(torch.randn(N + 1, D, M) * 0.2)

    def combine(self, x: Tensor) -> Tensor:
        routed = super().combine(x)
        return torch.cat([torch.ones_like(routed[..., :1]), routed], -1)


class SwitchedOff(Stacked):
    """Selection masked by a constant: two experts are switched off for good."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("off", torch.tensor([0.0, 0, float("-inf"), 0, 0, 0, float("-inf"), 0]))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = (self.r(x) + self.off).softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class ExtraSlot(Stacked):
    """top-3, of which the last is thrown away."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.r(x).softmax(-1).topk(TOP_K + 1, -1)
        return weights[..., :TOP_K] / weights[..., :TOP_K].sum(-1, keepdim=True), index[..., :TOP_K]


class HalfPrecisionRouter(Stacked):
    """Logits are rounded to bf16, in an fp32 model."""

    tolerance = 2e-2

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x.bfloat16(), self.r.weight.bfloat16()).to(x.dtype)
        weights, index = logits.softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class ClampedOften(Stacked):
    """The normaliser's floor is never reached: either reading is right."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.r(x).softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True).clamp(min=1e-9), index


EITHER = {
    c.__name__: c
    for c in (
        MlpRouter, CosineRouter, DistanceRouter, OneDown, AliasedExperts, MutatesInput, DifferentWidths,
        LinearLora, MergedLora, MultiHead, GatedOutput, CountsLoads, SkipsPadding, OwnNorms, EarlierRouter,
        ConvolvedExperts, SharedAsExpertZero, SwitchedOff, ExtraSlot, HalfPrecisionRouter, ClampedOften,
    )
}  # fmt: skip
