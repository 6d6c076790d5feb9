"""The start: a latent block from an original one, its calibration statistics and its plan. Pure tensor mathematics."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from latentize.children import condition
from latentize.errors import LatentizeError
from latentize.output_fit import coefficients, factorise, features, fit
from latentize.plan import BlockPlan
from latentize.projections import gram, input_projection, leading, output_gram, reconstruction, shrink
from latentize.reference import experts_forward, router_forward
from latentize.rescale import expand
from latentize.routing import Routing
from latentize.spec import LatentSpec, MoESpec
from latentize.statistics import BlockStatistics

#: Ridge of the output fit, relative to the mean square of its features.
RIDGE = 1e-4


def initialise(
    spec: MoESpec,
    plan: BlockPlan,
    statistics: BlockStatistics | None = None,
    *,
    seed: int = 0,  # noqa: ARG001  nothing is drawn at random yet
) -> MoESpec:
    """The latent block to start from.

    Args:
        spec: the original block, width d.
        plan: the sizes to reach. At latent_dim = d the projections are the identity and the function is unchanged.
        statistics: of the block over calibration data; None (or no tokens) initialises from the weights alone.
        seed: kept for reproducibility of anything drawn at random.

    Returns:
        A latent spec in the dtype of `spec`, on its device, sharing no floating-point storage with it.

    Raises:
        LatentizeError: the plan was made for a block of other sizes, or the weights are not finite.
    """
    _check(spec, plan)
    if plan.latent_dim == spec.hidden_size:
        return _identity(spec, plan)
    compute = torch.promote_types(spec.experts.up.dtype, torch.float32)
    if statistics is None or not statistics.tokens:
        start = expand(_from_weights(spec, plan.latent_dim), plan.experts_factor, plan.topk_factor)
    else:
        start = _from_activations(spec.to(compute), plan, statistics)
    return _in_dtypes_of(start, spec)


def _identity(spec: MoESpec, plan: BlockPlan) -> MoESpec:
    eye = torch.eye(spec.hidden_size, dtype=spec.experts.up.dtype, device=spec.experts.up.device)
    latent = replace(spec, latent=LatentSpec(eye, eye.clone()))
    return expand(latent, plan.experts_factor, plan.topk_factor).map_tensors(torch.clone)


def _from_weights(spec: MoESpec, rank: int) -> MoESpec:
    """Both projections from the weights: x taken as white, all experts as equally used."""
    loads = torch.ones(spec.num_experts, dtype=torch.float64, device=spec.experts.up.device)
    moment = torch.eye(spec.hidden_size, dtype=torch.float64, device=spec.experts.up.device)
    down = input_projection(gram(spec.experts, loads), moment, rank)
    return narrow(spec, down, down.T, leading(output_gram(spec.experts, loads), rank))


def _from_activations(spec: MoESpec, plan: BlockPlan, statistics: BlockStatistics) -> MoESpec:
    sample = statistics.sample
    dtype = spec.experts.up.dtype
    hidden = sample.hidden.to(dtype)
    seen = hidden if sample.router_hidden is None else sample.router_hidden.to(dtype)
    routing = Routing(hidden.new_empty(0), sample.weights.to(dtype), sample.indices)
    target = experts_forward(routed_only(spec), hidden, routing)

    moment = shrink(statistics.input_moment, statistics.tokens)
    loads = statistics.counts[: spec.num_experts].double().clamp_min(1e-3)
    down = input_projection(gram(spec.experts, loads), moment, plan.latent_dim)
    guess = reconstruction(down, moment)
    start = narrow(spec, down, guess, leading(statistics.output_moment, plan.latent_dim))
    start = expand(start, plan.experts_factor, plan.topk_factor)
    if plan.experts_factor > 1 and plan.topk_factor == plan.experts_factor:
        dropped = torch.eye(len(moment), dtype=moment.dtype, device=moment.device) - guess @ down
        start = condition(start, spec.num_experts, dropped.to(dtype), seen, routing)
    routing = router_forward(start, seen)
    full = expand(spec, plan.experts_factor, plan.topk_factor)
    return fit_output(start, full, hidden, routing, target)


def narrow(spec: MoESpec, down: Tensor, guess: Tensor, up: Tensor) -> MoESpec:
    """The block at the latent width: gate and up times `guess` [d, l], outputs in the basis `up` [d, l].

    down [l, d] is the down-projection. Output biases keep their part in the span of `up`.
    """
    e = spec.experts
    dtype, device = e.up.dtype, e.up.device
    gate = None if e.gate is None else e.gate.new_empty(*e.gate.shape[:2], guess.shape[1])
    wide = e.up.new_empty(*e.up.shape[:2], guess.shape[1])
    out = e.down.new_empty(len(e.down), up.shape[1], e.down.shape[2])
    for expert in range(len(e.up)):
        wide[expert] = (e.up[expert].to(guess.dtype) @ guess).to(dtype)
        out[expert] = (up.T @ e.down[expert].to(up.dtype)).to(dtype)
        if gate is not None and e.gate is not None:
            gate[expert] = (e.gate[expert].to(guess.dtype) @ guess).to(dtype)
    bias = None if e.down_bias is None else (e.down_bias.to(up.dtype) @ up).to(dtype)
    experts = replace(e, up=wide, gate=gate, down=out, down_bias=bias)
    return replace(spec, experts=experts, latent=LatentSpec(down.to(device, dtype), up.to(device, dtype)))


def fit_output(start: MoESpec, full: MoESpec, hidden: Tensor, routing: Routing, target: Tensor) -> MoESpec:
    """`start` with its output side refitted to `target` [T, d]; `full` has the experts' outputs at width d."""
    phi = features(start, hidden, routing)
    wide = coefficients(full.experts.down, full.experts.down_bias)
    up, narrow_coefficients = factorise(phi, fit(phi, target, wide, RIDGE), start.latent_dim)
    m = start.intermediate_size
    down = narrow_coefficients[:, :m].transpose(1, 2).contiguous()
    bias = None if start.experts.down_bias is None else narrow_coefficients[:, m].contiguous()
    assert start.latent is not None
    return replace(
        start,
        experts=replace(start.experts, down=down, down_bias=bias),
        latent=replace(start.latent, up=up.contiguous()),
    )


