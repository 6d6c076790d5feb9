"""Random standard MoEs: coding × routing × activation × storage × biases × shared × sizes, each with its truth."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from codings_base import Coding, reference
from torch import Tensor, nn

from latentize.activations import Activation
from latentize.spec import ExpertsSpec, Groups, MoESpec, RouterSpec

_ACTIVATIONS = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "relu": F.relu,
    "relu_squared": lambda z: F.relu(z).square(), "tanh": torch.tanh,
}  # fmt: skip
_SCORES = {
    "softmax": lambda z: z.softmax(-1), "sigmoid": torch.sigmoid, "sqrt_softplus": lambda z: F.softplus(z).sqrt(),
}  # fmt: skip


@dataclass(frozen=True)
class Draw:
    """One case, by name of every choice."""

    seed: int
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    dispatch: str
    storage: str
    selection: str
    score: str
    order: str
    normalize: str
    scale: float
    groups: Groups | None
    selection_bias: bool
    router_bias: bool
    softcap: float | None
    on_input: bool
    activation: str
    gated: bool
    biases: bool
    shared: bool
    residual: bool
    norm: bool
    returns: str


def draw(seed: int) -> Draw:
    """The case that a seed stands for."""
    r = random.Random(seed)
    experts = r.choice([4, 6, 8, 12])
    top_k = r.choice([1, 2, 3])
    order = r.choice(["score_first", "score_first", "topk_first"])
    grouped = order == "score_first" and experts in (8, 12) and r.random() < 0.25
    groups = None
    if grouped:
        count = 4 if experts == 12 else 2
        size = experts // count
        kept = max(1, -(-top_k // size), count // 2)
        groups = Groups(count, kept, r.choice(["top2", "max"]), "-inf")
    score = r.choice(["softmax", "softmax", "sigmoid", "sqrt_softplus"])
    # a single selected score divided by itself says nothing about the score
    normalize = "none" if top_k == 1 else r.choice(["none", "sum", "sum", "norm"])
    return Draw(
        seed=seed, hidden=r.choice([16, 24, 32]), intermediate=r.choice([8, 20, 48]), experts=experts, top_k=top_k,
        dispatch=r.choice(["dense", "static", "hit", "gather", "sorted", "bmm"]),
        storage=r.choice(["stacked", "transposed", "listed", "flat", "fused", "fused_swapped", "interleaved"]),
        selection=r.choice(["topk", "sort", "argsort", "threshold", "argmax"]) if groups is None else "topk",
        score=score, order=order, normalize=normalize, scale=r.choice([1.0, 1.0, 2.5]), groups=groups,
        selection_bias=order == "score_first" and r.random() < 0.3, router_bias=r.random() < 0.3,
        softcap=r.choice([None, None, None, 3.0]), on_input=r.random() < 0.12, activation=r.choice(list(_ACTIVATIONS)),
        gated=r.random() < 0.7, biases=r.random() < 0.3, shared=r.random() < 0.3, residual=r.random() < 0.3,
        norm=r.random() < 0.3, returns=r.choice(["tensor", "tensor", "tuple", "dict"]),
    )  # fmt: skip


class Generated(Coding):
    """The module that a draw describes."""

    def __init__(self, case: Draw) -> None:
        super().__init__()
        self.case = case
        n, m, d = case.experts, case.intermediate, case.hidden
        self.r = nn.Linear(d, n, bias=case.router_bias)
        nn.init.normal_(self.r.weight, std=0.5)
        self.tilt = nn.Parameter(torch.randn(n) * 0.2) if case.selection_bias else None
        parts = ["gate", "up"] if case.gated else ["up"]
        scale = d**-0.5
        self._store({part: torch.randn(n, m, d) * scale for part in parts}, torch.randn(n, d, m) * m**-0.5)
        self.in_bias = nn.ParameterDict({p: torch.randn(n, m) * 0.3 for p in parts}) if case.biases else None
        self.out_bias = nn.Parameter(torch.randn(n, d) * 0.3) if case.biases else None
        self.always = nn.Sequential(nn.Linear(d, m), nn.GELU(), nn.Linear(m, d)) if case.shared else None
        self.before = nn.LayerNorm(d) if case.norm else None

    def _store(self, inner: dict[str, Tensor], down: Tensor) -> None:
        s = self.case.storage
        if s.startswith(("fused", "interleaved")) and self.case.gated:
            order = ["up", "gate"] if s == "fused_swapped" else ["gate", "up"]
            both = torch.stack([inner[p] for p in order], 2 if s == "interleaved" else 1)
            inner = {"both": both.flatten(1, 2)}
        if s == "transposed":
            inner, down = {k: v.mT.contiguous() for k, v in inner.items()}, down.mT.contiguous()
        if s == "flat":
            inner, down = {k: v.flatten(0, 1) for k, v in inner.items()}, down.mT.flatten(0, 1)
        everything = {**inner, "down": down}
        if s == "listed":
            self.w = nn.ModuleDict({k: nn.ParameterList(v.unbind(0)) for k, v in everything.items()})
        else:
            self.w = nn.ParameterDict(everything)

    def matrices(self) -> tuple[Tensor | None, Tensor, Tensor]:
        """Gate (None when ungated), up [N, m, d] and down [N, d, m], as the forward reads them."""
        c, s = self.case, self.case.storage
        w = {k: torch.stack(list(v)) if s == "listed" else v for k, v in self.w.items()}
        if s == "transposed":
            w = {k: v.mT for k, v in w.items()}
        if s == "flat":
            w = {k: v.view(c.experts, c.intermediate, c.hidden) for k, v in w.items()}
            w["down"] = w["down"].mT
        if "both" in w:
            if s == "interleaved":
                gate, up = w["both"][:, ::2], w["both"][:, 1::2]
            else:
                gate, up = w["both"].chunk(2, 1)
                gate, up = (up, gate) if s == "fused_swapped" else (gate, up)
            return gate, up, w["down"]
        return w.get("gate"), w["up"], w["down"]

    def truth(self) -> MoESpec:
        c = self.case
        gate, up, down = self.matrices()
        b = self.in_bias
        router = RouterSpec(
            self.r.weight, c.top_k, self.r.bias, c.softcap, c.score, c.order, self.tilt, groups=c.groups,
            normalize=c.normalize, p=2.0 if c.normalize == "norm" else 1.0, scale=c.scale,
            applies_to="input" if c.on_input else "output",
        )  # fmt: skip
        biases = (b["gate"] if b and c.gated else None, b["up"] if b else None, self.out_bias)
        return MoESpec(router, ExpertsSpec(up, down, gate, *biases, Activation(c.activation)))

    def expected(self, x: Tensor) -> Tensor:
        h = x if self.before is None else self.before(x)
        out = reference(self.truth(), h)
        if self.always is not None:
            out = out + self.always(h)
        return x + out if self.case.residual else out

    def forward(self, x: Tensor) -> Any:
        c = self.case
        h = x if self.before is None else self.before(x)
        flat = h.reshape(-1, c.hidden)
        out = self.experts(flat, *self.route(flat)).view(x.shape)
        if self.always is not None:
            out = out + self.always(h)
        if c.residual:
            out = x + out
        return {"tensor": out, "tuple": (out, self.r(h)), "dict": {"aux": self.r(h).mean(), "out": out}}[c.returns]

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices [T, k]."""
        c = self.case
        logits = self.r(x)
        if c.softcap is not None:
            logits = c.softcap * torch.tanh(logits / c.softcap)
        scores = logits if c.order == "topk_first" else _SCORES[c.score](logits)
        index = self.select(scores if self.tilt is None else scores + self.tilt)
        weights = scores.gather(-1, index)
        if c.order == "topk_first":
            weights = _SCORES[c.score](weights)
        if c.normalize == "sum":
            weights = weights / weights.sum(-1, keepdim=True)
        if c.normalize == "norm":
            weights = weights / weights.norm(dim=-1, keepdim=True)
        return weights * c.scale, index

    def select(self, choice: Tensor) -> Tensor:
        """Indices [T, k] of the k largest."""
        c = self.case
        if c.groups is not None:
            grouped = choice.unflatten(-1, (c.groups.count, -1))
            best = grouped.amax(-1) if c.groups.score == "max" else grouped.topk(2, -1).values.sum(-1)
            kept = torch.zeros_like(best).scatter(-1, best.topk(c.groups.kept, -1).indices, 1.0)
            choice = grouped.masked_fill(kept.unsqueeze(-1) == 0, float("-inf")).flatten(-2)
        if c.selection == "sort":
            return choice.sort(-1, descending=True).indices[..., : c.top_k]
        if c.selection == "argsort":
            return choice.argsort(-1)[..., -c.top_k :]
        if c.selection == "threshold":
            kept = choice >= choice.kthvalue(c.experts - c.top_k + 1, dim=-1, keepdim=True).values
            return kept.nonzero()[:, -1].view(-1, c.top_k)
        if c.selection == "argmax":
            found = []
            for _ in range(c.top_k):
                found.append(choice.argmax(-1, keepdim=True))
                choice = choice.scatter(-1, found[-1], float("-inf"))
            return torch.cat(found, -1)
        return choice.topk(c.top_k, -1).indices

    def one(self, e: int, x: Tensor) -> Tensor:
        """Expert e on rows x [T, d]."""
        gate, up, down = (None if w is None else w[e] for w in self.matrices())
        b = self.in_bias
        f = _ACTIVATIONS[self.case.activation]
        h = F.linear(x, up, b["up"][e] if b else None)
        h = f(h) if gate is None else f(F.linear(x, gate, b["gate"][e] if b else None)) * h
        return F.linear(h, down, None if self.out_bias is None else self.out_bias[e])

    def every(self, x: Tensor) -> Tensor:
        """All experts on rows x [T, d] or [N, T, d], as [N, T, d]."""
        gate, up, down = self.matrices()
        b = self.in_bias
        f = _ACTIVATIONS[self.case.activation]
        x = x.expand(self.case.experts, -1, -1)
        h = torch.bmm(x, up.mT) + (b["up"].unsqueeze(1) if b else 0)
        h = f(h) if gate is None else f(torch.bmm(x, gate.mT) + (b["gate"].unsqueeze(1) if b else 0)) * h
        y = torch.bmm(h, down.mT)
        return y if self.out_bias is None else y + self.out_bias.unsqueeze(1)

    def experts(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        """Routed output [T, d], in the dispatch that the draw names."""
        return getattr(self, f"_{self.case.dispatch}")(x, weights, index)

    def _dense(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        combine = torch.zeros(x.shape[0], self.case.experts, dtype=x.dtype).scatter(1, index, weights)
        if not self.case.on_input:
            return torch.einsum("etd,te->td", self.every(x), combine)
        mask = torch.zeros_like(combine).scatter(1, index, 1.0)
        return torch.einsum("etd,te->td", self.every(combine.t().unsqueeze(-1) * x), mask)

    def _weighted(self, e: int, rows: Tensor, weight: Tensor) -> Tensor:
        return self.one(e, rows * weight) if self.case.on_input else self.one(e, rows) * weight

    def _static(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(self.case.experts):
            token, slot = torch.where(index == e)
            out.index_add_(0, token, self._weighted(e, x[token], weights[token, slot, None]))
        return out

    def _hit(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in index.unique().tolist():
            token, slot = (index == e).nonzero(as_tuple=True)
            out[token] += self._weighted(e, x[token], weights[token, slot].unsqueeze(-1))
        return out

    def _gather(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        gate, up, down = self.matrices()
        b = self.in_bias
        f = _ACTIVATIONS[self.case.activation]
        rows = x.unsqueeze(1).expand(-1, index.shape[1], -1)
        rows = rows * weights.unsqueeze(-1) if self.case.on_input else rows
        h = torch.einsum("tkd,tkmd->tkm", rows, up[index]) + (b["up"][index] if b else 0)
        if gate is None:
            h = f(h)
        else:
            h = f(torch.einsum("tkd,tkmd->tkm", rows, gate[index]) + (b["gate"][index] if b else 0)) * h
        y = torch.einsum("tkm,tkdm->tkd", h, down[index])
        if self.out_bias is not None:
            y = y + self.out_bias[index]
        return y.sum(1) if self.case.on_input else (y * weights.unsqueeze(-1)).sum(1)

    def _sorted(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        k = index.shape[1]
        order = index.flatten().argsort(stable=True)
        counts = torch.bincount(index.flatten(), minlength=self.case.experts).tolist()
        rows, scale = x[order // k].split(counts), weights.flatten()[order].unsqueeze(-1).split(counts)
        parts = [self._weighted(e, a, b) for e, (a, b) in enumerate(zip(rows, scale, strict=True))]
        return torch.zeros_like(x).index_add(0, order // k, torch.cat(parts))

    def _bmm(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        expert = index.flatten()
        one_hot = F.one_hot(expert, self.case.experts)
        place = (one_hot.cumsum(0) - 1).gather(1, expert.unsqueeze(1)).squeeze(1)
        rows = x.repeat_interleave(index.shape[1], 0)
        scale = weights.flatten().unsqueeze(-1)
        buffer = x.new_zeros(self.case.experts, x.shape[0], x.shape[1])
        y = self.every(buffer.index_put((expert, place), rows * scale if self.case.on_input else rows))[expert, place]
        y = y if self.case.on_input else y * scale
        return y.view(x.shape[0], -1, x.shape[1]).sum(1)


def build(seed: int) -> Generated:
    """The seeded module of a seed, in eval mode."""
    torch.manual_seed(seed)
    return Generated(draw(seed)).eval()
