"""Codings as others write them, in storage and words of their own, and look-alikes that fail on rare inputs only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from codings_base import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, Ffn, Listed, Stacked, reference
from codings_refused import MIXES, NEAREST, RANDOM, STATEFUL
from torch import Tensor, nn

from latentize.activations import Activation
from latentize.spec import ExpertsSpec, Groups, MoESpec, RouterSpec

N, D, M = EXPERTS, HIDDEN, INTERMEDIATE


def _scatter(p: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros_like(p).scatter(-1, index, weights)


class ParameterDictExperts(Stacked):
    """Experts' matrices in a ParameterDict under names of their own, in another order than the experts'."""

    def build(self) -> None:
        names = [f"{part}_{e}" for e in (5, 2, 7, 0, 1, 6, 3, 4) for part in ("win", "wout", "wgate")]
        shapes = {"win": (D, M), "wout": (M, D), "wgate": (D, M)}
        self.p = nn.ParameterDict({n: nn.Parameter(torch.randn(shapes[n.split("_")[0]]) * 0.2) for n in names})

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.stack([self.p[f"{part}_{e}"].t() for e in range(N)]) for part in ("wgate", "win", "wout"))

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(N):
            inner = F.silu(x @ self.p[f"wgate_{e}"]) * (x @ self.p[f"win_{e}"])
            out = out + (inner @ self.p[f"wout_{e}"]) * combine[..., e : e + 1]
        return out


class OneEinsum(Stacked):
    """Single einsums with many letters, batch and tokens apart, the combination inside the last."""

    def forward(self, x: Tensor) -> Tensor:
        c = self.combine(x)
        g = torch.einsum("bld,nfd,bln->nblf", x, self.a, (c != 0).to(x))
        u = torch.einsum("bld,nfd->nblf", x, self.b)
        return torch.einsum("nblf,nblf,ndf,bln->bld", F.silu(g), u, self.c, c)


class GroupedConv(Stacked):
    """Grouped one-dimensional convolutions over the sequence, all experts side by side."""

    def build(self) -> None:
        self.inner = nn.Conv1d(N * D, 2 * N * M, 1, groups=N, bias=False)
        self.outer = nn.Conv1d(N * M, N * D, 1, groups=N, bias=False)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        both = self.inner.weight.view(N, 2, M, D)
        return both[:, 0], both[:, 1], self.outer.weight.view(N, D, M)

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        wide = self.inner(x.transpose(1, 2).repeat(1, N, 1)).unflatten(1, (N, 2, M))
        y = self.outer((F.silu(wide[:, :, 0]) * wide[:, :, 1]).flatten(1, 2)).unflatten(1, (N, D))
        return (y * combine.permute(0, 2, 1).unsqueeze(2)).sum(1).transpose(1, 2)


class TableExperts(Stacked):
    """Every expert's weights are one row of an embedding table, looked up for each choice."""

    def build(self) -> None:
        self.table = nn.Embedding(N, 3 * M * D)
        nn.init.normal_(self.table.weight, std=0.2)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = self.table.weight.split(M * D, 1)
        return gate.view(N, M, D), up.view(N, M, D), down.view(N, D, M)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, index = self.route(flat)
        gate, up, down = self.table(index).split(M * D, -1)
        gate, up, down = gate.unflatten(-1, (M, D)), up.unflatten(-1, (M, D)), down.unflatten(-1, (D, M))
        inner = F.silu((gate @ flat[:, None, :, None]).squeeze(-1)) * (up @ flat[:, None, :, None]).squeeze(-1)
        return ((down @ inner.unsqueeze(-1)).squeeze(-1) * weights.unsqueeze(-1)).sum(1).view_as(x)


