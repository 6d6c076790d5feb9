"""One expert storage (stacks, every expert on every token or gathered), routing functions written in every way."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from codings_base import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, Stacked, reference
from torch import Tensor, nn

from latentize.spec import Groups

N, D, M = EXPERTS, HIDDEN, INTERMEDIATE


class KthThreshold(Stacked):
    """Everything at or above the k-th largest score is kept."""

    def combine(self, x: Tensor) -> Tensor:
        p = self.r(x).softmax(-1)
        kept = p * (p >= p.topk(TOP_K, -1).values[..., -1:])
        return kept / kept.sum(-1, keepdim=True)


class AboveNext(Stacked):
    """Everything above the (k+1)-th largest score is kept, found by sorting."""

    def combine(self, x: Tensor) -> Tensor:
        p = F.softmax(self.r(x), dim=-1)
        limit = p.sort(-1, descending=True).values[..., TOP_K].unsqueeze(-1)
        kept = torch.where(p > limit, p, torch.zeros_like(p))
        return kept / kept.sum(-1, keepdim=True)


class KthValue(Stacked):
    """The threshold comes from kthvalue."""

    def combine(self, x: Tensor) -> Tensor:
        p = self.r(x).softmax(-1)
        kept = p.masked_fill(p < p.kthvalue(N - TOP_K + 1, dim=-1, keepdim=True).values, 0.0)
        return kept / kept.sum(-1, keepdim=True)


class RepeatedArgmax(Stacked):
    """The best, then the best of the rest, each as a one-hot map."""

    def combine(self, x: Tensor) -> Tensor:
        p = self.r(x).softmax(-1)
        first = F.one_hot(p.argmax(-1), N).to(p.dtype)
        second = F.one_hot((p * (1 - first)).argmax(-1), N).to(p.dtype)
        p1, p2 = (p * first).sum(-1, keepdim=True), (p * second).sum(-1, keepdim=True)
        return (first * p1 + second * p2) / (p1 + p2)


class MultiHot(Stacked):
    """A boolean routing map over experts, and probabilities masked by it."""

    def combine(self, x: Tensor) -> Tensor:
        p = self.r(x).softmax(-1)
        routing_map = F.one_hot(p.topk(TOP_K, -1).indices, N).sum(-2).bool()
        kept = p.masked_fill(~routing_map, 0)
        return kept / kept.sum(-1, keepdim=True)


class Sorted(Stacked):
    """A full sort stands for top-k."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, order = torch.sort(self.r(x).softmax(-1), dim=-1, descending=True)
        values = values[..., :TOP_K]
        return values / values.sum(-1, keepdim=True), order[..., :TOP_K]


class ArgSorted(Stacked):
    """The last k of an ascending argsort, smallest first."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.r(x).softmax(-1)
        index = p.argsort(-1)[..., -TOP_K:]
        weights = p.gather(-1, index)
        return weights / weights.sum(-1, keepdim=True), index


class Ranked(Stacked):
    """Each expert's rank, from argsort of argsort, compared with k."""

    def combine(self, x: Tensor) -> Tensor:
        logits = self.r(x)
        rank = logits.argsort(-1, descending=True).argsort(-1)
        return logits.masked_fill(rank >= TOP_K, -math.inf).softmax(-1)


class Unsorted(Stacked):
    """top-k with sorted=False, and the logarithm of the probabilities in between."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, index = self.r(x).log_softmax(-1).topk(TOP_K, dim=-1, sorted=False)
        values = values.exp()
        return values / values.sum(-1, keepdim=True), index


class ByHand(Stacked):
    """Softmax written out, the router as an einsum, the two largest by max and scatter."""

    def combine(self, x: Tensor) -> Tensor:
        logits = torch.einsum("btd,nd->btn", x, self.r.weight)
        e = (logits - logits.amax(-1, keepdim=True)).exp()
        p = e / e.sum(-1, keepdim=True)
        first = p.max(-1, keepdim=True)
        second = p.scatter(-1, first.indices, -1.0).max(-1, keepdim=True)
        out = torch.zeros_like(p).scatter(-1, first.indices, first.values).scatter(-1, second.indices, second.values)
        return out / out.sum(-1, keepdim=True)


class MaskedSoftmax(Stacked):
    """top-k first: logits outside are -inf, then softmax over all."""

    rule = {"order": "topk_first"}  # noqa: RUF012

    def combine(self, x: Tensor) -> Tensor:
        logits = self.r(x)
        values, index = logits.topk(TOP_K, -1)
        return torch.full_like(logits, -math.inf).scatter(-1, index, values).softmax(-1)


class TopkFirstBias(Stacked):
    """top-k of logits with a router bias, then softmax."""

    rule = {"order": "topk_first"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Linear(D, N)
        nn.init.normal_(self.r.bias)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, index = self.r(x).topk(TOP_K, -1)
        return values.softmax(-1), index


class NotRenormalised(Stacked):
    """Softmax over all experts, top-k, used as they are."""

    rule = {"normalize": "none"}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.r(x).softmax(-1).topk(TOP_K, -1)


class Switch(Stacked):
    """top-1, weighted by its probability."""

    rule, top_k = {"normalize": "none"}, 1

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weight, index = self.r(flat).softmax(-1).max(-1)
        out = flat.new_zeros(flat.shape)
        for e in range(N):
            mine = index == e
            rows = flat[mine]
            out[mine] = F.linear(F.silu(F.linear(rows, self.a[e])) * F.linear(rows, self.b[e]), self.c[e])
        return (out * weight.unsqueeze(-1)).view_as(x)


class HardTop1(Stacked):
    """top-1 without any weight: argmax picks, weight one."""

    rule, top_k = {"order": "topk_first"}, 1

    def combine(self, x: Tensor) -> Tensor:
        return F.one_hot(self.r(x).argmax(-1), N).to(x.dtype)


class OnInput(Stacked):
    """top-2 sigmoid weights multiply the experts' input."""

    rule = {"score": "sigmoid", "applies_to": "input"}  # noqa: RUF012

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        values, index = self.r(flat).topk(TOP_K, -1)
        scores = torch.full((flat.shape[0], N), -math.inf, dtype=x.dtype).scatter(1, index, values).sigmoid()
        rows = flat.unsqueeze(0) * scores.t().unsqueeze(-1)
        hidden = F.silu(torch.bmm(rows, self.a.mT)) * torch.bmm(rows, self.b.mT)
        return torch.bmm(hidden, self.c.mT).sum(0).view_as(x)