def routed_only(spec: MoESpec) -> MoESpec:
    """The block without what stays at width d around its routed experts: identity experts, output scale and bias."""
    return replace(spec, experts=replace(spec.experts, num_identity=0), output_scale=1.0, output_bias=None)


def _check(spec: MoESpec, plan: BlockPlan) -> None:
    expected = (plan.hidden_size, plan.num_experts, plan.top_k)
    found = (spec.hidden_size, spec.num_experts, spec.top_k)
    if expected != found or spec.latent is not None:
        raise LatentizeError(
            f"{plan.name}: the plan is for hidden size {expected[0]}, {expected[1]} experts, top-k {expected[2]}; "
            f"the block has {found[0]}, {found[1]}, {found[2]}: make a plan for this block"
        )
    for name, tensor in spec.tensors().items():
        if not tensor.isfinite().all():
            raise LatentizeError(f"{plan.name}: {name} {list(tensor.shape)} is not finite; repair the weights")


def _in_dtypes_of(start: MoESpec, spec: MoESpec) -> MoESpec:
    """`start` in the dtypes of `spec`; a router with banks keeps at least fp32 (see `rescale.separate_banks`)."""
    dtypes = {name: tensor.dtype for name, tensor in spec.tensors().items()}
    if start.router.groups is not None and spec.router.groups is None:
        dtypes["router.weight"] = torch.promote_types(spec.router.weight.dtype, torch.float32)
    names = {id(tensor): name for name, tensor in start.tensors().items()}
    return start.map_tensors(
        lambda tensor: tensor.to(dtypes.get(names[id(tensor)], spec.experts.up.dtype)).clone().contiguous()
    )
