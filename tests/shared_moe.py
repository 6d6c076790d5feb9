"""Small models with a shared expert beside their routed ones, or with something that looks like it."""

import torch
import torch.nn.functional as F
from torch import nn

D, M, N, K, S = 16, 12, 6, 2, 20


class Routed(nn.Module):
    """Two of six experts, gated by silu, in a loop."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(D, N, bias=False)
        self.a = nn.Parameter(torch.randn(N, 2 * M, D) * 0.3)
        self.c = nn.Parameter(torch.randn(N, D, M) * 0.3)

    def forward(self, x):
        flat = x.reshape(-1, D)
        weights, chosen = self.router(flat).softmax(-1).topk(K, -1)
        out = torch.zeros_like(flat)
        for e in range(N):
            row, slot = torch.where(chosen == e)
            gate, up = F.linear(flat[row], self.a[e]).chunk(2, -1)
            out.index_add_(0, row, F.linear(F.silu(gate) * up, self.c[e]) * weights[row, slot, None])
        return out.view_as(x)


class Clamped(nn.Linear):
    def forward(self, x):
        return super().forward(x).clamp(-0.1, 0.1)


class Shared(nn.Module):
    """An ordinary two-layer network."""

    def __init__(self, *, bias=False, last=nn.Linear):
        super().__init__()
        self.first = nn.Linear(D, S, bias=False)
        self.second = last(S, D, bias=bias)

    def forward(self, x):
        return self.second(F.gelu(self.first(x)))


class Layer(nn.Module):
    """The norm, the routed experts and what is beside them, put together as `kind` says; x [B, T, D]."""

    def __init__(self, kind, shared):
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(D)
        self.routed = Routed()
        self.beside = shared
        self.gate = nn.Linear(D, 1)
        self.after = nn.LayerNorm(D)

    def forward(self, x):
        h, aux = self.norm(x), x.new_zeros(())
        if self.kind == "alone":
            return x + self.routed(h), aux
        read = {"reads other tokens": h.cumsum(1), "reads something else": x.sin()}.get(self.kind, h)
        s = self.beside(read)
        if self.kind == "gated":
            return x + self.routed(h) + torch.sigmoid(self.gate(h)) * s, aux
        if self.kind == "scaled":
            return x + 0.5 * (self.routed(h) - 3.0 * s), aux
        if self.kind == "in place":
            y = self.routed(h)
            y += s
            return x + y, aux
        if self.kind == "used elsewhere":
            aux = 1e-3 * s.square().mean()
        elif self.kind == "feeds the experts":
            return x + self.routed(h + s) + s, aux
        elif self.kind == "weight read elsewhere":
            aux = F.linear(h[..., :1].expand(*h.shape[:-1], S), self.beside.second.weight).mean()
        elif self.kind == "normed":
            s = self.after(s)
        elif self.kind == "gates itself":
            s = torch.sigmoid(s.sum(-1, keepdim=True)) * s
        elif self.kind == "twice":
            s = s + self.beside(-h)
        elif self.kind == "product":
            return x + self.routed(h) * s, aux
        return x + self.routed(h) + s, aux


class Net(nn.Module):
    """Token ids to (logits, aux) through some layers."""

    def __init__(self, kind="plain", layers=2, *, bias=False, tied=False, last=nn.Linear):
        super().__init__()
        self.embed = nn.Embedding(40, D)
        one = Shared(bias=bias, last=last)
        self.layers = nn.ModuleList(
            Layer(kind, None if kind == "alone" else one if tied and not i else Shared(bias=bias, last=last))
            for i in range(layers)
        )
        if tied:
            for layer in self.layers:
                layer.beside.second.weight = one.second.weight
        self.head = nn.Linear(D, 40)

    def forward(self, ids):
        x, total = self.embed(ids), 0.0
        for layer in self.layers:
            x, aux = layer(x)
            total = total + aux
        return self.head(x), total


def net(kind="plain", layers=2, **options):
    torch.manual_seed(0)
    return Net(kind, layers, **options).eval()


def ids(seed=0, batch=4, tokens=24):
    return torch.randint(40, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def data(batches=8):
    return [(ids(seed, 8, 32),) for seed in range(1, batches + 1)]
