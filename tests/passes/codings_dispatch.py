"""One routing and one mathematics; tokens brought to their experts and back in every way."""

from __future__ import annotations

import math
import threading
from typing import Any

import torch
import torch.nn.functional as F
from codings_base import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, Coding, Listed, Stacked, reference
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

N, D, M = EXPERTS, HIDDEN, INTERMEDIATE


class _FlatListed(Listed):
    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, index = self.route(flat)
        return self.dispatch(flat, weights, index).view(x.shape)

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        raise NotImplementedError


class _FlatStacked(Stacked):
    forward = _FlatListed.forward
    dispatch = _FlatListed.dispatch

    def expert(self, e: int, rows: Tensor) -> Tensor:
        return F.linear(F.silu(F.linear(rows, self.a[e])) * F.linear(rows, self.b[e]), self.c[e])


class SplitCat(_FlatListed):
    """Sorted, split by bincount, concatenated, put back by the inverse order."""

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        order = index.view(-1).argsort()
        sizes = index.view(-1).bincount(minlength=N).tolist()
        parts = x.repeat_interleave(TOP_K, 0)[order].split(sizes)
        rows = torch.cat([ffn(part) for ffn, part in zip(self.ffns, parts, strict=True)])
        return (rows[order.argsort()].view(-1, TOP_K, D) * weights[..., None]).sum(1)


class AnyContinue(_FlatListed):
    """An expert-major loop that skips idle experts."""

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(N):
            mask = (index == e).any(-1)
            if not mask.any():
                continue
            weight = weights[mask][index[mask] == e].unsqueeze(-1)
            out[mask] += weight * self.ffns[e](x[mask])
        return out


class IndexPutAccumulate(_FlatStacked):
    """Contributions put back with index_put(accumulate=True)."""

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(N):
            token, slot = (index == e).nonzero(as_tuple=True)
            out.index_put_((token,), self.expert(e, x[token]) * weights[token, slot, None], accumulate=True)
        return out


class ScatterAdd(_FlatStacked):
    """Contributions put back with scatter_add over expanded indices."""

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(N):
            slot, token = torch.where(index.t() == e)
            y = self.expert(e, x[token]) * weights[token, slot].unsqueeze(-1)
            out = out.scatter_add(0, token.unsqueeze(-1).expand(-1, D), y)
        return out