class JitterInTraining(Listed):
    """Router input jitter and logit noise, in training only."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        seen = x * torch.empty_like(x).uniform_(0.98, 1.02) if self.training else x
        logits = self.r(seen)
        if self.training:
            logits = logits + torch.randn_like(logits)
        weights, index = logits.softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class NormaliseAllFirst(Stacked):
    """Sigmoid scores divided by their sum over all experts before the selection, renormalised after it."""

    rule = {"score": "sigmoid", "normalize": "sum"}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.r(x).sigmoid()
        weights, index = (p / p.sum(-1, keepdim=True)).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class GroupLimitedSoftmax(Stacked):
    """Two of four groups by their best, by an additive mask of -inf."""

    rule = {"normalize": "none", "scale": 4.0, "groups": Groups(4, 2, "max", "-inf")}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.r(x).softmax(-1)
        kept = p.view(*p.shape[:-1], 4, 2).max(-1).values.topk(2, -1).indices
        mask = torch.full((*p.shape[:-1], 4), float("-inf"), dtype=p.dtype).scatter(-1, kept, 0.0)
        index = (p + mask.repeat_interleave(2, -1)).topk(TOP_K, -1).indices
        return p.gather(-1, index) * 4.0, index


class AmpleCapacity(Stacked):
    """Top-1 with a capacity of all tokens: nothing can overflow."""

    rule, top_k = {"normalize": "none"}, 1

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        p = self.r(flat).softmax(-1)
        weight, index = p.max(-1)
        one_hot = F.one_hot(index, N).to(flat)
        place = ((one_hot.cumsum(0) - 1) * one_hot).sum(-1).long()
        slots = F.one_hot(place, flat.shape[0]).to(flat)
        dispatch = one_hot.unsqueeze(-1) * slots.unsqueeze(1)
        rows = torch.einsum("tec,td->ecd", dispatch, flat)
        y = torch.bmm(F.silu(torch.bmm(rows, self.a.mT)) * torch.bmm(rows, self.b.mT), self.c.mT)
        return torch.einsum("tec,ecd->td", dispatch * weight[:, None, None], y).view_as(x)


class NegativeLogits(Stacked):
    """The smallest energies win: softmax of the negated product."""

    def router_weight(self) -> Tensor:
        return -self.r.weight

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = F.softmin(self.r(x), -1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class ScaledEmbedding(Stacked):
    """The router divides its product by the root of the width and adds a bias afterwards."""

    rule = {"normalize": "none"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(N))

    def router_weight(self) -> Tensor:
        return self.r.weight / D**0.5

    def truth(self) -> MoESpec:
        return MoESpec(
            RouterSpec(self.router_weight(), self.top_k, self.shift), ExpertsSpec(self.b, self.c, self.a)
        )  # fmt: skip

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (self.r(x) / D**0.5 + self.shift).softmax(-1).topk(TOP_K, -1)


class LogSpace(Stacked):
    """Weights as exponentials of log-probabilities minus their log-sum over the selected."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, index = self.r(x).log_softmax(-1).topk(TOP_K, -1)
        return (values - values.logsumexp(-1, keepdim=True)).exp(), index


class TakeAlong(Stacked):
    """All experts first, then take_along_dim picks the chosen ones' outputs."""

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.route(x)
        hidden = F.silu(torch.einsum("btd,emd->btem", x, self.a)) * torch.einsum("btd,emd->btem", x, self.b)
        y = torch.einsum("btem,edm->bted", hidden, self.c)
        return (torch.take_along_dim(y, index.unsqueeze(-1), 2) * weights.unsqueeze(-1)).sum(2)


class FusedUpGate(Stacked):
    """One matrix [N, 2m, d] with up before gate, halves by chunk, stored transposed."""

    def build(self) -> None:
        self.inner = nn.Parameter(torch.randn(N, D, 2 * M) * 0.2)
        self.outer = nn.Parameter(torch.randn(N, M, D) * 0.2)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.inner[..., M:].mT, self.inner[..., :M].mT, self.outer.mT

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        up, gate = torch.einsum("btd,edm->btem", x, self.inner).chunk(2, -1)
        return torch.einsum("btem,emd,bte->btd", up * F.silu(gate), self.outer, combine)


