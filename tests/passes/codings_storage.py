"""One routing (softmax, top-k, renormalise), experts' weights stored in every way we could think of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from codings_base import EXPERTS, HIDDEN, INTERMEDIATE, Coding, Ffn, Listed, Stacked, reference
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from latentize.activations import Activation
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec

N, D, M = EXPERTS, HIDDEN, INTERMEDIATE


def _small(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) * 0.2)


class TransposedStacks(Stacked):
    """Gate, up [N, d, m] and down [N, m, d], multiplied from the right in a loop over all experts."""

    def build(self) -> None:
        self.w_in, self.w_gate, self.w_out = _small(N, D, M), _small(N, D, M), _small(N, M, D)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.w_gate.mT, self.w_in.mT, self.w_out.mT

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, index = self.route(flat)
        out = torch.zeros_like(flat)
        for e in range(N):
            token, slot = torch.where(index == e)
            rows = flat[token]
            y = (F.silu(rows @ self.w_gate[e]) * (rows @ self.w_in[e])) @ self.w_out[e]
            out.index_add_(0, token, y * weights[token, slot].unsqueeze(1))
        return out.view_as(x)


class FlatRows(Stacked):
    """Three matrices [N*m, d], viewed as [N, m, d] inside; down is used from the right."""

    def build(self) -> None:
        self.w1, self.v1, self.w2 = _small(N * M, D), _small(N * M, D), _small(N * M, D)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.w1.view(N, M, D), self.v1.view(N, M, D), self.w2.view(N, M, D).mT

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, index = self.route(flat)
        w1, v1, w2 = (w.view(N, M, D).chunk(N) for w in (self.w1, self.v1, self.w2))
        out = torch.zeros_like(flat)
        mask = F.one_hot(index, N).permute(2, 1, 0)
        for e in range(N):
            slot, token = torch.where(mask[e])
            rows = flat[token]
            hidden = F.silu(rows @ w1[e].squeeze(0).t()) * (rows @ v1[e].squeeze(0).t())
            out.index_add_(0, token, (hidden @ w2[e].squeeze(0)) * weights[token, slot, None])
        return out.reshape(x.shape)


class FlatColumns(Stacked):
    """Gate and up in one [d, 2*N*m], down [N*m, d]; neurons weighted between two dense products."""

    def build(self) -> None:
        self.w, self.o = _small(D, 2 * N * M), _small(N * M, D)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        gate, up = self.w.t().view(2, N, M, D)
        return gate, up, self.o.view(N, M, D).mT

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (x @ self.w).chunk(2, -1)
        hidden = (F.silu(gate) * up).unflatten(-1, (N, M))
        return (hidden * self.combine(x).unsqueeze(-1)).flatten(-2) @ self.o


class ParameterLists(Stacked):
    """One ParameterList per matrix kind."""

    def build(self) -> None:
        self.g = nn.ParameterList(_small(M, D) for _ in range(N))
        self.u = nn.ParameterList(_small(M, D) for _ in range(N))
        self.d = nn.ParameterList(_small(D, M) for _ in range(N))

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return torch.stack(list(self.g)), torch.stack(list(self.u)), torch.stack(list(self.d))

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(N):
            hidden = F.silu(F.linear(x, self.g[e])) * F.linear(x, self.u[e])
            out = out + F.linear(hidden, self.d[e]) * combine[..., e : e + 1]
        return out


class ListsOfLinears(Stacked):
    """A ModuleList of Linear per matrix kind."""

    def build(self) -> None:
        self.one, self.three = (nn.ModuleList(nn.Linear(D, M, bias=False) for _ in range(N)) for _ in range(2))
        self.two = nn.ModuleList(nn.Linear(M, D, bias=False) for _ in range(N))

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.stack([m.weight for m in part]) for part in (self.one, self.three, self.two))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, index = self.route(flat)
        out = flat.new_zeros(flat.shape)
        for e, (one, two, three) in enumerate(zip(self.one, self.two, self.three, strict=True)):
            slot_weight = (weights * (index == e)).sum(-1)
            token = slot_weight.nonzero().squeeze(-1)
            rows = flat.index_select(0, token)
            out[token] = out[token] + two(F.silu(one(rows)) * three(rows)) * slot_weight[token, None]
        return out.view(x.shape)


class NestedExperts(Listed):
    """Experts two levels down, in a ModuleDict of wrappers."""

    def build(self) -> None:
        self.bank = nn.ModuleDict({f"part_{e}": nn.ModuleDict({"inner": nn.Sequential(Ffn())}) for e in range(N)})

    @property
    def ffns(self) -> list[Ffn]:
        return [self.bank[f"part_{e}"]["inner"][0] for e in range(N)]


class _Fused(Stacked):
    def build(self) -> None:
        self.gu, self.o = _small(N, 2 * M, D), _small(N, D, M)

    def halves(self, fused: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return (*self.halves(self.gu, 1), self.o)

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        gate, up = self.halves(torch.einsum("...d,efd->...ef", x, self.gu), -1)
        y = torch.einsum("...ef,edf->...ed", F.silu(gate) * up, self.o)
        return (y * combine.unsqueeze(-1)).sum(-2)


class FusedGateUp(_Fused):
    """One stack [gate; up] in halves."""

    def halves(self, fused: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        return fused.chunk(2, axis)


class FusedUpGate(_Fused):
    """One stack [up; gate] in halves."""

    def halves(self, fused: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        up, gate = fused.split(M, axis)
        return gate, up


class InterleavedGateUp(_Fused):
    """One stack with rows gate, up, gate, up, ..."""

    def halves(self, fused: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        return (fused[..., ::2], fused[..., 1::2]) if axis == -1 else (fused[:, ::2], fused[:, 1::2])


class InterleavedUpGate(_Fused):
    """One stack with rows up, gate, up, gate, ..., taken apart by a reshape."""

    def halves(self, fused: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        pairs = fused.unflatten(axis, (M, 2))
        up, gate = pairs.unbind(-1 if axis == -1 else 2)
        return gate, up


class EmbeddingTables(Stacked):
    """Each expert's matrices are one row of an embedding table."""

    def build(self) -> None:
        self.t1, self.t2, self.t3 = (nn.Embedding(N, M * D) for _ in range(3))
        for table in (self.t1, self.t2, self.t3):
            nn.init.normal_(table.weight, std=0.2)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.t1.weight.view(N, M, D), self.t2.weight.view(N, M, D), self.t3.weight.view(N, D, M)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, index = self.route(flat)
        shape = (*index.shape, M, D)
        hidden = F.silu((self.t1(index).view(shape) @ flat[:, None, :, None]).squeeze(-1))
        hidden = hidden * (self.t2(index).view(shape) @ flat[:, None, :, None]).squeeze(-1)
        y = (self.t3(index).view(*index.shape, D, M) @ hidden.unsqueeze(-1)).squeeze(-1)
        return torch.einsum("tkd,tk->td", y, weights).view_as(x)