class BmmMaxCount(_FlatStacked):
    """Padded to the busiest expert's count, found at run time."""

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        flat = index.flatten()
        counts = torch.bincount(flat, minlength=N)
        order = flat.argsort(stable=True)
        start = counts.cumsum(0) - counts
        slot = torch.arange(flat.numel()) - start[flat[order]]
        buffer = x.new_zeros(N, int(counts.max()), D)
        buffer[flat[order], slot] = x[order // TOP_K]
        y = torch.bmm(F.silu(torch.bmm(buffer, self.a.mT)) * torch.bmm(buffer, self.b.mT), self.c.mT)
        rows = torch.empty(flat.numel(), D, dtype=x.dtype)
        rows[order] = y[flat[order], slot]
        return torch.einsum("tkd,tk->td", rows.view(-1, TOP_K, D), weights)


class GatherBmm(_FlatStacked):
    """Decoding style: each (token, slot) pair is a batch entry with its own matrices."""

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        expert = index.reshape(-1)
        rows = x.repeat_interleave(TOP_K, 0).unsqueeze(-1)
        hidden = F.silu(torch.bmm(self.a[expert], rows)) * torch.bmm(self.b[expert], rows)
        y = torch.bmm(self.c.index_select(0, expert), hidden).squeeze(-1)
        return (y.view(-1, TOP_K, D) * weights.unsqueeze(-1)).sum(1)


class SlotLoop(_FlatStacked):
    """One pass per slot, gathering that slot's expert."""

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = 0
        for k in range(TOP_K):
            e = index[:, k]
            hidden = F.silu((self.a[e] @ x.unsqueeze(-1)).squeeze(-1)) * (self.b[e] @ x.unsqueeze(-1)).squeeze(-1)
            out = out + weights[:, k : k + 1] * torch.einsum("tdm,tm->td", self.c[e], hidden)
        return out


class GroupedMm(_FlatStacked):
    """torch's grouped_mm over rows sorted by expert, with cumulative offsets."""

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        order = index.flatten().argsort()
        ends = torch.bincount(index.flatten(), minlength=N).cumsum(0).to(torch.int32)
        rows = x[order // TOP_K]
        gate, up = F.grouped_mm(rows, self.a.mT, offs=ends), F.grouped_mm(rows, self.b.mT, offs=ends)
        y = F.grouped_mm(F.silu(gate) * up, self.c.mT, offs=ends) * weights.flatten()[order].unsqueeze(-1)
        return torch.zeros_like(x).index_add_(0, order // TOP_K, y)


class Where(_FlatListed):
    """Every expert on every token, torch.where against zero."""

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, ffn in enumerate(self.ffns):
            for k in range(TOP_K):
                mine = (index[:, k] == e).unsqueeze(-1)
                out = out + torch.where(mine, ffn(x) * weights[:, k, None], torch.zeros_like(x))
        return out


class TokenLoop(Listed):
    """One token at a time, in Python."""

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for token in x.reshape(-1, D):
            weights, index = self.route(token)
            rows.append(sum(w * self.ffns[e](token) for w, e in zip(weights, index.tolist(), strict=True)))
        return torch.stack(rows).view(x.shape)


class TokenLoopIndexed(TokenLoop):
    """One token at a time, cut out of a slice; its experts' outputs are stacked and weighted together."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        rows = []
        for t in range(flat.shape[0]):
            weights, index = self.route(flat[t : t + 1])
            chosen = [self.ffns[e](flat[t]) for e in index[0].tolist()]
            rows.append((torch.stack(chosen) * weights[0, :, None]).sum(0))
        return torch.stack(rows).view(x.shape)


class NonzeroHit(_FlatStacked):
    """A loop over the experts that got tokens, from a nonzero over their counts."""

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        mask = F.one_hot(index, N).permute(2, 1, 0)
        for hit in torch.greater(mask.sum(dim=(-1, -2)), 0).nonzero():
            e = hit[0]
            slot, token = torch.where(mask[e])
            out.index_add_(0, token, self.expert(e, x[token]) * weights[token, slot, None])
        return out


class NumpyCounts(_FlatListed):
    """Counts go through numpy and a running start, outputs through a list."""

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        counts = x.new_zeros(index.shape[0], N).scatter_(1, index, 1).sum(0).long().cpu().numpy()
        order = index.view(-1).argsort()
        rows, start, outputs = x[order // TOP_K], 0, []
        for e, count in enumerate(counts):
            if count == 0:
                continue
            outputs.append(self.ffns[e](rows[start : start + count]))
            start += count
        merged = torch.cat(outputs, 0) if outputs else rows.new_empty(0, D)
        back = torch.empty_like(merged)
        back[order] = merged
        return back.view(*index.shape, -1).mul_(weights.unsqueeze(-1)).sum(1)


class PermuteUnpermute(_FlatStacked):
    """A routing map [T, N]; tokens permuted by its transpose, unpermuted by scatter_add with their probabilities."""

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        probs = torch.zeros(x.shape[0], N, dtype=x.dtype).scatter(1, index, weights)
        routing_map = torch.zeros(x.shape[0], N).int().scatter(1, index, 1).bool()
        counts = routing_map.sum(0)
        token = torch.arange(x.shape[0]).unsqueeze(0).expand(N, -1).masked_select(routing_map.t())
        permuted = x.index_select(0, token)
        parts = torch.split(permuted, counts.tolist())
        y = torch.cat([self.expert(e, part) for e, part in enumerate(parts)])
        y = y * probs.t().masked_select(routing_map.t()).unsqueeze(-1)
        return torch.zeros_like(x).scatter_add_(0, token.unsqueeze(1).expand(-1, D), y)


class DispatchCombine(Listed):
    """Dispatch and combine tensors [T, N, C], positions by a cumulative sum per choice, capacity = tokens."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        capacity = flat.shape[0]
        p = self.r(flat).softmax(-1)
        first = F.one_hot(p.argmax(-1), N)
        second = F.one_hot(p.masked_fill(first.bool(), 0).argmax(-1), N)
        place1 = (first.cumsum(0) - 1) * first
        place2 = ((second.cumsum(0) - 1) + first.sum(0, keepdim=True)) * second
        p1, p2 = (p * first).sum(-1), (p * second).sum(-1)
        total = p1 + p2
        slot1 = F.one_hot(place1.sum(-1), capacity).to(flat)
        slot2 = F.one_hot(place2.sum(-1), capacity).to(flat)
        combine = torch.einsum("t,te,tc->tec", p1 / total, first.to(flat), slot1)
        combine = combine + torch.einsum("t,te,tc->tec", p2 / total, second.to(flat), slot2)
        buffer = torch.einsum("tec,td->ecd", combine.bool().to(flat), flat)
        y = torch.stack([ffn(rows) for ffn, rows in zip(self.ffns, buffer.unbind(0), strict=True)])
        return torch.einsum("tec,ecd->td", combine, y).reshape(x.shape)


class Vmapped(Stacked):
    """vmap over the stacked experts."""

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        def ffn(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            return F.linear(F.silu(F.linear(x, a)) * F.linear(x, b), c)

        return (torch.vmap(ffn)(self.a, self.b, self.c) * combine.permute(2, 0, 1).unsqueeze(-1)).sum(0)


class ChunkedTokens(_FlatListed):
    """At most 16 tokens at a time."""

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        parts = zip(x.split(16), weights.split(16), index.split(16), strict=True)
        return torch.cat([self._part(*part) for part in parts])

    def _part(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, ffn in enumerate(self.ffns):
            weight = weights.masked_fill(index != e, 0).sum(-1)
            token = weight.nonzero().flatten()
            out.index_add_(0, token, weight[token, None] * ffn(x[token]))
        return out


class DecodePath(_FlatStacked):
    """One coding for a single token, another for more; the same mathematics."""

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        if x.shape[0] == 1:
            return sum(weights[:, k, None] * self.expert(int(index[0, k]), x) for k in range(TOP_K))
        combine = torch.zeros(x.shape[0], N, dtype=x.dtype).scatter(1, index, weights)
        return self.dense(x, combine)


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights)
        return torch.einsum("tkd,tk->td", rows, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        rows, weights = ctx.saved_tensors
        return grad.unsqueeze(1) * weights.unsqueeze(-1), torch.einsum("td,tkd->tk", grad, rows)


class AutogradFunction(_FlatStacked):
    """Combined by a custom autograd function."""

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        hidden = F.silu(torch.einsum("td,tkid->tki", x, self.a[index])) * torch.einsum("td,tkid->tki", x, self.b[index])
        return _WeightedSum.apply(torch.einsum("tki,tkdi->tkd", hidden, self.c[index]), weights)


class Checkpointed(_FlatListed):
    """Each expert under activation checkpointing."""

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e, ffn in enumerate(self.ffns):
            token, slot = torch.where(index == e)
            out = out.index_add(0, token, checkpoint(ffn, x[token], use_reentrant=False) * weights[token, slot, None])
        return out


class TakeFromStack(Listed):
    """All experts' outputs stacked, the chosen ones taken by advanced indexing."""

    def forward(self, x: Tensor) -> Tensor:
        weights, index = self.route(x)
        every = torch.stack([ffn(x) for ffn in self.ffns], dim=2)  # [B, T, N, d]
        b, t = torch.meshgrid(torch.arange(x.shape[0]), torch.arange(x.shape[1]), indexing="ij")
        return (every[b[..., None], t[..., None], index] * weights.unsqueeze(-1)).sum(2)


class SparseProduct(_FlatStacked):
    """Contributions combined by a sparse matrix product."""

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        order = index.flatten().argsort(stable=True)
        counts = F.one_hot(index.flatten(), N).sum(0).tolist()
        rows = torch.cat([self.expert(e, p) for e, p in enumerate(x[order // TOP_K].split(counts))])
        where = torch.stack([order // TOP_K, torch.arange(order.numel())])
        matrix = torch.sparse_coo_tensor(where, weights.flatten()[order], (x.shape[0], order.numel()))
        return torch.sparse.mm(matrix, rows)


class SequenceBySequence(Listed):
    """One sequence of the batch at a time, 3-d tensors only inside a loop."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.dense(row, self.combine(row)) for row in x])


class KeywordOnly(Stacked):
    """Takes its hidden states by keyword, next to a nested argument and a flag."""

    @staticmethod
    def arguments(x: Tensor) -> tuple[tuple[()], dict[str, Any]]:
        return (), {"hidden_states": x, "extra": {"scale": 1.0, "unused": None}, "flag": True}

    def forward(self, *, hidden_states: Tensor, extra: dict[str, Any], flag: bool = False) -> Tensor:
        out = self.dense(hidden_states, self.combine(hidden_states))
        return out * extra["scale"] if flag else out


class CalledTwice(Coding):
    """One block, called twice in a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.block = SplitCat()

    def expected(self, x: Tensor) -> Tensor:
        once = x + reference(self.block.truth(), x)
        return once + reference(self.block.truth(), once)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.block(x)
        return x + self.block(x)


class AddedInPlace(_FlatStacked):
    """The residual stream is a clone that experts are added into in place."""

    def expected(self, x: Tensor) -> Tensor:
        return x + reference(self.truth(), x)

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = x.clone()
        for e in range(N):
            token, slot = torch.where(index == e)
            out.index_add_(0, token, self.expert(e, x[token]).mul_(weights[token, slot, None]))
        return out


class Scripted(Stacked):
    """Routed by a TorchScript function."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _scripted_route(self.r(x), TOP_K)


@torch.jit.script
def _scripted_route(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weights, index = torch.topk(torch.softmax(logits, -1), k, -1)
    return weights / weights.sum(-1, keepdim=True), index


class DroppingCapable(_FlatListed):
    """Tokens past a capacity would be dropped, but the capacity holds every token."""

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out, capacity = torch.zeros_like(x), x.shape[0] * TOP_K
        for e, ffn in enumerate(self.ffns):
            token, slot = torch.where(index == e)
            token, slot = token[:capacity], slot[:capacity]
            out.index_add_(0, token, ffn(x[token]) * weights[token, slot, None])
        return out


class NestedSequentialFfn(_FlatListed):
    """Experts as Sequentials with the GLU product in a lambda-like module."""

    def build(self) -> None:
        class Product(nn.Module):
            def forward(self, both: Tensor) -> Tensor:
                gate, up = both.chunk(2, -1)
                return F.silu(gate) * up

        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(D, 2 * M, bias=False), Product(), nn.Dropout(0.1), nn.Linear(M, D, bias=False))
            for _ in range(N)
        )

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        both = torch.stack([e[0].weight for e in self.experts])
        return both[:, :M], both[:, M:], torch.stack([e[3].weight for e in self.experts])

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in index.unique():
            token, slot = torch.where(index == e)
            out[token] += weights[token, slot].unsqueeze(-1) * self.experts[int(e)](x[token])
        return out


class RowsOfExperts(_FlatStacked):
    """Sigmoids in rows of experts, zero where an expert is not selected, on the inputs of all experts."""

    rule = {"score": "sigmoid", "order": "topk_first", "applies_to": "input"}  # noqa: RUF012

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits, index = self.r(x).topk(TOP_K, -1)
        return logits, index

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        by_expert = torch.full((len(x), N), float("-inf"), dtype=x.dtype).scatter(1, index, weights).T.sigmoid()
        every = torch.arange(len(x)).expand(N, -1).reshape(-1, 1).expand(-1, D)
        inputs = x.gather(0, every) * by_expert.reshape(-1, 1)
        rows = inputs.view(N, -1, D)
        hidden = F.silu(torch.bmm(rows, self.a.mT)) * torch.bmm(rows, self.b.mT)
        return torch.zeros_like(x).scatter_add(0, every, torch.bmm(hidden, self.c.mT).view(-1, D))


class HoldsHandles(_FlatStacked):
    """Experts behind a lock, counted by a Python module: handles, which no copy can hold a copy of."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()
        self.tools = {"math": math, "again": [threading.Lock()]}

    def dispatch(self, x: Tensor, weights: Tensor, index: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(N):
            with self.lock:
                slot, token = torch.where((index == e).T)
                out.index_add_(0, token, self.expert(e, x[token]) * weights[token, slot, None])
        return out * self.tools["math"].exp(0.0)


MOES = {
    c.__name__: c
    for c in (
        SplitCat, AnyContinue, IndexPutAccumulate, ScatterAdd, BmmMaxCount, GatherBmm, SlotLoop, GroupedMm,
        Where, TokenLoop, TokenLoopIndexed, NonzeroHit, NumpyCounts, PermuteUnpermute, DispatchCombine, Vmapped,
        ChunkedTokens,
        DecodePath, AutogradFunction, Checkpointed, TakeFromStack, SparseProduct, SequenceBySequence,
        KeywordOnly, CalledTwice, AddedInPlace, Scripted, DroppingCapable, NestedSequentialFfn,
        RowsOfExperts, HoldsHandles,
    )
}  # fmt: skip