class SumProductRouter(Stacked):
    """The router's product is written as a sum of elementwise products."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = (x.unsqueeze(-2) * self.r.weight).sum(-1)
        weights, index = logits.softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class SplitRouter(Stacked):
    """The router's rows live in two matrices whose logits are concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.r2 = nn.Linear(D, N // 2, bias=False)
        self.r = nn.Linear(D, N // 2, bias=False)
        for r in (self.r, self.r2):
            nn.init.normal_(r.weight, std=0.5)

    def router_weight(self) -> Tensor:
        return torch.cat([self.r.weight, self.r2.weight])

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = torch.cat([self.r(x), self.r2(x)], -1).softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class BiasedFused(Stacked):
    """gpt-oss style: interleaved gate and up with biases, clamped, alpha, up + 1; router with a bias, top-k first."""

    rule = {"order": "topk_first"}  # noqa: RUF012
    loud = 4.0

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Linear(D, N)
        nn.init.normal_(self.r.weight, std=0.5)

    def build(self) -> None:
        self.inner = nn.Parameter(torch.randn(N, D, 2 * M) * 0.2)
        self.inner_bias = nn.Parameter(torch.randn(N, 2 * M) * 0.3)
        self.outer = nn.Parameter(torch.randn(N, M, D) * 0.2)
        self.outer_bias = nn.Parameter(torch.randn(N, D) * 0.3)

    def truth(self) -> MoESpec:
        router = RouterSpec(self.r.weight, TOP_K, self.r.bias, order="topk_first")
        glu = Activation("silu", 1.702, None, 7.0, -7.0, 7.0, 1.0)
        gate, up = self.inner[..., ::2].mT, self.inner[..., 1::2].mT
        biases = self.inner_bias[:, ::2], self.inner_bias[:, 1::2], self.outer_bias
        return MoESpec(router, ExpertsSpec(up, self.outer.mT, gate, *biases, activation=glu))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        values, index = self.r(flat).topk(TOP_K, -1)
        combine = _scatter(self.r(flat), index, values.softmax(-1))
        wide = torch.bmm(flat.expand(N, -1, -1), self.inner) + self.inner_bias.unsqueeze(1)
        gate, up = wide[..., ::2].clamp(max=7.0), wide[..., 1::2].clamp(-7.0, 7.0)
        y = torch.bmm((up + 1) * gate * torch.sigmoid(gate * 1.702), self.outer) + self.outer_bias.unsqueeze(1)
        return (y * combine.t().unsqueeze(-1)).sum(0).view_as(x)


class NestedTuple(Listed):
    """Takes and returns a tuple with a state that passes through."""

    @staticmethod
    def arguments(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return ((x, {"step": 3}),), {}

    def forward(self, pair: Any) -> Any:
        x, state = pair
        return self.dense(x, self.combine(x)), state


class HalvedPrecisionRouterWeights(Stacked):
    """The router's weight is a buffer in double precision; logits are cast back."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("rows", torch.randn(N, D, dtype=torch.float64) * 0.5)

    def router_weight(self) -> Tensor:
        return self.rows.to(self.a.dtype)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = (x.double() @ self.rows.double().t()).to(x.dtype).softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class TiedUpDown(Stacked):
    """Each expert's down matrix is its up matrix transposed."""

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.a, self.b, self.b.mT

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("btd,eid->btei", x, self.a)) * torch.einsum("btd,eid->btei", x, self.b)
        return torch.einsum("btei,eid,bte->btd", hidden, self.b, combine)


class AddedShared(Listed):
    """A shared expert and the routed ones are averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.always = Ffn()

    def expected(self, x: Tensor) -> Tensor:
        return (reference(self.truth(), x) + self.always(x)) / 2**0.5

    def forward(self, x: Tensor) -> Tensor:
        return (self.dense(x, self.combine(x)) + self.always(x)) / 2**0.5


MOES = {
    c.__name__: c
    for c in (
        ParameterDictExperts, OneEinsum, GroupedConv, TableExperts, JitterInTraining, NormaliseAllFirst,
        GroupLimitedSoftmax, AmpleCapacity, NegativeLogits, ScaledEmbedding, LogSpace, TakeAlong, FusedUpGate,
        SumProductRouter, SplitRouter, BiasedFused, NestedTuple, HalvedPrecisionRouterWeights, TiedUpDown, AddedShared,
    )
}  # fmt: skip


class MaskedByPadding(Stacked):
    """Routing weights of all-zero tokens are zero, and experts have biases."""

    why = NEAREST

    def __init__(self) -> None:
        super().__init__()
        self.c_bias = nn.Parameter(torch.randn(N, D))

    def truth(self) -> MoESpec:
        spec = super().truth()
        return replace(spec, experts=replace(spec.experts, down_bias=self.c_bias))

    def forward(self, x: Tensor) -> Tensor:
        combine = self.combine(x) * (x.abs().sum(-1, keepdim=True) > 0)
        return self.dense(x, combine) + combine @ self.c_bias


class EntropyGate(Stacked):
    """Tokens whose probabilities are nearly even use one expert only."""

    why = NEAREST
    loud = 0.1

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.r(x).softmax(-1)
        weights, index = p.topk(TOP_K, -1)
        even = p.max(-1, keepdim=True).values < 0.2
        weights = torch.where(even & (torch.arange(TOP_K) > 0), torch.zeros_like(weights), weights)
        return weights / weights.sum(-1, keepdim=True), index


class RunningMean(Stacked):
    """Weights are divided by the mean weight of the tokens so far."""

    why = MIXES

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.r(x).softmax(-1).topk(TOP_K, -1)
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype).view(1, -1, 1)
        return weights / (weights.cumsum(1) / count), index


class SequenceMean(Stacked):
    """The mean of the sequence is added to what the router reads."""

    why = MIXES

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().route(x + x.mean(1, keepdim=True))


class LengthTemperature(Stacked):
    """The temperature grows with the sequence's length."""

    why = NEAREST

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (self.r(x) / (1 + 0.01 * x.shape[1])).softmax(-1).topk(TOP_K, -1)


class PositionBias(Stacked):
    """Experts add a bias for the token's position."""

    why = NEAREST

    def __init__(self) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(512, M))

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        gate = torch.einsum("btd,eid->btei", x, self.a) + self.place[: x.shape[1]].unsqueeze(1)
        hidden = F.silu(gate) * torch.einsum("btd,eid->btei", x, self.b)
        return torch.einsum("btei,edi,bte->btd", hidden, self.c, combine)


