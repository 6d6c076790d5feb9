"""Codings of unrelated authors: their dispatch, their storage, their shapes; each with what it computes."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from codings_base import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, Coding, Ffn, Listed, Stacked
from codings_storage import TiedTwoBlocks
from torch import Tensor, nn

from latentize.activations import Activation
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec

N, D, M = EXPERTS, HIDDEN, INTERMEDIATE


class Sized(Stacked):
    """Other numbers of experts, neurons and active experts."""

    n, m = N, M

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Linear(D, self.n, bias=False)
        nn.init.normal_(self.r.weight, std=0.5)

    def build(self) -> None:
        self.a, self.b = (nn.Parameter(torch.randn(self.n, self.m, D) * 0.2) for _ in range(2))
        self.c = nn.Parameter(torch.randn(self.n, D, self.m) * 0.2)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.r(x).softmax(-1).topk(self.top_k, -1)
        return weights / weights.sum(-1, keepdim=True), index

    def combine(self, x: Tensor) -> Tensor:
        weights, index = self.route(x)
        return torch.zeros(*x.shape[:-1], self.n, dtype=x.dtype).scatter(-1, index, weights)


class SquareExperts(Sized):
    """As many neurons as the model is wide: gate, up and down look alike."""

    m = D


class AsManyExpertsAsWidth(Sized):
    """As many experts as the model is wide."""

    n, m, top_k = D, 20, 4


class Cube(Sized):
    """As many experts and as many neurons as the model is wide, looked up for each choice."""

    n, m, top_k = D, D, 3

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.route(x)
        hidden = F.silu(torch.einsum("btd,btkmd->btkm", x, self.a[index]))
        hidden = hidden * torch.einsum("btd,btkmd->btkm", x, self.b[index])
        return torch.einsum("btkm,btkdm,btk->btd", hidden, self.c[index], weights)


class MoreExpertsThanWidth(Sized):
    """More experts than the model is wide."""

    n, m, top_k = 40, 12, 3


class OneOfTwo(Sized):
    """Two experts, one of them active, weighed by its probability."""

    n, top_k = 2, 1
    rule = {"normalize": "none"}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.r(x).softmax(-1).max(-1, keepdim=True)


class AllButOne(Sized):
    """Every expert but the least likely."""

    n, top_k = 5, 4


class FunctionalExperts(Stacked):
    """One feed-forward called under vmap with stacked parameters."""

    def build(self) -> None:
        ffns = [Ffn() for _ in range(N)]
        stacked, _ = torch.func.stack_module_state(ffns)
        self.stacked = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(t) for name, t in stacked.items()})
        self.__dict__["skeleton"] = copy.deepcopy(ffns[0]).to("meta")

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.stacked["p/weight"], self.stacked["q/weight"], self.stacked["o/weight"]

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        def one(parameters: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(self.skeleton, parameters, (x,))

        every = torch.vmap(one)({name.replace("/", "."): p for name, p in self.stacked.items()})
        return torch.einsum("e...d,...e->...d", every, combine)


class _Plain(Stacked):
    """Two-matrix GELU experts with biases."""

    def weights_and_biases(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Up [N, m, d], its bias [N, m], down [N, d, m], its bias [N, d]."""
        raise NotImplementedError

    def truth(self) -> MoESpec:
        up, up_bias, down, down_bias = self.weights_and_biases()
        router = RouterSpec(self.router_weight(), self.top_k, self.r.bias, **self.rule)
        experts = ExpertsSpec(up, down, None, None, up_bias, down_bias, Activation("gelu"))
        return MoESpec(router, experts)


