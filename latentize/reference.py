"""The reference forward of a `MoESpec`: slow, plain, in the dtype of its inputs. It *defines* what a spec means."""

from __future__ import annotations

from torch import Tensor

from latentize.routing import Routing, route
from latentize.spec import ExpertsSpec, MoESpec


def moe_forward(spec: MoESpec, hidden: Tensor, router_hidden: Tensor | None = None) -> Tensor:
    """Routed output of one MoE block.

    Args:
        spec: the block. Convert it with `spec.to(torch.float64)` for an fp64 reference.
        hidden: [T, d] hidden states that the experts read.
        router_hidden: [T, d] hidden states that the router reads; `hidden` when None.

    Returns:
        [T, d] routed output in the dtype of `hidden`.
    """
    routing = router_forward(spec, hidden if router_hidden is None else router_hidden)
    return experts_forward(spec, hidden, routing)


def router_forward(spec: MoESpec, hidden: Tensor) -> Routing:
    """Routing of T tokens; hidden is [T, d] at the full width, whatever the experts' width."""
    logits = hidden @ spec.router.weight.T
    if spec.router.bias is not None:
        logits = logits + spec.router.bias
    return route(logits, spec.router)


def experts_forward(spec: MoESpec, hidden: Tensor, routing: Routing) -> Tensor:
    """Routed output [T, d] of hidden [T, d] under a given routing."""
    latent = hidden if spec.latent is None else hidden @ spec.latent.down.T
    combined = latent.new_zeros(latent.shape)
    for expert in range(spec.num_experts):
        token, slot = (routing.indices == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        weight = routing.weights[token, slot, None].to(latent.dtype)
        if spec.router.applies_to == "input":
            output = expert_forward(spec.experts, expert, latent[token] * weight)
        else:
            output = expert_forward(spec.experts, expert, latent[token]) * weight
        combined.index_add_(0, token, output)
    output = combined if spec.latent is None else combined @ spec.latent.up.T
    if spec.latent is not None and spec.latent.bypass_down is not None and spec.latent.bypass_up is not None:
        output = output + hidden @ spec.latent.bypass_down.T @ spec.latent.bypass_up.T
    if spec.experts.num_identity:
        passed = (routing.weights * (routing.indices >= spec.num_experts)).sum(-1, keepdim=True)
        output = output + hidden * passed.to(hidden.dtype)
    output = output * spec.output_scale
    return output if spec.output_bias is None else output + spec.output_bias


def expert_forward(experts: ExpertsSpec, expert: int, x: Tensor) -> Tensor:
    """Output [n, l] of one expert on x [n, l]."""

    def linear(weight: Tensor | None, bias: Tensor | None, value: Tensor) -> Tensor | None:
        if weight is None:
            return None
        out = value @ weight[expert].T
        return out if bias is None else out + bias[expert]

    up = linear(experts.up, experts.up_bias, x)
    assert up is not None
    hidden = experts.activation(linear(experts.gate, experts.gate_bias, x), up)
    output = linear(experts.down, experts.down_bias, hidden)
    assert output is not None
    return output