class SigmoidPlain(Stacked):
    """Sigmoid scores, used as they are."""

    rule = {"score": "sigmoid"}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.r(x).sigmoid().topk(TOP_K, -1)


class SigmoidAfter(Stacked):
    """top-k of logits, then sigmoid, then renormalised."""

    rule = {"score": "sigmoid", "order": "topk_first", "normalize": "sum"}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, index = self.r(x).topk(TOP_K, -1)
        weights = torch.sigmoid(values)
        return weights / weights.sum(-1, keepdim=True), index


class SqrtSoftplus(Stacked):
    """Square root of softplus, renormalised and scaled."""

    rule = {"score": "sqrt_softplus", "normalize": "sum", "scale": 1.5}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = F.softplus(self.r(x)).sqrt().topk(TOP_K, -1)
        return 1.5 * weights / weights.sum(-1, keepdim=True), index


class Softcapped(Stacked):
    """Logits through 2 tanh(l / 2)."""

    rule = {"softcap": 2.0, "normalize": "none"}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (torch.tanh(self.r(x) / 2.0) * 2.0).softmax(-1).topk(TOP_K, -1)


class TwoNorm(Stacked):
    """Selected probabilities divided by their 2-norm."""

    rule = {"normalize": "norm", "p": 2.0}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.r(x).softmax(-1).topk(TOP_K, -1)
        return F.normalize(weights, p=2, dim=-1), index


class PerExpertScale(Stacked):
    """A learned scale per expert on the renormalised weights."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.rand(N) + 0.5)

    def router_tensors(self) -> dict[str, Tensor]:
        return {"per_expert_scale": self.s}

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = super().route(x)
        return weights * self.s[index], index


class BiasOnScore(Stacked):
    """Sigmoid scores, selection by score + bias, weights without it."""

    rule = {"score": "sigmoid", "normalize": "sum", "eps": 1e-20}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.tilt = nn.Parameter(torch.randn(N) * 0.3, requires_grad=False)

    def router_tensors(self) -> dict[str, Tensor]:
        return {"selection_bias": self.tilt}

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        score = self.r(x).sigmoid()
        index = (score + self.tilt).topk(TOP_K, -1, sorted=False).indices
        weights = score.gather(-1, index)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20), index


class BiasOnLogit(Stacked):
    """Softmax scores, selection by logit + bias."""

    rule = {"selection_bias_on": "logit", "normalize": "none"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("balance", torch.randn(N))

    def router_tensors(self) -> dict[str, Tensor]:
        return {"selection_bias": self.balance}

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.r(x)
        index = torch.topk(logits + self.balance, TOP_K).indices
        return logits.softmax(-1).gather(-1, index), index


class GroupsMaxZero(Stacked):
    """2 of 4 groups by their best score, the rest filled with zero."""

    rule = {"normalize": "none", "scale": 2.5, "groups": Groups(4, 2, "max", "zero")}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.r(x).softmax(-1)
        best = p.unflatten(-1, (4, 2)).amax(-1).topk(2, -1).indices
        mask = torch.zeros(*p.shape[:-1], 4, dtype=x.dtype).scatter(-1, best, 1).repeat_interleave(2, -1)
        weights, index = (p * mask).topk(TOP_K, -1)
        return weights * 2.5, index


class GroupsTop2Inf(Stacked):
    """1 of 2 groups by the sum of its two best biased scores, the rest filled with -inf; sigmoid, scaled."""

    rule = {  # noqa: RUF012
        "score": "sigmoid", "normalize": "sum", "eps": 1e-20, "scale": 2.5, "groups": Groups(2, 1, "top2", "-inf"),
    }  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("e_bias", torch.randn(N) - 0.5)

    def router_tensors(self) -> dict[str, Tensor]:
        return {"selection_bias": self.e_bias}

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        score = self.r(x).sigmoid()
        choice = (score + self.e_bias).view(*x.shape[:-1], 2, 4)
        group = choice.topk(2, -1).values.sum(-1)
        outside = group < group.amax(-1, keepdim=True)
        index = choice.masked_fill(outside.unsqueeze(-1), -math.inf).flatten(-2).topk(TOP_K, -1).indices
        weights = score.gather(-1, index)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, index


class Hierarchical(Stacked):
    """First the best group, then the best experts inside it, numbered from the group's start."""

    rule = {"normalize": "sum", "groups": Groups(2, 1, "max", "-inf")}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.r(x).softmax(-1).unflatten(-1, (2, 4))
        group = p.amax(-1).argmax(-1, keepdim=True)
        inside = p.take_along_dim(group.unsqueeze(-1), -2).squeeze(-2)
        weights, index = inside.topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index + group * 4