class GroupedConv1d(Stacked):
    """All experts as grouped 1-wide convolutions over the sequence."""

    def build(self) -> None:
        self.up = nn.Conv1d(N * D, 2 * N * M, 1, groups=N, bias=False)
        self.down = nn.Conv1d(N * M, N * D, 1, groups=N, bias=False)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        gate, up = self.up.weight.view(N, 2, M, D).unbind(1)
        return gate, up, self.down.weight.view(N, D, M)

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        gate, up = self.up(x.mT.repeat(1, N, 1)).view(batch, N, 2, M, tokens).unbind(2)
        y = self.down((F.silu(gate) * up).reshape(batch, N * M, tokens)).view(batch, N, D, tokens)
        return torch.einsum("bedt,bte->btd", y, combine)


class VisionConv2d(Stacked):
    """Channels first [B, C, H, W]: 1x1 convolutions as router and experts, every expert on every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Conv2d(D, N, 1)
        nn.init.normal_(self.r.weight, std=0.5)

    def build(self) -> None:
        self.gate = nn.ModuleList(nn.Conv2d(D, M, 1, bias=False) for _ in range(N))
        self.up = nn.ModuleList(nn.Conv2d(D, M, 1, bias=False) for _ in range(N))
        self.down = nn.ModuleList(nn.Conv2d(M, D, 1, bias=False) for _ in range(N))

    @staticmethod
    def arguments(x: Tensor) -> tuple[tuple[Tensor], dict]:
        batch, tokens, _ = x.shape
        height = next(h for h in (4, 3, 2, 1) if tokens % h == 0)
        return (x.mT.reshape(batch, D, height, tokens // height).contiguous(),), {}

    @staticmethod
    def hidden_first(out: Tensor) -> Tensor:
        return out.flatten(2).mT

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(torch.stack([m.weight.flatten(1) for m in part]) for part in (self.gate, self.up, self.down))

    def router_weight(self) -> Tensor:
        return self.r.weight.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.r(x).softmax(1).topk(2, 1)
        weights = weights / weights.sum(1, keepdim=True)
        out = torch.zeros_like(x)
        for e in range(N):
            weight = (weights * (index == e)).sum(1, keepdim=True)
            out = out + weight * self.down[e](F.silu(self.gate[e](x)) * self.up[e](x))
        return out


class VisionTokens(Listed):
    """Channels first at the door, tokens inside: a permuted, flattened token list and a loop over the hit experts."""

    arguments = staticmethod(VisionConv2d.arguments)
    hidden_first = staticmethod(VisionConv2d.hidden_first)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        flat = x.permute(0, 2, 3, 1).reshape(-1, channels)
        weights, index = self.route(flat)
        out = torch.zeros_like(flat)
        for e, ffn in enumerate(self.ffns):
            token, slot = torch.where(index == e)
            if token.numel():
                out.index_add_(0, token, ffn(flat[token]) * weights[token, slot, None])
        return out.view(batch, height, width, channels).permute(0, 3, 1, 2).contiguous()


class WideMasked(Stacked):
    """One wide FFN of N*m neurons in three Linears; each neuron is multiplied by its expert's weight."""

    def build(self) -> None:
        self.gate, self.up = nn.Linear(D, N * M, bias=False), nn.Linear(D, N * M, bias=False)
        self.down = nn.Linear(N * M, D, bias=False)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        down = self.down.weight.view(D, N, M).transpose(0, 1)
        return self.gate.weight.view(N, M, D), self.up.weight.view(N, M, D), down

    def forward(self, x: Tensor) -> Tensor:
        mask = self.combine(x).repeat_interleave(M, -1)
        return self.down(F.silu(self.gate(x)) * self.up(x) * mask)


