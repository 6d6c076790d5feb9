"""Near misses: look-alikes that differ from a standard MoE in one detail or on rare inputs, and their honest twins.

`loud` multiplies the fresh inputs of a case whose detail shows on large values only.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from codings_base import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, Listed, Stacked
from torch import Tensor, nn

from latentize.activations import Activation
from latentize.spec import Groups, MoESpec

N, D, M = EXPERTS, HIDDEN, INTERMEDIATE
NEAREST, MIXES = "nearest", "mixes"


class _Near(Stacked):
    why = NEAREST


def _scatter(p: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    return torch.zeros_like(p).scatter(-1, index, weights)


class _Glu(Stacked):
    """The experts' inner part alone is replaced."""

    def hidden(self, gate: Tensor, up: Tensor) -> Tensor:
        raise NotImplementedError

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        gate, up = (torch.einsum("...d,eid->...ei", x, w) for w in (self.a, self.b))
        return torch.einsum("...ei,edi,...e->...d", self.hidden(gate, up), self.c, combine)


class RareClamp(_Glu):
    """Gate and up clamped at 10, which only loud tokens reach."""

    loud = 20.0

    def truth(self) -> MoESpec:
        spec = super().truth()
        glu = Activation("silu", gate_max=10.0, up_min=-10.0, up_max=10.0)
        return replace(spec, experts=replace(spec.experts, activation=glu))

    def hidden(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate.clamp(max=10.0)) * up.clamp(-10.0, 10.0)


class RareSoftcap(Stacked):
    """Logits through 30 tanh(l / 30), nearly straight for quiet tokens."""

    loud = 10.0
    rule = {"softcap": 30.0, "normalize": "none"}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (30.0 * torch.tanh(self.r(x) / 30.0)).softmax(-1).topk(TOP_K, -1)


class SharpenedTopk(Stacked):
    """The selected logits are doubled before their softmax: a router of twice the size."""

    rule = {"order": "topk_first"}  # noqa: RUF012

    def router_weight(self) -> Tensor:
        return self.r.weight * 2

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, index = self.r(x).topk(TOP_K, -1)
        return (values * 2).softmax(-1), index


class SigmoidSelectsSoftmaxWeighs(Stacked):
    """Selected by sigmoid, weighed by a softmax of the selected logits: the sigmoid changes nothing."""

    rule = {"order": "topk_first"}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.r(x)
        index = logits.sigmoid().topk(TOP_K, -1).indices
        return logits.gather(-1, index).softmax(-1), index