class BatchCapacity(Stacked):
    """A little more than the even share of tokens fits an expert, and at least forty."""

    why = MIXES

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        combine = self.combine(flat)
        room = max(40, 11 * flat.shape[0] * TOP_K // (10 * N))
        return self.dense(flat, combine * ((combine > 0).cumsum(0) <= room)).view(x.shape)


class LoadPenalty(Stacked):
    """Experts that many tokens of the batch chose count less."""

    why = MIXES

    def combine(self, x: Tensor) -> Tensor:
        c = super().combine(x)
        load = (c > 0).to(x).mean((0, 1), keepdim=True)
        return c * (1 - load)


class RememberedTokens(Stacked):
    """A buffer keeps the last token seen and adds it to the router's input."""

    why = STATEFUL

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(D))

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = super().route(x + self.last.to(x))
        self.last.copy_(x.reshape(-1, D)[-1])
        return found


class SoftThreshold(Stacked):
    """Selected weights are shrunk by a constant and cut at zero."""

    why = NEAREST

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.r(x).softmax(-1).topk(TOP_K, -1)
        return (weights - 0.05).clamp(min=0), index


class RoundedWeights(Stacked):
    """Weights are rounded to 1/1024."""

    why = NEAREST

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = super().route(x)
        return (weights * 1024).round() / 1024, index


class TieToFirst(Stacked):
    """Scores closer than 0.05 count as equal, and the lower number wins."""

    why = NEAREST

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.r(x).softmax(-1)
        index = ((p / 0.05).floor() - 1e-3 * torch.arange(N).to(x)).topk(TOP_K, -1).indices
        weights = p.gather(-1, index)
        return weights / weights.sum(-1, keepdim=True), index


class SquaredScores(Stacked):
    """Squared probabilities, renormalised with an epsilon that shows."""

    why = NEAREST

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.r(x).softmax(-1).pow(2).topk(TOP_K, -1)
        return weights / (weights.sum(-1, keepdim=True) + 0.1), index