class WeightNormed(Listed):
    """Every expert matrix is parametrised by weight normalisation."""

    def build(self) -> None:
        super().build()
        for ffn in self.ffns:
            for name in ("p", "q", "o"):
                weight_norm(getattr(ffn, name))


class OneVector(Stacked):
    """All experts in one long parameter vector, cut out by narrow and view."""

    def build(self) -> None:
        self.everything = _small(3 * N * M * D)

    def _cut(self, which: int, e: int) -> Tensor:
        return self.everything.narrow(0, (which * N + e) * M * D, M * D)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        gate, up, down = (torch.stack([self._cut(i, e) for e in range(N)]) for i in range(3))
        return gate.view(N, M, D), up.view(N, M, D), down.view(N, D, M)

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(N):
            hidden = F.silu(x @ self._cut(0, e).view(M, D).t()) * (x @ self._cut(1, e).view(M, D).t())
            out = out + combine[..., e, None] * (hidden @ self._cut(2, e).view(D, M).t())
        return out


class Buffers(Stacked):
    """Weights in buffers: nothing is a parameter but the router."""

    def build(self) -> None:
        self.register_buffer("a", torch.randn(N, M, D) * 0.2)
        self.register_buffer("b", torch.randn(N, M, D) * 0.2)
        self.register_buffer("c", torch.randn(N, D, M) * 0.2, persistent=False)


class ReverseOrder(Listed):
    """Row e of the router belongs to module N-1-e."""

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(w.flip(0) for w in super().weights())

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        return sum(combine[..., N - 1 - e, None] * ffn(x) for e, ffn in enumerate(self.ffns))


class PermutedTable(Stacked):
    """A buffer maps router rows to storage slots, and the chosen slots' matrices are gathered."""

    def build(self) -> None:
        super().build()
        self.register_buffer("slot_of", torch.tensor([3, 1, 7, 0, 5, 2, 6, 4]))

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.a[self.slot_of], self.b[self.slot_of], self.c[self.slot_of]

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, index = self.route(flat)
        slot = self.slot_of[index]
        hidden = torch.einsum("td,tkid->tki", flat, self.b[slot])
        hidden = hidden * F.silu(torch.einsum("td,tkid->tki", flat, self.a[slot]))
        return torch.einsum("tki,tkdi,tk->td", hidden, self.c[slot], weights).view(x.shape)