class LogitBiasSigmoid(Stacked):
    """Selection bias on the logit, sigmoid of the selected logits, renormalised."""

    rule = {"score": "sigmoid", "order": "topk_first", "normalize": "sum"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.tilt = nn.Parameter(torch.randn(N))

    def router_tensors(self) -> dict[str, Any]:
        return {"selection_bias": self.tilt}

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.r(x)
        index = (logits + self.tilt).topk(TOP_K, -1).indices
        weights = logits.gather(-1, index).sigmoid()
        return weights / weights.sum(-1, keepdim=True), index


class GroupsTop2Zero(Stacked):
    """Softmax scores, 2 of 4 groups by the sum of their two best, the rest filled with zero, renormalised, scaled."""

    rule = {"normalize": "sum", "eps": 1e-20, "scale": 2.5, "groups": Groups(4, 2, "top2", "zero")}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.r(x).softmax(-1)
        best = p.view(*p.shape[:-1], 4, 2).topk(2, -1)[0].sum(-1).topk(2, -1, sorted=False)[1]
        mask = torch.zeros(*p.shape[:-1], 4, dtype=p.dtype).scatter_(-1, best, 1).repeat_interleave(2, -1)
        index = p.masked_fill(~mask.bool(), 0.0).topk(TOP_K, -1, sorted=False)[1]
        weights = p.gather(-1, index)
        return weights / (weights.sum(-1, keepdim=True) + 1e-20) * 2.5, index


MOES = {
    c.__name__: c
    for c in (RareClamp, RareSoftcap, SharpenedTopk, SigmoidSelectsSoftmaxWeighs, LogitBiasSigmoid, GroupsTop2Zero)
}


class RareHiddenClamp(_Glu, _Near):
    """Hidden activations clamped at 30, which only loud tokens reach."""

    loud = 20.0

    def hidden(self, gate: Tensor, up: Tensor) -> Tensor:
        return (F.silu(gate) * up).clamp(-30.0, 30.0)


class ClampAfter(_Glu, _Near):
    """The gate is clamped at 7 after its activation, up before."""

    loud = 20.0

    def hidden(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate).clamp(max=7.0) * up.clamp(-7.0, 7.0)


class SoftcappedGlu(_Glu, _Near):
    """Gate and up softcapped inside the GLU; the sigmoid sees the raw gate."""

    loud = 4.0

    def hidden(self, gate: Tensor, up: Tensor) -> Tensor:
        return 4 * torch.tanh(gate / 4) * torch.sigmoid(gate) * (25 * torch.tanh(up / 25))


class RareLogitClamp(_Near):
    """Logits clamped at ten."""

    loud = 8.0

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.r(x).clamp(-10, 10).softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class LoudBranch(_Near):
    """If any value exceeds six, only the best expert is used."""

    loud = 4.0

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = super().route(x)
        if x.abs().max() > 6:
            weights = weights * torch.tensor([1.0, 0.0]).to(x)
        return weights, index


class LastToken(_Near):
    """The last position of each sequence uses only its best expert."""

    def combine(self, x: Tensor) -> Tensor:
        weights, index = self.route(x)
        weights = torch.cat([weights[:, :-1], weights[:, -1:] * torch.tensor([1.0, 0.0]).to(x)], 1)
        return _scatter(self.r(x), index, weights)


class BigBatch(_Near):
    """Batches of two and more are routed by other rules than single sequences."""

    def combine(self, x: Tensor) -> Tensor:
        p = self.r(x).softmax(-1)
        weights, index = p.topk(TOP_K, -1)
        return _scatter(p, index, weights if x.shape[0] > 1 else weights / weights.sum(-1, keepdim=True))


class DtypeBranch(_Glu, _Near):
    """Another activation in double precision."""

    def hidden(self, gate: Tensor, up: Tensor) -> Tensor:
        return (F.relu(gate) if gate.dtype == torch.float64 else F.silu(gate)) * up


class RippledRouter(_Near):
    """A fast ripple on the logits: deterministic noise."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.r(x)
        weights, index = (logits + 0.2 * torch.sin(50 * logits)).softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class LargeCapacity(_Near):
    """At most forty tokens an expert."""

    why = MIXES

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        combine = self.combine(flat)
        place = (combine > 0).cumsum(0)
        return self.dense(flat, combine * (place <= 40)).view(x.shape)


class BiasUnweighted(_Near):
    """Output biases of the selected experts are added without their weights."""

    def __init__(self) -> None:
        super().__init__()
        self.c_bias = nn.Parameter(torch.randn(N, D))

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        return super().dense(x, combine) + (combine > 0).to(x) @ self.c_bias


class MixedScores(_Near):
    """Selected by sigmoid plus a bias, weighed by softmax."""

    rule = {"score": "softmax", "normalize": "none"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.tilt = nn.Parameter(torch.randn(N) * 0.4)

    def router_tensors(self) -> dict[str, Any]:
        return {"selection_bias": self.tilt}

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.r(x)
        index = (logits.sigmoid() + self.tilt).topk(TOP_K, -1).indices
        return logits.softmax(-1).gather(-1, index), index


class BiasedWeights(_Near):
    """The selection bias stays in the weights."""

    rule = {"score": "sigmoid", "normalize": "sum"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.tilt = nn.Parameter(torch.rand(N))

    def router_tensors(self) -> dict[str, Any]:
        return {"selection_bias": self.tilt}

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = (self.r(x).sigmoid() + self.tilt).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class ScaleBeforeSum(_Near):
    """Per-expert scales come before the normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.rand(N) + 0.5)

    def router_tensors(self) -> dict[str, Any]:
        return {"per_expert_scale": self.s}

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.r(x).softmax(-1).topk(TOP_K, -1)
        weights = weights * self.s[index]
        return weights / weights.sum(-1, keepdim=True), index


class OnePerGroup(_Near):
    """The best expert of each of two groups."""

    def combine(self, x: Tensor) -> Tensor:
        p = self.r(x).softmax(-1)
        best = p.unflatten(-1, (2, 4)).argmax(-1) + torch.tensor([0, 4])
        weights = p.gather(-1, best)
        return _scatter(p, best, weights / weights.sum(-1, keepdim=True))


