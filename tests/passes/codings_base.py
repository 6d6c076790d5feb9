"""Common ground of the MoE codings: sizes, inputs, and a per-token reference that shares no code with the package."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentize.activations import Activation
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 32, 48, 8, 2


def example(batch: int = 2, tokens: int = 24, seed: int = 0) -> Tensor:
    """Hidden states [batch, tokens, HIDDEN]."""
    return torch.randn(batch, tokens, HIDDEN, generator=torch.Generator().manual_seed(seed))


def swiglu_loop(x: Tensor, weights: Tensor, chosen: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The weighted sum [T, d] of chosen [T, k] SwiGLU experts on x [T, d], one expert after the other."""
    out = torch.zeros_like(x)
    for e in range(gate.shape[0]):
        row, slot = torch.where(chosen == e)
        h = F.silu(x[row] @ gate[e].T) * (x[row] @ up[e].T)
        out.index_add_(0, row, (h @ down[e].T) * weights[row, slot, None])
    return out


class Coding(nn.Module):
    """One way to write an MoE down. `truth` says what it computes; `forward` computes it its own way.

    `blocks` is the number of MoE blocks that must be found in it, `tolerance` the largest relative error at which its
    output may differ after an exact rewrite. `loud` multiplies the inputs of checks, where details show on large ones.
    """

    blocks = 1
    tolerance = 1e-4
    loud = 1.0

    @staticmethod
    def arguments(x: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward arguments for hidden states x [B, T, d]."""
        return (x,), {}

    @staticmethod
    def hidden_first(out: Any) -> Tensor:
        """The main output as [B, T, d]."""
        if isinstance(out, dict):
            return out["out"]
        return out[0] if isinstance(out, tuple) else out

    def truth(self) -> MoESpec:
        """What the routed path computes."""
        raise NotImplementedError

    def expected(self, x: Tensor) -> Tensor:
        """Output [T, d] for the hidden states x [T, d] of one sequence, from the truth and what stands around it."""
        return reference(self.truth(), x)


class Stacked(Coding):
    """Softmax, top-k, renormalise, over SwiGLU experts in stacks a (gate), b (up) [N, m, d] and c (down) [N, d, m]."""

    rule: dict[str, Any] = {"score": "softmax", "order": "score_first", "normalize": "sum"}  # noqa: RUF012
    top_k = TOP_K

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Linear(HIDDEN, EXPERTS, bias=False)
        nn.init.normal_(self.r.weight, std=0.5)
        self.build()

    def build(self) -> None:
        self.a = nn.Parameter(torch.randn(EXPERTS, INTERMEDIATE, HIDDEN) * 0.2)
        self.b = nn.Parameter(torch.randn(EXPERTS, INTERMEDIATE, HIDDEN) * 0.2)
        self.c = nn.Parameter(torch.randn(EXPERTS, HIDDEN, INTERMEDIATE) * 0.2)

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gate [N, m, d], up [N, m, d] and down [N, d, m]."""
        return self.a, self.b, self.c

    def router_weight(self) -> Tensor:
        return self.r.weight

    def truth(self) -> MoESpec:
        gate, up, down = self.weights()
        router = RouterSpec(self.router_weight(), self.top_k, self.r.bias, **{**self.rule, **self.router_tensors()})
        return MoESpec(router, ExpertsSpec(up, down, gate, activation=Activation("silu")))

    def router_tensors(self) -> dict[str, Any]:
        return {}

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and indices [..., k]."""
        weights, index = self.r(x).softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index

    def combine(self, x: Tensor) -> Tensor:
        """Mostly-zero weights [..., N]."""
        weights, index = self.route(x)
        return torch.zeros(*x.shape[:-1], EXPERTS, dtype=x.dtype).scatter(-1, index, weights)

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        """Every expert on every token."""
        hidden = F.silu(torch.einsum("...d,eid->...ei", x, self.a)) * torch.einsum("...d,eid->...ei", x, self.b)
        return torch.einsum("...ei,edi,...e->...d", hidden, self.c, combine)

    def forward(self, x: Tensor) -> Any:
        return self.dense(x, self.combine(x))


class Ffn(nn.Module):
    """A SwiGLU feed-forward."""

    def __init__(self, width: int = INTERMEDIATE) -> None:
        super().__init__()
        self.p = nn.Linear(HIDDEN, width, bias=False)
        self.q = nn.Linear(HIDDEN, width, bias=False)
        self.o = nn.Linear(width, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.silu(self.p(x)) * self.q(x))


class Listed(Stacked):
    """The same with the experts in a list of modules."""

    def build(self) -> None:
        self.ffns = nn.ModuleList(Ffn() for _ in range(EXPERTS))

    def weights(self) -> tuple[Tensor, Tensor, Tensor]:
        return (
            torch.stack([f.p.weight for f in self.ffns]),
            torch.stack([f.q.weight for f in self.ffns]),
            torch.stack([f.o.weight for f in self.ffns]),
        )

    def dense(self, x: Tensor, combine: Tensor) -> Tensor:
        return sum(combine[..., e, None] * ffn(x) for e, ffn in enumerate(self.ffns))


_ACTIVATION = {
    "gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "identity": lambda z: z,
    "gelu_tanh": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "relu_squared": lambda z: z.clamp(min=0) ** 2, "relu6": lambda z: z.clamp(0, 6), "mish": F.mish, "elu": F.elu,
    "selu": F.selu, "leaky_relu": F.leaky_relu, "softplus": F.softplus, "hardswish": F.hardswish,
}  # fmt: skip


@torch.no_grad()
def reference(spec: MoESpec, x: Tensor, router_x: Tensor | None = None) -> Tensor:
    """Routed output [T, d] of one standard MoE, one token and one expert at a time."""
    seen = x if router_x is None else router_x
    return torch.stack([_one_token(spec, x[t], seen[t]) for t in range(x.shape[0])])


def _one_token(spec: MoESpec, x: Tensor, seen: Tensor) -> Tensor:
    router, out = spec.router, torch.zeros_like(x)
    for e, weight in select(router, seen).items():
        if router.applies_to == "input":
            out = out + _expert(spec.experts, e, weight * x)
        else:
            out = out + weight * _expert(spec.experts, e, x)
    out = out * spec.output_scale
    return out if spec.output_bias is None else out + spec.output_bias


def select(router: RouterSpec, x: Tensor) -> dict[int, Tensor]:
    """Expert -> weight, for one token x [d]."""
    logits = router.weight @ x
    if router.bias is not None:
        logits = logits + router.bias
    if router.softcap is not None:
        logits = router.softcap * torch.tanh(logits / router.softcap)
    score = {"sigmoid": torch.sigmoid, "sqrt_softplus": lambda z: torch.log1p(z.exp()).sqrt()}.get(
        router.score, lambda z: z.exp() / z.exp().sum()
    )
    scores = score(logits)
    choice = (logits if router.order == "topk_first" or router.selection_bias_on == "logit" else scores).clone()
    if router.selection_bias is not None:
        choice = choice + router.selection_bias
    if router.groups is not None:
        choice = _limit_groups(choice, router)
    chosen = sorted(range(len(choice)), key=lambda e: -float(choice[e]))[: router.top_k]
    picked = score(logits[chosen]) if router.order == "topk_first" else scores[chosen]
    divisor = {
        "none": lambda: 1.0,
        "sum": lambda: picked.sum() + router.eps,
        "clamp": lambda: picked.sum().clamp(min=router.eps),
        "norm": lambda: (picked.abs() ** router.p).sum() ** (1 / router.p),
    }[router.normalize]()
    picked = picked / divisor * router.scale
    if router.per_expert_scale is not None:
        picked = picked * router.per_expert_scale[chosen]
    return dict(zip(chosen, picked, strict=True))


def _limit_groups(choice: Tensor, router: RouterSpec) -> Tensor:
    groups = router.groups
    assert groups is not None
    size = len(choice) // groups.count
    parts = [choice[g * size : (g + 1) * size] for g in range(groups.count)]
    scores = [p.max() if groups.score == "max" else p.sort(descending=True).values[:2].sum() for p in parts]
    kept = sorted(range(groups.count), key=lambda g: -float(scores[g]))[: groups.kept]
    fill = -math.inf if groups.fill == "-inf" else 0.0
    return torch.cat([p if g in kept else torch.full_like(p, fill) for g, p in enumerate(parts)])


def _expert(experts: ExpertsSpec, e: int, x: Tensor) -> Tensor:
    if e >= experts.up.shape[0]:
        return x
    a = experts.activation
    up = experts.up[e] @ x
    if experts.up_bias is not None:
        up = up + experts.up_bias[e]
    gate = up if experts.gate is None else experts.gate[e] @ x
    if experts.gate is not None and experts.gate_bias is not None:
        gate = gate + experts.gate_bias[e]
    if a.gate_min is not None or a.gate_max is not None:
        gate = gate.clamp(a.gate_min, a.gate_max)
    hidden = gate * torch.sigmoid(a.alpha * gate) if a.name == "silu" else _ACTIVATION[a.name](gate)
    if experts.gate is not None:
        if a.up_min is not None or a.up_max is not None:
            up = up.clamp(a.up_min, a.up_max)
        hidden = hidden * (up + a.up_offset)
    y = experts.down[e] @ hidden
    return y if experts.down_bias is None else y + experts.down_bias[e]