class Sharded(Stacked):
    """Each expert is cut into two tensor-parallel shards whose outputs are added."""

    def build(self) -> None:
        self.left = nn.ModuleList(Ffn(M // 2) for _ in range(N))
        self.right = nn.ModuleList(Ffn(M // 2) for _ in range(N))

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        pairs = list(zip(self.left, self.right, strict=True))
        gate = torch.stack([torch.cat([a.p.weight, b.p.weight]) for a, b in pairs])
        up = torch.stack([torch.cat([a.q.weight, b.q.weight]) for a, b in pairs])
        return gate, up, torch.stack([torch.cat([a.o.weight, b.o.weight], 1) for a, b in pairs])

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        parts = zip(self.left, self.right, strict=True)
        return sum(combine[..., e, None] * (a(x) + b(x)) for e, (a, b) in enumerate(parts))


class RouterInWideMatrix(Stacked):
    """The router's rows are the last rows of the matrix that also holds every gate: one product gives both."""

    def build(self) -> None:
        super().build()
        self.w = _small(N * M + N, D)
        with torch.no_grad():
            self.w[N * M :].normal_(std=0.5)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.w[: N * M].view(N, M, D), self.b, self.c

    def router_weight(self) -> Tensor:
        return self.w[N * M :]

    def forward(self, x: Tensor) -> Tensor:
        gate, logits = (x @ self.w.t()).split([N * M, N], -1)
        weights, index = logits.softmax(-1).topk(2, -1)
        combine = torch.zeros_like(logits).scatter(-1, index, weights / weights.sum(-1, keepdim=True))
        hidden = F.silu(gate.unflatten(-1, (N, M))) * torch.einsum("...d,eid->...ei", x, self.b)
        return torch.einsum("...ei,edi,...e->...d", hidden, self.c, combine)


class AllBiases(Coding):
    """Two-matrix gelu experts as Sequentials with biases, and a router with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Linear(D, N)
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(D, M), nn.GELU(), nn.Linear(M, D)) for _ in range(N))

    def truth(self) -> MoESpec:
        up, down = (torch.stack([m[i].weight for m in self.mlps]) for i in (0, 2))
        up_bias, down_bias = (torch.stack([m[i].bias for m in self.mlps]) for i in (0, 2))
        experts = ExpertsSpec(up, down, None, None, up_bias, down_bias, Activation("gelu"))
        return MoESpec(RouterSpec(self.r.weight, 2, self.r.bias, normalize="sum"), experts)

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.r(x).softmax(-1).topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        every = torch.stack([mlp(x) for mlp in self.mlps], -2)
        picked = every.take_along_dim(index.unsqueeze(-1), -2)
        return (picked * weights.unsqueeze(-1)).sum(-2)


class InterleavedClampedGlu(Coding):
    """Transposed, interleaved, clamped GLU with slope 1.702 and up + 1, biases everywhere, router with a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Linear(D, N)
        self.gu, self.gu_bias = _small(N, D, 2 * M), _small(N, 2 * M)
        self.o, self.o_bias = _small(N, M, D), _small(N, D)

    def truth(self) -> MoESpec:
        glu = Activation("silu", 1.702, gate_max=1.5, up_min=-1.5, up_max=1.5, up_offset=1.0)
        (gate, up), (gate_bias, up_bias) = ((w[..., ::2], w[..., 1::2]) for w in (self.gu, self.gu_bias))
        experts = ExpertsSpec(up.mT, self.o.mT, gate.mT, gate_bias, up_bias, self.o_bias, glu)
        return MoESpec(RouterSpec(self.r.weight, 2, self.r.bias, order="topk_first"), experts)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        top, index = self.r(flat).topk(2, -1)
        combine = torch.zeros(flat.shape[0], N, dtype=x.dtype).scatter_(1, index, top.softmax(-1))
        both = torch.bmm(flat.expand(N, -1, -1), self.gu) + self.gu_bias[:, None]
        gate, up = both[..., ::2].clamp(max=1.5), both[..., 1::2].clamp(-1.5, 1.5)
        y = torch.bmm((up + 1) * (gate * torch.sigmoid(1.702 * gate)), self.o) + self.o_bias[:, None]
        return (y * combine.t()[..., None]).sum(0).view_as(x)


class Bfloat16Experts(Listed):
    """A full-precision router over experts in bf16; the sum is kept in the input's precision."""

    tolerance = 2e-2  # one bf16 rounding is 4e-3

    def build(self) -> None:
        super().build()
        self.ffns.to(torch.bfloat16)

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        return sum(combine[..., e, None] * ffn(x.bfloat16()).to(x.dtype) for e, ffn in enumerate(self.ffns))


class TiedTwoBlocks(Coding):
    """Two blocks in a row with routers of their own and the same experts."""

    blocks = 2

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Listed(), Listed()
        self.second.ffns = self.first.ffns

    def expected(self, x: Tensor) -> Tensor:
        x = x + reference(self.first.truth(), x)
        return x + reference(self.second.truth(), x)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.second(x)


MOES = {
    c.__name__: c
    for c in (
        TransposedStacks, FlatRows, FlatColumns, ParameterLists, ListsOfLinears, NestedExperts, FusedGateUp,
        FusedUpGate, InterleavedGateUp, InterleavedUpGate, EmbeddingTables, GroupedConv1d, VisionConv2d,
        VisionTokens, WideMasked, WeightNormed, OneVector, Buffers, ReverseOrder, PermutedTable, Sharded,
        RouterInWideMatrix, AllBiases, InterleavedClampedGlu, Bfloat16Experts, TiedTwoBlocks,
    )
}  # fmt: skip
