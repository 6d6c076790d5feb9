"""What stands around the routed path or inside the experts: shared experts, norms, returns, activations, models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from codings_base import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, Coding, Ffn, Listed, Stacked, reference
from torch import Tensor, nn

from latentize.activations import Activation
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec

N, D, M = EXPERTS, HIDDEN, INTERMEDIATE


class ReturnsTuple(Listed):
    """Returns (hidden states, router logits)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.dense(x, self.combine(x)), self.r(x)


class ReturnsDict(Stacked):
    """Returns a dict with a load-balancing loss and a z-loss."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        flat = x.reshape(-1, D)
        logits = self.r(flat)
        p = logits.softmax(-1)
        values, index = p.topk(TOP_K, -1)
        routed = F.one_hot(index, N).to(p)
        aux = N * (routed.sum(1).mean(0) * p.mean(0)).sum()
        combine = (routed * (values / values.sum(-1, keepdim=True)).unsqueeze(-1)).sum(1)
        z_loss = logits.logsumexp(-1).square().mean()
        return {"aux_loss": aux, "out": self.dense(flat, combine).view_as(x), "z_loss": z_loss}


class LossInAttribute(Listed):
    """Keeps its auxiliary loss on itself."""

    def forward(self, x: Tensor) -> Tensor:
        p = self.r(x).softmax(-1)
        self.last_loss = p.mean((0, 1)).square().sum() * N
        return self.dense(x, self.combine(x))


class GatedShared(Listed):
    """A shared expert behind a sigmoid gate of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.how_much = Ffn(40), nn.Linear(D, 1, bias=False)

    def expected(self, x: Tensor) -> Tensor:
        return reference(self.truth(), x) + self.how_much(x).sigmoid() * self.always(x)

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        weights, index = self.route(flat)
        out = torch.zeros_like(flat)
        for e, ffn in enumerate(self.ffns):
            token, slot = torch.where(index == e)
            out.index_add_(0, token, ffn(flat[token]) * weights[token, slot, None])
        return (out + torch.sigmoid(self.how_much(flat)) * self.always(flat)).view(x.shape)


class PreNormResidual(Listed):
    """A pre-norm residual block in one module."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)
        nn.init.normal_(self.norm.weight, 1.0, 0.3)

    def expected(self, x: Tensor) -> Tensor:
        return x + reference(self.truth(), self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.dense(h, self.combine(h))


class PostNorm(Stacked):
    """The routed output is normalised before the residual is added."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(D)

    def expected(self, x: Tensor) -> Tensor:
        return x + self.norm(reference(self.truth(), x))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.norm(self.dense(x, self.combine(x)))


class ScaledOutput(Stacked):
    """The whole routed output times a constant, plus a learned bias."""

    def __init__(self) -> None:
        super().__init__()
        self.add = nn.Parameter(torch.randn(D))

    def truth(self) -> MoESpec:
        return replace(super().truth(), output_scale=0.5, output_bias=self.add)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x, self.combine(x)) * 0.5 + self.add


class SharedAmongRouted(Listed):
    """The last module of the experts' list is always on; the router knows only the others."""

    def build(self) -> None:
        super().build()
        self.ffns.append(Ffn())

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(w[:N] for w in super().weights())

    def expected(self, x: Tensor) -> Tensor:
        return reference(self.truth(), x) + self.ffns[N](x)

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        return sum(combine[..., e, None] * self.ffns[e](x) for e in range(N)) + self.ffns[-1](x)


class SharedSameShape(Stacked):
    """A shared expert of the same size and coding, on the same input, times 0.4; the routed path times 2."""

    rule = {"normalize": "none", "scale": 2.0}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.always = Ffn()

    def expected(self, x: Tensor) -> Tensor:
        return reference(self.truth(), x) + 0.4 * self.always(x)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.r(x).softmax(-1).topk(TOP_K, -1)

    def forward(self, x: Tensor) -> Tensor:
        return 0.4 * self.always(x) + 2.0 * self.dense(x, self.combine(x))