class BigEpsilon(Stacked):
    """An epsilon in the normaliser that shows."""

    rule = {"score": "sigmoid", "normalize": "sum", "eps": 0.3}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.r(x).sigmoid().topk(TOP_K, -1)
        return weights / (weights.sum(-1, keepdim=True) + 0.3), index


class Clamped(Stacked):
    """The normaliser is clamped from below at a value that shows."""

    rule = {"normalize": "clamp", "eps": 0.6}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.r(x).softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True).clamp(min=0.6), index


class ScaleThenCapTemperature(Stacked):
    """A constant temperature on the logits and a constant scale on the weights."""

    rule = {"normalize": "sum", "scale": 2.5}  # noqa: RUF012

    def router_weight(self) -> Tensor:
        return self.r.weight / 0.7

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = (self.r(x) / 0.7).softmax(-1).topk(TOP_K, -1)
        return weights.div(weights.sum(-1, keepdim=True)).mul(2.5), index


class LearnedTemperature(Stacked):
    """A learned scalar temperature."""

    rule = {"normalize": "none"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.log_t = nn.Parameter(torch.tensor(0.4))

    def router_weight(self) -> Tensor:
        return self.r.weight * self.log_t.exp()

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (self.r(x) * self.log_t.exp()).softmax(-1).topk(TOP_K, -1)


class DoubleRouter(Stacked):
    """The router works in double precision whatever the model does, and casts its weights back."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = F.linear(x.double(), self.r.weight.double())
        weights, index = F.softmax(logits, dim=-1, dtype=torch.float64).topk(TOP_K, -1)
        return (weights / weights.sum(-1, keepdim=True)).to(x.dtype), index


class RouterOwnNorm(Stacked):
    """Router and experts read different norms of the same hidden state."""

    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.RMSNorm(D), nn.LayerNorm(D)
        nn.init.normal_(self.n1.weight, 1.0, 0.3)
        nn.init.normal_(self.n2.weight, 1.0, 0.3)

    def expected(self, x: Tensor) -> Tensor:
        return x + reference(self.truth(), self.n2(x), self.n1(x))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dense(self.n2(x), self.combine(self.n1(x)))


class TransposedRouter(Stacked):
    """The router is a bare [d, N] parameter; experts are first and tokens last in everything it makes."""

    def build(self) -> None:
        super().build()
        self.gate = nn.Parameter(torch.randn(D, N) * 0.5)

    def router_weight(self) -> Tensor:
        return self.gate.t()

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        p = (self.gate.t() @ flat.t()).softmax(0)  # [N, T]
        values, index = p.topk(TOP_K, dim=0)
        combine = torch.zeros_like(p).scatter(0, index, values / values.sum(0))
        hidden = F.silu(self.a @ flat.t()) * (self.b @ flat.t())  # [N, m, T]
        return ((self.c @ hidden) * combine.unsqueeze(1)).sum(0).t().reshape(x.shape)


MOES = {
    c.__name__: c
    for c in (
        KthThreshold, AboveNext, KthValue, RepeatedArgmax, MultiHot, Sorted, ArgSorted, Ranked, Unsorted,
        ByHand, MaskedSoftmax, TopkFirstBias, NotRenormalised, Switch, HardTop1, OnInput, SigmoidPlain,
        SigmoidAfter, SqrtSoftplus, Softcapped, TwoNorm, PerExpertScale, BiasOnScore, BiasOnLogit,
        GroupsMaxZero, GroupsTop2Inf, Hierarchical, BigEpsilon, Clamped, ScaleThenCapTemperature,
        LearnedTemperature, DoubleRouter, RouterOwnNorm, TransposedRouter,
    )
}  # fmt: skip
