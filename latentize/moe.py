"""`LatentMoE`: the block that latentize puts in place of a standard MoE, as ordinary PyTorch modules."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentize.block_native import Kept, block_few, experts_few, route_few
from latentize.ops import check_indices, compute
from latentize.route_triton import logits_of, routed
from latentize.routing import Routing
from latentize.spec import ExpertsSpec, LatentSpec, MoESpec, RouterSpec


def _parameter(tensor: Tensor | None) -> nn.Parameter | None:
    if tensor is None:
        return None
    tensor = tensor.clone() if tensor.is_inference() else tensor.detach()  # inference tensors cannot be trained
    return nn.Parameter(tensor, requires_grad=tensor.is_floating_point())


class Router(nn.Module):
    """Chooses experts from the hidden state at full width d.

    Logits and scores are computed in fp32 (fp64 for fp64 inputs): in bf16 a few percent of tokens tie between experts.
    """

    selection_bias: Tensor | None
    per_expert_scale: Tensor | None

    def __init__(self, spec: RouterSpec) -> None:
        super().__init__()
        self.weight = _parameter(spec.weight)
        self.bias = _parameter(spec.bias)
        self.register_buffer("selection_bias", spec.selection_bias)
        self.register_buffer("per_expert_scale", spec.per_expert_scale)
        self.rule = replace(spec, weight=torch.empty(0), bias=None, selection_bias=None, per_expert_scale=None)
        self.kept = Kept()

    @property
    def spec(self) -> RouterSpec:
        """The routing function with the tensors as they are now."""
        assert self.weight is not None
        return replace(
            self.rule,
            weight=self.weight,
            bias=self.bias,
            selection_bias=self.selection_bias,
            per_expert_scale=self.per_expert_scale,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Raw logits [T, N] of hidden [T, d], in at least fp32."""
        assert self.weight is not None
        if torch.is_autocast_enabled(hidden.device.type):
            with torch.autocast(hidden.device.type, enabled=False):
                return self.logits(hidden)
        return logits_of(hidden, self.weight, self.bias)

    def forward(self, hidden: Tensor) -> Routing:
        """Routing of hidden [T, d]."""
        few = route_few(hidden, self)
        return routed(self.logits(hidden), self.spec) if few is None else few

    def extra_repr(self) -> str:
        """Sizes for printing."""
        assert self.weight is not None
        return f"hidden_size={self.weight.shape[1]}, num_experts={self.weight.shape[0]}, top_k={self.rule.top_k}"