class RoutedGate(Stacked):
    """The router's last row is no expert but the gate of a shared expert."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Linear(D, N + 1, bias=False)
        nn.init.normal_(self.r.weight, std=0.5)
        self.always = Ffn()

    def router_weight(self) -> Tensor:
        return self.r.weight[:N]

    def expected(self, x: Tensor) -> Tensor:
        return reference(self.truth(), x) + (x @ self.r.weight[N]).sigmoid().unsqueeze(-1) * self.always(x)

    def forward(self, x: Tensor) -> Tensor:
        logits, gate = self.r(x).split([N, 1], -1)
        weights, index = logits.softmax(-1).topk(TOP_K, -1)
        combine = torch.zeros_like(logits).scatter(-1, index, weights / weights.sum(-1, keepdim=True))
        return self.dense(x, combine) + gate.sigmoid() * self.always(x)


class IdentityExperts(Listed):
    """Four further experts return their input; softmax over all twelve, with a selection bias, scaled."""

    top_k = 3
    rule = {"normalize": "none", "scale": 1.7}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Linear(D, N + 4, bias=False)
        nn.init.normal_(self.r.weight, std=0.5)
        self.register_buffer("tilt", torch.randn(N + 4) * 0.05)

    def router_tensors(self) -> dict[str, Tensor]:
        return {"selection_bias": self.tilt}

    def truth(self) -> MoESpec:
        spec = super().truth()
        return replace(spec, experts=replace(spec.experts, num_identity=4))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, D)
        p = self.r(flat).softmax(-1)
        index = (p + self.tilt).topk(3, -1).indices
        weights = p.gather(1, index) * 1.7
        out = torch.zeros_like(flat)
        for e in range(N + 4):
            token, slot = torch.where(index == e)
            rows = flat[token]
            out.index_add_(0, token, (self.ffns[e](rows) if e < N else rows) * weights[token, slot, None])
        return out.view_as(x)


class TrainOnly(Listed):
    """Noise, jitter and dropout while training only; a selection bias that training updates."""

    rule = {"score": "sigmoid", "normalize": "sum"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("tilt", torch.randn(N) * 0.2)
        self.drop = nn.Dropout(0.3)

    def router_tensors(self) -> dict[str, Tensor]:
        return {"selection_bias": self.tilt}

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x * torch.empty_like(x).uniform_(0.9, 1.1)
        logits = self.r(x)
        if self.training:
            logits = logits + torch.randn_like(logits)
        score = logits.sigmoid()
        index = (score + self.tilt).topk(TOP_K, -1).indices
        if self.training:
            self.tilt.add_(0.01 * torch.sign(2 / N - F.one_hot(index, N).sum(-2).float().mean((0, 1))))
        weights = score.gather(-1, index)
        combine = torch.zeros_like(score).scatter(-1, index, weights / weights.sum(-1, keepdim=True))
        return self.drop(self.dense(x, combine))


class Finite(Stacked):
    """nan_to_num, contiguous, clone and casts to the same type: nothing that changes a finite value."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.nan_to_num(x.clone()).contiguous().to(x.dtype)
        return torch.nan_to_num(self.dense(h, self.combine(h).clone())).reshape(x.shape)


class Misnamed(Coding):
    """`experts` is a dense FFN, `router` a projection, `attention` a norm, and `mlp` the MoE."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.router, self.attention, self.mlp = Ffn(), nn.Linear(D, N), nn.LayerNorm(D), Listed()
        self.gate = nn.Linear(N, D)

    def _before(self, x: Tensor) -> Tensor:
        x = x + self.experts(x)
        return self.attention(x + self.gate(self.router(x)))

    def expected(self, x: Tensor) -> Tensor:
        x = self._before(x)
        return x + reference(self.mlp.truth(), x)

    def forward(self, x: Tensor) -> Tensor:
        x = self._before(x)
        return x + self.mlp(x)


class TwoInARow(Coding):
    """Two different blocks one after the other."""

    blocks = 2

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(Listed(), nn.LayerNorm(D), Stacked())

    def expected(self, x: Tensor) -> Tensor:
        return reference(self.layers[2].truth(), self.layers[1](reference(self.layers[0].truth(), x)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class SideBySide(Coding):
    """Two blocks on the same hidden state, added."""

    blocks = 2

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = Stacked(), Stacked()

    def expected(self, x: Tensor) -> Tensor:
        return reference(self.left.truth(), x) + reference(self.right.truth(), x)

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


class TwoInOneModule(Coding):
    """Two blocks on the same hidden state, both written out in one forward without modules of their own."""

    blocks = 2

    def __init__(self) -> None:
        super().__init__()
        self.r1, self.r2 = nn.Linear(D, N, bias=False), nn.Linear(D, N, bias=False)
        nn.init.normal_(self.r1.weight, std=0.5)
        nn.init.normal_(self.r2.weight, std=0.5)
        self.w = nn.ParameterList(nn.Parameter(torch.randn(N, *s) * 0.2) for s in ((M, D), (D, M), (M, D), (D, M)))

    def _spec(self, router: nn.Linear, up: Tensor, down: Tensor) -> MoESpec:
        experts = ExpertsSpec(up, down, activation=Activation("gelu"))
        return MoESpec(RouterSpec(router.weight, 2, normalize="sum"), experts)

    def expected(self, x: Tensor) -> Tensor:
        first = self._spec(self.r1, self.w[0], self.w[1])
        return reference(first, x) + reference(self._spec(self.r2, self.w[2], self.w[3]), x)

    def _path(self, x: Tensor, router: nn.Linear, up: Tensor, down: Tensor) -> Tensor:
        weights, index = router(x).softmax(-1).topk(2, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        combine = torch.zeros(*x.shape[:-1], N, dtype=x.dtype).scatter(-1, index, weights)
        hidden = F.gelu(torch.einsum("btd,emd->btem", x, up)) * combine.unsqueeze(-1)
        return torch.einsum("btem,edm->btd", hidden, down)

    def forward(self, x: Tensor) -> Tensor:
        return self._path(x, self.r1, self.w[0], self.w[1]) + self._path(x, self.r2, self.w[2], self.w[3])


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, D // 4)).permute(2, 0, 3, 1, 4)
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


class OneLayerForward(Stacked):
    """Attention, norms, a dense FFN and the routed path in one forward: no module is the MoE."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.n1, self.n2, self.ffn = _Attention(), nn.LayerNorm(D), nn.RMSNorm(D), Ffn()

    def expected(self, x: Tensor) -> Tensor:
        h = x + self.attention(self.n1(x.unsqueeze(0))).squeeze(0)
        return h + self.ffn(self.n2(h)) + reference(self.truth(), self.n2(h))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.n1(x))
        h = self.n2(x)
        return x + self.ffn(h) + self.dense(h, self.combine(h))