class GroupSum(_Near):
    """Groups scored by the sum of all their experts."""

    rule = {"normalize": "sum", "groups": Groups(2, 1, "top2", "-inf")}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        nn.init.normal_(self.r.weight, std=0.1)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.r(x).softmax(-1)
        group = p.unflatten(-1, (2, 4))
        kept = group.sum(-1, keepdim=True) >= group.sum(-1, keepdim=True).amax(-2, keepdim=True)
        weights, index = (group * kept).flatten(-2).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class UnbiasedGroups(_Near):
    """Groups chosen by scores without the selection bias, experts with it."""

    rule = {"score": "sigmoid", "normalize": "sum", "groups": Groups(2, 1, "max", "-inf")}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.tilt = nn.Parameter(torch.randn(N) * 0.4)

    def router_tensors(self) -> dict[str, Any]:
        return {"selection_bias": self.tilt}

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        score = self.r(x).sigmoid()
        group = score.unflatten(-1, (2, 4)).amax(-1)
        outside = (group < group.amax(-1, keepdim=True)).repeat_interleave(4, -1)
        index = (score + self.tilt).masked_fill(outside, float("-inf")).topk(TOP_K, -1).indices
        weights = score.gather(-1, index)
        return weights / weights.sum(-1, keepdim=True), index


class UnevenGroups(_Near):
    """Groups of three and five."""

    rule = {"normalize": "sum", "groups": Groups(2, 1, "max", "-inf")}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        p = self.r(x).softmax(-1)
        first = p[..., :3].amax(-1, keepdim=True) >= p[..., 3:].amax(-1, keepdim=True)
        keep = torch.cat([first.expand_as(p[..., :3]), ~first.expand_as(p[..., 3:])], -1)
        weights, index = (p * keep).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class SoftplusScore(_Near):
    """Softplus scores without the square root."""

    rule = {"score": "sqrt_softplus", "normalize": "sum"}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = F.softplus(self.r(x)).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class SoftmaxOfShared(_Near):
    """A shared expert's logit takes part in the normaliser of the selected ones."""

    def __init__(self) -> None:
        super().__init__()
        self.s = nn.Linear(D, 1, bias=False)
        nn.init.normal_(self.s.weight, std=0.5)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values, index = self.r(x).topk(TOP_K, -1)
        return torch.cat([values, self.s(x)], -1).softmax(-1)[..., :TOP_K], index


class OddResidual(Listed):
    """One expert of eight adds its input."""

    why = NEAREST

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        return super().dense(x, combine) + combine[..., 5:6] * x


class EmptyTokens(_Near):
    """Tokens whose values are all zero give zero, though experts have biases."""

    def __init__(self) -> None:
        super().__init__()
        self.c_bias = nn.Parameter(torch.randn(N, D))

    def truth(self) -> MoESpec:
        spec = super().truth()
        return replace(spec, experts=replace(spec.experts, down_bias=self.c_bias))

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        return (super().dense(x, combine) + combine @ self.c_bias) * (x.abs().sum(-1, keepdim=True) > 0)


class HalfOfTheTime(_Near):
    """Every second token of the flattened batch is sent to its second choice first: weights swap."""

    def combine(self, x: Tensor) -> Tensor:
        weights, index = self.route(x)
        odd = (torch.arange(x.shape[0] * x.shape[1]) % 2).view(*x.shape[:2], 1).bool()
        return _scatter(self.r(x), index, torch.where(odd, weights.flip(-1), weights))


class ConvExperts(_Near):
    """Each expert has a short filter of its own over the sequence before its matrices."""

    why = MIXES

    def __init__(self) -> None:
        super().__init__()
        self.taps = nn.Parameter(torch.randn(N, D) * 0.5)

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        rows = x.unsqueeze(2) + before.unsqueeze(2) * self.taps
        hidden = F.silu(torch.einsum("bted,eid->btei", rows, self.a)) * torch.einsum("bted,eid->btei", rows, self.b)
        return torch.einsum("btei,edi,bte->btd", hidden, self.c, combine)


NOT_MOES = {
    c.__name__: c
    for c in (
        RareHiddenClamp, ClampAfter, SoftcappedGlu, RareLogitClamp, LoudBranch, LastToken, BigBatch, DtypeBranch,
        RippledRouter, LargeCapacity, BiasUnweighted, MixedScores, BiasedWeights, ScaleBeforeSum, OnePerGroup, GroupSum,
        UnbiasedGroups, UnevenGroups, SoftplusScore, SoftmaxOfShared, OddResidual, HalfOfTheTime,
        ConvExperts,
    )
}  # fmt: skip

#: The mask of empty tokens stays in the graph around the routed path.
EITHER = {c.__name__: c for c in (EmptyTokens,)}