class LatentExperts(nn.Module):
    """Down-projection, routed experts at the latent width, combine, up-projection, and a linear bypass of all of them.

    With `latent_down` and `latent_up` None the experts work at the hidden size: a standard MoE in canonical layout.
    `bypass_down` and `bypass_up` are None where there is no bypass.
    """

    def __init__(self, spec: MoESpec) -> None:
        super().__init__()
        experts = spec.experts
        self.latent_down = _parameter(None if spec.latent is None else spec.latent.down)
        self.latent_up = _parameter(None if spec.latent is None else spec.latent.up)
        self.bypass_down = _parameter(None if spec.latent is None else spec.latent.bypass_down)
        self.bypass_up = _parameter(None if spec.latent is None else spec.latent.bypass_up)
        self.gate = _parameter(experts.gate)
        self.up = _parameter(experts.up)
        self.down = _parameter(experts.down)
        self.gate_bias = _parameter(experts.gate_bias)
        self.up_bias = _parameter(experts.up_bias)
        self.down_bias = _parameter(experts.down_bias)
        self.output_bias = _parameter(spec.output_bias)
        self.activation = experts.activation
        self.num_identity = experts.num_identity
        self.output_scale = spec.output_scale
        self.weights_on_input = spec.router.applies_to == "input"
        self.kept = Kept()

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Routed output [T, d] of hidden [T, d], indices [T, k] int64 and weights [T, k], in the dtype of `hidden`."""
        assert self.up is not None
        if hidden.dtype != self.up.dtype:
            return self.forward(hidden.to(self.up.dtype), indices, weights).to(hidden.dtype)
        few = experts_few(hidden, indices, weights, self)
        if few is not None:
            return few
        latent = hidden if self.latent_down is None else F.linear(hidden, self.latent_down)
        combined = self.combine(latent, indices, weights)
        output = combined if self.latent_up is None else F.linear(combined, self.latent_up)
        if self.num_identity:
            passed = (weights * (indices >= self.up.shape[0])).sum(-1, keepdim=True)
            output = output + hidden * passed.to(hidden.dtype)
        if self.output_scale != 1.0:
            output = output * self.output_scale
        passed_by = self.bypassed(hidden)
        if passed_by is not None:
            output = output + passed_by
        return output if self.output_bias is None else output + self.output_bias

    def bypassed(self, hidden: Tensor) -> Tensor | None:
        """What goes around the experts [..., d] of hidden [..., d], scaled like the output; None without a bypass.

        It is added to an output that is scaled already, so that who reads a graph still finds the experts' own sum.
        """
        if self.bypass_down is None or self.bypass_up is None:
            return None
        narrow = F.linear(hidden, self.bypass_down)
        return F.linear(narrow if self.output_scale == 1.0 else narrow * self.output_scale, self.bypass_up)

    def combine(self, latent: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """Weighted sum [T, l] of the selected experts' outputs on latent [T, l]."""
        assert self.up is not None
        assert self.down is not None
        check_indices(indices, self.up.shape[0] + self.num_identity)
        latent = latent.to(self.up.dtype)  # autocast may have narrowed it
        return compute(
            latent, indices, weights.to(latent.dtype), self.gate, self.up, self.down,
            self.gate_bias, self.up_bias, self.down_bias, self.activation, self.weights_on_input,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """Sizes for printing."""
        assert self.up is not None
        experts, intermediate, latent = self.up.shape
        hidden = latent if self.latent_down is None else self.latent_down.shape[1]
        return f"hidden_size={hidden}, latent_dim={latent}, num_experts={experts}, intermediate_size={intermediate}"


class LatentMoE(nn.Module):
    """A routed MoE block in canonical form: `router` at width d, `experts` at the latent width.

    `LatentMoE(spec)` shares the spec's tensors; give it clones where they must not be shared.
    """

    def __init__(self, spec: MoESpec) -> None:
        super().__init__()
        self.router = Router(spec.router)
        self.experts = LatentExperts(spec)

    @property
    def spec(self) -> MoESpec:
        """The block's spec with the tensors as they are now."""
        e = self.experts
        assert e.up is not None
        assert e.down is not None
        experts = ExpertsSpec(
            e.up, e.down, e.gate, e.gate_bias, e.up_bias, e.down_bias, e.activation, e.num_identity
        )
        latent = None
        if e.latent_down is not None and e.latent_up is not None:
            latent = LatentSpec(e.latent_down, e.latent_up, e.bypass_down, e.bypass_up)
        return MoESpec(self.router.spec, experts, latent, e.output_scale, e.output_bias)

    def forward(self, hidden: Tensor, router_hidden: Tensor | None = None) -> Tensor:
        """Routed output [..., d] of hidden [..., d]; the router reads `router_hidden` [..., d] where it is given."""
        router, experts = self._modules["router"], self._modules["experts"]
        seen = hidden if router_hidden is None else router_hidden
        few = block_few(hidden, seen, (router, Router), (experts, LatentExperts))  # type: ignore[arg-type]
        if few is not None:
            return few
        flat = hidden.reshape(-1, hidden.shape[-1])
        seen = flat if router_hidden is None else router_hidden.reshape(-1, router_hidden.shape[-1])
        routing: Routing = self.router(seen)
        routed: Tensor = self.experts(flat, routing.indices, routing.weights)
        return routed.view(hidden.shape)