class NamedExperts(_Plain):
    """Experts with dropout in a ModuleDict, called by name."""

    def build(self) -> None:
        self.bank = nn.ModuleDict(
            {
                f"expert_{e}": nn.Sequential(nn.Linear(D, M), nn.GELU(), nn.Dropout(0.1), nn.Linear(M, D))
                for e in range(N)
            }
        )

    def weights_and_biases(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        banks = [[self.bank[f"expert_{e}"][layer] for e in range(N)] for layer in (0, 3)]
        return tuple(torch.stack([getattr(b, n) for b in bank]) for bank in banks for n in ("weight", "bias"))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, index = self.route(flat)
        out = torch.zeros_like(flat)
        for name, expert in self.bank.items():
            token, slot = torch.nonzero(index == int(name.split("_")[1]), as_tuple=True)
            if token.numel():
                out = out.index_add(0, token, expert(flat[token]) * weights[token, slot].unsqueeze(1))
        return out.view_as(x)


class PointwiseConvs(_Plain):
    """Each expert is a pair of convolutions of length one, over sequences with channels first."""

    @staticmethod
    def arguments(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (x.transpose(1, 2).contiguous(),), {}

    @staticmethod
    def hidden_first(out: Any) -> Tensor:
        return out.transpose(1, 2)

    def build(self) -> None:
        self.ffns = nn.ModuleList(
            nn.Sequential(nn.Conv1d(D, M, 1), nn.GELU(), nn.Conv1d(M, D, 1)) for _ in range(N)
        )

    def weights_and_biases(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        ups, downs = ([f[i] for f in self.ffns] for i in (0, 2))
        return (
            torch.stack([u.weight.squeeze(-1) for u in ups]), torch.stack([u.bias for u in ups]),
            torch.stack([d.weight.squeeze(-1) for d in downs]), torch.stack([d.bias for d in downs]),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        p = F.conv1d(x, self.r.weight.unsqueeze(-1)).softmax(1)
        weights, index = p.topk(TOP_K, 1)
        combine = torch.zeros_like(p).scatter(1, index, weights / weights.sum(1, keepdim=True))
        return sum(ffn(x) * combine[:, e : e + 1] for e, ffn in enumerate(self.ffns))


class CountedSlices(Listed):
    """Argsort, bincount and cumulated ends; results put back by the inverse order, then summed over the choices."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, index = self.route(flat)
        order = torch.argsort(index.reshape(-1), stable=True)
        ends = torch.bincount(index.reshape(-1), minlength=N).cumsum(0).cpu().numpy()
        rows = flat.repeat_interleave(TOP_K, 0)[order]
        done = torch.empty_like(rows)
        for e in range(N):
            start = 0 if e == 0 else int(ends[e - 1])
            if start < int(ends[e]):
                done[start : int(ends[e])] = self.ffns[e](rows[start : int(ends[e])])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return (done[back].view(-1, TOP_K, D) * weights.unsqueeze(-1)).sum(1).view_as(x)


class SegmentSums(Stacked):
    """Choices sorted by expert, experts by lookup, choices sorted back and added up by a segment reduction."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, index = self.route(flat)
        expert, order = index.flatten().sort(stable=True)
        token = order.div(TOP_K, rounding_mode="floor")
        rows = flat[token].unsqueeze(-1)
        y = torch.bmm(self.c[expert], F.silu(self.a[expert] @ rows) * (self.b[expert] @ rows)).squeeze(-1)
        y = (y * weights.flatten()[order].unsqueeze(-1))[token.argsort(stable=True)]
        lengths = torch.full((len(flat),), TOP_K)
        return torch.segment_reduce(y, "sum", lengths=lengths, axis=0).view_as(x)


class PaddedBlocks(Stacked):
    """Tokens sorted by expert and padded to blocks of four; every block reads the weights of its own expert."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, index = self.route(flat)
        choice = index.flatten()
        counts = F.one_hot(choice, N).sum(0)
        blocks = (counts + 3) // 4
        first = (blocks.cumsum(0) - blocks) * 4
        place = first[choice] + (F.one_hot(choice, N).cumsum(0) - 1).gather(1, choice[:, None]).squeeze(1)
        room = (len(choice) + 3 * N) // 4 * 4
        rows = flat.new_zeros(room, D).index_copy(0, place, flat.repeat_interleave(TOP_K, 0)).view(-1, 4, D)
        owner = torch.searchsorted(blocks.cumsum(0), torch.arange(len(rows)), right=True).clamp(max=N - 1)
        y = (F.silu(rows @ self.a[owner].mT) * (rows @ self.b[owner].mT)) @ self.c[owner].mT
        return (y.view(-1, D)[place] * weights.flatten()[:, None]).view(len(flat), TOP_K, D).sum(1).view_as(x)


class BagOfOutputs(Stacked):
    """All experts' outputs as a table, of which an embedding bag adds up the chosen ones."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, index = self.route(flat)
        y = (F.silu(flat @ self.a.mT) * (flat @ self.b.mT)) @ self.c.mT
        rows = index * len(flat) + torch.arange(len(flat)).unsqueeze(1)
        return F.embedding_bag(rows, y.reshape(-1, D), per_sample_weights=weights, mode="sum").view_as(x)


class OneHotWeights(Stacked):
    """The chosen weights are a product of one-hot rows and the stack."""

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.route(x)
        hot = F.one_hot(index, N).to(x)
        a, b, c = (torch.einsum("btkn,nij->btkij", hot, w) for w in (self.a, self.b, self.c))
        rows = x[:, :, None, :, None]
        return ((c @ (F.silu(a @ rows) * (b @ rows))).squeeze(-1) * weights.unsqueeze(-1)).sum(2)


class ReducedScatter(Stacked):
    """Choices added up by scatter_reduce."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, index = self.route(flat)
        token, expert = torch.arange(len(flat)).repeat_interleave(TOP_K), index.flatten()
        rows = flat[token]
        hidden = F.silu(torch.einsum("pd,pmd->pm", rows, self.a[expert]))
        hidden = hidden * torch.einsum("pd,pmd->pm", rows, self.b[expert])
        y = torch.einsum("pm,pdm->pd", hidden, self.c[expert]) * weights.flatten().unsqueeze(1)
        where = token.unsqueeze(1).expand_as(y)
        return torch.zeros_like(flat).scatter_reduce(0, where, y, "sum", include_self=True).view_as(x)


class StraightThrough(Stacked):
    """One expert, unweighed; its mask is hard minus soft plus soft, which carries gradients in training."""

    top_k = 1
    rule = {"score": "softmax", "order": "topk_first"}  # noqa: RUF012

    def combine(self, x: Tensor) -> Tensor:
        p = self.r(x).softmax(-1)
        hard = F.one_hot(p.argmax(-1), N).to(p)
        return hard - p.detach() + p


class Bottleneck(Stacked):
    """The router is two matrices with nothing between."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Sequential(nn.Linear(D, 12, bias=False), nn.Linear(12, N, bias=False))
        for layer in self.r:
            nn.init.normal_(layer.weight, std=0.4)

    def router_weight(self) -> Tensor:
        return self.r[1].weight @ self.r[0].weight

    def truth(self) -> MoESpec:
        return MoESpec(RouterSpec(self.router_weight(), TOP_K, **self.rule), ExpertsSpec(self.b, self.c, self.a))


class TwoViews(Stacked):
    """The logits are the mean of two routers'."""

    def __init__(self) -> None:
        super().__init__()
        self.r2 = nn.Linear(D, N, bias=False)
        nn.init.normal_(self.r2.weight, std=0.5)

    def router_weight(self) -> Tensor:
        return (self.r.weight + self.r2.weight) / 2

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = ((self.r(x) + self.r2(x)) / 2).softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


class ShiftedNumbers(Listed):
    """The router's row e calls expert e + 1."""

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(w.roll(-1, 0) for w in super().weights())

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        return super().dense(x, combine.roll(1, -1))


class TemperatureBuffer(Stacked):
    """Logits divided by a temperature that is kept in a buffer."""

    rule = {"normalize": "none"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tau", torch.tensor([1.7]))

    def router_weight(self) -> Tensor:
        return self.r.weight / self.tau

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.softmax(self.r(x) / self.tau, -1).topk(TOP_K, -1)


class Int8Stored(Stacked):
    """Weights kept as 8-bit integers with a scale a row, multiplied out in every forward."""

    def build(self) -> None:
        for name, shape in (("a", (N, M, D)), ("b", (N, M, D)), ("c", (N, D, M))):
            whole = torch.randn(shape) * 0.2
            scale = whole.abs().amax(-1, keepdim=True) / 127
            self.register_buffer(f"{name}_int", (whole / scale).round().to(torch.int8))
            self.register_buffer(f"{name}_scale", scale)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        pairs = [(getattr(self, f"{n}_int"), getattr(self, f"{n}_scale")) for n in ("a", "b", "c")]
        return tuple(whole.to(scale.dtype) * scale for whole, scale in pairs)

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        a, b, c = self.weights()
        hidden = F.silu(torch.einsum("...d,eid->...ei", x, a)) * torch.einsum("...d,eid->...ei", x, b)
        return torch.einsum("...ei,edi,...e->...d", hidden, c, combine)


class ChannelsLastImage(Stacked):
    """Images [B, H, W, C], routed position by position."""

    @staticmethod
    def arguments(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (x.unsqueeze(2),), {}

    @staticmethod
    def hidden_first(out: Any) -> Tensor:
        return out.squeeze(2)


class _Sums(NamedTuple):
    hidden: Tensor
    load: Tensor


class NamedResult(Listed):
    """Returns a named tuple with the share of tokens of each expert."""

    @staticmethod
    def hidden_first(out: Any) -> Tensor:
        return out.hidden

    def forward(self, x: Tensor) -> _Sums:
        combine = self.combine(x)
        return _Sums(self.dense(x, combine), (combine > 0).float().mean((0, 1)))


@dataclass
class _Plan:
    out: Tensor
    loss: Tensor


class DataclassInside(Coding):
    """A block that returns a dataclass, in a layer that adds its output to the stream."""

    class Block(Listed):
        def forward(self, x: Tensor) -> _Plan:
            combine = self.combine(x)
            return _Plan(self.dense(x, combine), self.r(x).square().mean())

    def __init__(self) -> None:
        super().__init__()
        self.block = DataclassInside.Block()
        self.norm = nn.LayerNorm(D)

    def expected(self, x: Tensor) -> Tensor:
        return x + self.block.expected(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(self.norm(x)).out


class QuickGelu(Stacked):
    """Two-matrix experts with z · sigmoid(1.702 z), their output halved."""

    rule = {"normalize": "sum", "scale": 0.5}  # noqa: RUF012

    def truth(self) -> MoESpec:
        spec = super().truth()
        return replace(spec, experts=ExpertsSpec(self.b, self.c, None, activation=Activation("silu", 1.702)))

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        z = torch.einsum("...d,eid->...ei", x, self.b)
        return 0.5 * torch.einsum("...ei,edi,...e->...d", z * torch.sigmoid(1.702 * z), self.c, combine)


class TableWithBiases(_Plain):
    """An expert's matrices and biases are one row of a table."""

    def build(self) -> None:
        self.table = nn.Embedding(N, 2 * M * D + M + D)
        nn.init.normal_(self.table.weight, std=0.2)

    def weights_and_biases(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        up, bias, down, out = self.table.weight.split((M * D, M, M * D, D), 1)
        return up.view(N, M, D), bias, down.view(N, D, M), out

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, index = self.route(flat)
        up, bias, down, out = self.table(index).split((M * D, M, M * D, D), -1)
        hidden = F.gelu(torch.einsum("td,tkmd->tkm", flat, up.unflatten(-1, (M, D))) + bias)
        y = torch.einsum("tkm,tkdm->tkd", hidden, down.unflatten(-1, (D, M))) + out
        return torch.einsum("tkd,tk->td", y, weights).view_as(x)


class AmpleTwo(Stacked):
    """GShard's dispatch and combine for two choices, with room for every token in every expert."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, index = self.route(flat)
        combine = flat.new_zeros(len(flat), N, len(flat))
        filled = torch.zeros(N, dtype=torch.long)
        for k in range(TOP_K):
            hot = F.one_hot(index[:, k], N)
            place = ((hot.cumsum(0) - 1 + filled) * hot).sum(-1)
            filled = filled + hot.sum(0)
            inside = (place < len(flat)).to(flat)
            slots = F.one_hot(place.clamp(max=len(flat) - 1), len(flat)).to(flat)
            combine = combine + (weights[:, k] * inside)[:, None, None] * hot.to(flat)[:, :, None] * slots[:, None, :]
        rows = torch.einsum("tec,td->ecd", (combine > 0).to(flat), flat)
        y = torch.einsum("ecm,edm->ecd", F.silu(rows @ self.a.mT) * (rows @ self.b.mT), self.c)
        return torch.einsum("tec,ecd->td", combine, y).view_as(x)


class RoutersTwin(TiedTwoBlocks):
    """Two layers in a row whose routers are the same module."""

    def __init__(self) -> None:
        super().__init__()
        self.second = Listed()
        self.second.r = self.first.r


MOES = {
    c.__name__: c
    for c in (
        SquareExperts, AsManyExpertsAsWidth, Cube, MoreExpertsThanWidth, OneOfTwo, AllButOne, FunctionalExperts,
        NamedExperts, PointwiseConvs, CountedSlices, SegmentSums, PaddedBlocks, BagOfOutputs, OneHotWeights,
        ReducedScatter, StraightThrough, Bottleneck, TwoViews, ShiftedNumbers, TemperatureBuffer, Int8Stored,
        ChannelsLastImage, NamedResult, DataclassInside, QuickGelu, TableWithBiases, AmpleTwo, RoutersTwin,
    )
}  # fmt: skip