class SecondLayerSkip(Listed):
    """The output of the weaker expert also passes through the stronger one."""

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        index = self.route(x)[1]
        out = super().dense(x, combine)
        best = torch.stack([f(out) for f in self.ffns], -2).take_along_dim(index[..., :1, None], -2).squeeze(-2)
        return out + 0.01 * best


class CrossTalk(Stacked):
    """A product of the two selected outputs is added, weakly."""

    why = NEAREST

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.route(x)
        hidden = F.silu(torch.einsum("btd,emd->btem", x, self.a)) * torch.einsum("btd,emd->btem", x, self.b)
        y = torch.einsum("btem,edm->bted", hidden, self.c).take_along_dim(index.unsqueeze(-1), 2)
        return (y * weights.unsqueeze(-1)).sum(2) + 1e-3 * y.prod(2)


class FarTokensDense(Stacked):
    """Beyond position 500 every expert is used."""

    why = NEAREST

    def combine(self, x: Tensor) -> Tensor:
        p = self.r(x).softmax(-1)
        far = torch.arange(x.shape[1]).view(1, -1, 1) > 20
        return torch.where(far, p, super().combine(x))


class NormedWeightsAcrossTokens(Stacked):
    """Weights are divided by their root mean square over the batch."""

    why = MIXES

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = super().route(x)
        return weights / weights.square().mean().sqrt(), index


class EvalNoiseSmall(Stacked):
    """Noise of one part in ten thousand on the logits."""

    why = RANDOM

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.r(x)
        weights, index = (logits + 1e-4 * torch.randn_like(logits)).softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class BigTokensClipped(Stacked):
    """Hidden states are clipped at three times their usual size before the experts, not before the router."""

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        return super().dense(x.clamp(-12.0, 12.0), combine)


class PerSequenceTopK(Stacked):
    """Every sequence of the batch uses the four experts that it likes best on the whole."""

    why = MIXES

    def combine(self, x: Tensor) -> Tensor:
        p = self.r(x).softmax(-1)
        liked = torch.zeros_like(p[:, 0]).scatter(1, p.mean(1).topk(4, -1).indices, 1.0).unsqueeze(1)
        weights, index = (p * liked).topk(TOP_K, -1)
        return _scatter(p, index, weights / weights.sum(-1, keepdim=True))


class MostlyRouted(Stacked):
    """Every expert contributes a thousandth of its probability, selected or not."""

    why = NEAREST

    def combine(self, x: Tensor) -> Tensor:
        return super().combine(x) + 1e-3 * self.r(x).softmax(-1)


class NegativeTokens(Stacked):
    """Tokens of which every value is negative swap their weights."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = super().route(x)
        return torch.where((x < 0).all(-1, keepdim=True), weights.flip(-1), weights), index


class NormCut(Stacked):
    """Experts read zero in place of tokens that are too loud."""

    why = NEAREST
    loud = 4.0

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        return super().dense(x * (x.norm(dim=-1, keepdim=True) < 14).to(x), combine)


class ManySequences(Stacked):
    """Batches of eight and more swap their weights."""

    def combine(self, x: Tensor) -> Tensor:
        weights, index = self.route(x)
        return _scatter(self.r(x), index, weights.flip(-1) if x.shape[0] >= 8 else weights)


NOT_MOES = {
    c.__name__: c
    for c in (
        NormCut, MaskedByPadding, EntropyGate, RunningMean, SequenceMean, LengthTemperature, PositionBias,
        BatchCapacity,
        LoadPenalty, RememberedTokens, SoftThreshold, RoundedWeights, TieToFirst, SquaredScores,
        CrossTalk, FarTokensDense, NormedWeightsAcrossTokens, EvalNoiseSmall, PerSequenceTopK, MostlyRouted,
    )
}  # fmt: skip

#: Differ from a standard MoE on inputs that no random draw would hit; refused all the same.
RARE = {c.__name__: c for c in (NegativeTokens, ManySequences)}
#: Lifted exactly with what is around it, or refused.
EITHER = {c.__name__: c for c in (BigTokensClipped, SecondLayerSkip)}
