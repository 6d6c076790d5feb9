"""`MoESpec`: what one Mixture-of-Experts block computes, with its weights in one canonical layout.

Every front end produces it, every back end consumes it, and `latentize.reference.moe_forward` defines it.
A standard MoE is a LatentMoE whose projections are the identity, so one type describes both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from latentize.activations import Activation

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]
Order = Literal["score_first", "topk_first"]
Normalize = Literal["none", "sum", "clamp", "norm"]


@dataclass(frozen=True)
class Groups:
    """Group-limited selection: experts form `count` consecutive groups and only `kept` of them may be selected from."""

    count: int
    kept: int
    score: Literal["top2", "max"] = "top2"
    fill: Literal["-inf", "zero"] = "-inf"


@dataclass(frozen=True)
class RouterSpec:
    """The routing function: hidden states [T, d] -> selected experts [T, k] and their weights [T, k].

    logits = hidden @ weight.T + bias, then softcap * tanh(logits / softcap).
    `order` "score_first": scores = score(logits) over all experts, top-k of scores (+ `selection_bias`).
    `order` "topk_first": top-k of the logits (+ `selection_bias`), scores = score(selected logits).
    The selected scores are divided as `normalize` says (sum + eps | max(sum, eps) | p-norm | not at all), then
    multiplied by `scale` and by the selected experts' `per_expert_scale`. Rows past the real experts belong to
    identity experts.
    """

    weight: Tensor  # [N, d]
    top_k: int
    bias: Tensor | None = None  # [N]
    softcap: float | None = None
    score: Score = "softmax"
    order: Order = "score_first"
    selection_bias: Tensor | None = None  # [N]
    selection_bias_on: Literal["score", "logit"] = "score"
    groups: Groups | None = None
    normalize: Normalize = "none"
    eps: float = 0.0
    p: float = 1.0
    scale: float = 1.0
    per_expert_scale: Tensor | None = None  # [N]
    applies_to: Literal["output", "input"] = "output"


@dataclass(frozen=True)
class ExpertsSpec:
    """The routed experts: h = activation(gate x + gate_bias, up x + up_bias), y = down h + down_bias.

    gate is None for ungated experts. `num_identity` further experts, numbered after the real ones, return their input.
    """

    up: Tensor  # [N, m, d]
    down: Tensor  # [N, d, m]
    gate: Tensor | None = None  # [N, m, d]
    gate_bias: Tensor | None = None  # [N, m]
    up_bias: Tensor | None = None  # [N, m]
    down_bias: Tensor | None = None  # [N, d]
    activation: Activation = field(default_factory=Activation)
    num_identity: int = 0


@dataclass(frozen=True)
class LatentSpec:
    """The shared projections around the routed experts: z = down x, y = up (Σ w f(z)). Bias-free.

    With a bypass of rank r, a linear way around all of this, y = up (Σ w f(z)) + bypass_up (bypass_down x).
    """

    down: Tensor  # [l, d]
    up: Tensor  # [d, l]
    bypass_down: Tensor | None = None  # [r, d]
    bypass_up: Tensor | None = None  # [d, r]

    def __post_init__(self) -> None:
        if (self.bypass_down is None) != (self.bypass_up is None):
            raise ValueError("bypass_down and bypass_up: one is missing; a bypass has both, or there is none")

    @property
    def bypass_rank(self) -> int:
        """Rank r of the bypass; 0 without one."""
        return 0 if self.bypass_down is None else self.bypass_down.shape[0]


@dataclass(frozen=True)
class MoESpec:
    """One MoE block's routed path. Shared experts, residuals and norms are not part of it.

    With `latent` None the experts work at the hidden size d; otherwise at the latent size l, and the experts'
    tensors have l where `ExpertsSpec` says d. The routed output, a bypass and identity experts included, is multiplied
    by `output_scale` and gets `output_bias` [d] added.
    """

    router: RouterSpec
    experts: ExpertsSpec
    latent: LatentSpec | None = None
    output_scale: float = 1.0
    output_bias: Tensor | None = None

    @property
    def hidden_size(self) -> int:
        """Width d of the hidden states that enter and leave the block."""
        return self.experts.up.shape[-1] if self.latent is None else self.latent.down.shape[1]

    @property
    def latent_dim(self) -> int:
        """Width l at which the experts work; d when the block is not latent."""
        return self.experts.up.shape[-1]

    @property
    def intermediate_size(self) -> int:
        """Neurons m in one expert."""
        return self.experts.up.shape[1]

    @property
    def num_experts(self) -> int:
        """Routed experts N, identity experts not counted."""
        return self.experts.up.shape[0]

    @property
    def top_k(self) -> int:
        """Experts k that a token selects."""
        return self.router.top_k

    @property
    def gated(self) -> bool:
        """Whether the experts are GLUs."""
        return self.experts.gate is not None

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> MoESpec:
        """The same spec with `function` applied to every tensor."""
        mapped: MoESpec = _map_tensors(self, function)
        return mapped

    def to(self, dtype: torch.dtype) -> MoESpec:
        """The same spec with every tensor in `dtype`."""
        return self.map_tensors(lambda tensor: tensor.to(dtype))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of the spec by its dotted name, e.g. "experts.gate"."""
        return _tensors(self, "")

    def expert_bytes(self) -> int:
        """Bytes of one expert's weights."""
        e = self.experts
        parts = (e.gate, e.up, e.down, e.gate_bias, e.up_bias, e.down_bias)
        return sum(t[0].numel() * t.element_size() for t in parts if t is not None)

    def describe(self) -> str:
        """What the block computes, on one line."""
        return f"{self._describe_router()}; {self._describe_experts()}"

    def _describe_router(self) -> str:
        r = self.router
        score = r.score.replace("sqrt_softplus", "√softplus")
        words = [f"{score} → top-{r.top_k}" if r.order == "score_first" else f"top-{r.top_k} → {score}"]
        if r.groups is not None:
            words.append(f"{r.groups.kept} of {r.groups.count} groups by {r.groups.score}")
        if r.selection_bias is not None:
            words.append(f"selection bias on {r.selection_bias_on}")
        if r.normalize != "none":
            words.append({"sum": "÷ sum", "clamp": "÷ max(sum, min)", "norm": f"÷ {r.p:g}-norm"}[r.normalize])
        if r.softcap is not None:
            words.append(f"softcap {r.softcap:g}")
        if r.scale != 1.0:
            words.append(f"× {r.scale:g}")
        if r.per_expert_scale is not None:
            words.append("× per-expert scale")
        if r.applies_to == "input":
            words.append("weights on the input")
        return ", ".join(words)

    def _describe_experts(self) -> str:
        e = self.experts
        words = [f"N {self.num_experts} experts {self.latent_dim}→{self.intermediate_size}→{self.latent_dim}"]
        words.append(e.activation.describe(self.gated))
        if any(b is not None for b in (e.gate_bias, e.up_bias, e.down_bias)):
            words.append("biases")
        if e.num_identity:
            words.append(f"{e.num_identity} identity experts")
        if self.latent is not None:
            words.append(f"latent {self.hidden_size}→{self.latent_dim}")
            if self.latent.bypass_rank:
                words.append(f"bypass of rank {self.latent.bypass_rank}")
        return ", ".join(words)


def _map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    changed = {}
    for f in fields(value):
        item = getattr(value, f.name)
        if isinstance(item, Tensor):
            changed[f.name] = function(item)
        elif isinstance(item, (RouterSpec, ExpertsSpec, LatentSpec)):
            changed[f.name] = _map_tensors(item, function)
    return replace(value, **changed)


def _tensors(value: Any, prefix: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for f in fields(value):
        item = getattr(value, f.name)
        if isinstance(item, Tensor):
            found[prefix + f.name] = item
        elif isinstance(item, (RouterSpec, ExpertsSpec, LatentSpec)):
            found.update(_tensors(item, f"{prefix}{f.name}."))
    return found