class DecoderModel(Coding):
    """A small language model: embedding, two layers with attention and an MoE, tied head; tokens by keyword."""

    blocks = 2

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, D)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"attn": _Attention(), "n1": nn.LayerNorm(D), "n2": nn.LayerNorm(D), "ff": block})
            for block in (Listed(), Stacked())
        )

    @staticmethod
    def arguments(x: Tensor) -> tuple[tuple[()], dict[str, Tensor]]:
        return (), {"ids": (x[..., 0] * 1000).long() % 61}

    def _run(self, ids: Tensor, moe: Callable[[Any, Tensor], Tensor]) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["attn"](layer["n1"](x))
            x = x + moe(layer["ff"], layer["n2"](x))
        return x @ self.embed.weight.t()

    def expected_from(self, ids: Tensor) -> Tensor:
        return self._run(ids, lambda ff, h: reference(ff.truth(), h.reshape(-1, D)).view_as(h))

    def forward(self, *, ids: Tensor) -> dict[str, Tensor]:
        return {"out": self._run(ids, lambda ff, h: ff(h))}


_UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_squared": lambda z: F.relu(z).square(), "gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu, "leaky_relu": F.leaky_relu, "elu": F.elu,
    "selu": F.selu, "mish": F.mish, "softplus": F.softplus, "hardswish": F.hardswish, "relu6": F.relu6,
    "identity": lambda z: z,
}  # fmt: skip
_GATED = {
    "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "relu": F.relu, "sigmoid": torch.sigmoid,
    "identity": lambda z: z, "relu_squared": lambda z: z.relu() * z.relu(), "tanh": torch.tanh,
    "silu": lambda z: z / (1 + torch.exp(-z)),
}  # fmt: skip


def _with_activation(name: str, function: Callable[[Tensor], Tensor], gated: bool) -> type[Stacked]:
    class Activated(Stacked):
        def truth(self) -> MoESpec:
            spec = super().truth()
            gate = self.a if gated else None
            return replace(spec, experts=ExpertsSpec(self.b, self.c, gate, activation=Activation(name)))

        def dense(self, x: Tensor, combine: Tensor) -> Tensor:
            hidden = torch.einsum("...d,eid->...ei", x, self.b)
            active = function(torch.einsum("...d,eid->...ei", x, self.a) if gated else hidden)
            hidden = active * hidden if gated else active
            return torch.einsum("...ei,edi,...e->...d", hidden, self.c, combine)

    Activated.__name__ = ("Gated_" if gated else "Ungated_") + name
    Activated.__doc__ = f"{'GLU' if gated else 'Two-matrix'} experts with {name}."
    return Activated


ACTIVATIONS = [_with_activation(n, f, gated=False) for n, f in _UNGATED.items()]
ACTIVATIONS += [_with_activation(n, f, gated=True) for n, f in _GATED.items()]

MOES = {
    c.__name__: c
    for c in (
        ReturnsTuple, ReturnsDict, LossInAttribute, GatedShared, PreNormResidual, PostNorm, ScaledOutput,
        SharedAmongRouted, SharedSameShape, RoutedGate, IdentityExperts, TrainOnly, Finite, Misnamed, TwoInARow,
        SideBySide, TwoInOneModule, OneLayerForward, DecoderModel, *ACTIVATIONS,
    )
}  # fmt: skip
