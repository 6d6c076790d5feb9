"""The start: a latent block from an original one, its calibration statistics and its plan. Pure tensor mathematics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat

import torch
from torch import Tensor

from latentize.bypass import fit_bypass
from latentize.children import bank_directions, condition
from latentize.errors import LatentizeError
from latentize.memory import all_finite, trim
from latentize.output_fit import Computed, coefficients, damping, explained, factorise, features, fit, selected
from latentize.plan import BlockPlan, check_bypass, fits
from latentize.projections import (
    gram,
    input_projection,
    leading,
    metric,
    output_gram,
    reconstruction,
    shrink,
    square_root,
)
from latentize.reference import experts_forward, router_forward
from latentize.reread import Reading
from latentize.rescale import check_factors, copy_router, divided, expand, separate_banks
from latentize.routing import Routing
from latentize.spec import LatentSpec, MoESpec, RouterSpec
from latentize.statistics import BlockStatistics, Sample

#: A token counts in proportion to this power of its importance, which is a noisy estimate, within these bounds.
IMPORTANCE_POWER = 0.5
IMPORTANCE_RANGE = (0.05, 20.0)

#: Tokens that the sensitivity to the input is measured on, and random directions for each of them.
SENSITIVITY_TOKENS = 4096
DRAWS = 4

#: Tokens whose gradients are taken together.
SENSITIVITY_AT_ONCE = 512

#: Tokens that the second moment over all tokens counts as, beside an expert's own.
PRIOR_TOKENS = 64.0


def initialise(
    spec: MoESpec,
    plan: BlockPlan,
    statistics: BlockStatistics | None = None,
    *,
    reading: Reading | None = None,
    seed: int = 0,
) -> MoESpec:
    """The latent block to start from.

    Args:
        spec: the original block, width d.
        plan: the sizes to reach. At latent_dim = d the projections are the identity and the function is unchanged.
        statistics: of the block over calibration data; None (or no tokens) initialises from the weights alone.
        reading: what the block reads at the tokens of `statistics.sample` once the blocks before it are latent. It then
            learns to give the original's output there all the same.
        seed: of the random directions in which the block's sensitivity is measured.

    Returns:
        A latent spec in the dtype of `spec`, on its device, sharing no floating-point storage with it.

    Raises:
        LatentizeError: the plan was made for a block of other sizes, the weights are not finite, or there is nothing
            to fit a bypass on.
    """
    _check(spec, plan)
    if plan.latent_dim == spec.hidden_size:
        return _identity(spec, plan)
    check_bypass(spec, plan, statistics)
    compute = torch.promote_types(spec.experts.up.dtype, torch.float32)
    if statistics is None or not statistics.tokens:
        start = expand(_from_weights(spec, plan.latent_dim), plan.experts_factor, plan.topk_factor)
    elif not fits(spec, plan.experts_factor, statistics):
        start = expand(_from_moments(spec, plan.latent_dim, statistics), plan.experts_factor, plan.topk_factor)
    else:
        start = _from_activations(spec.to(compute), plan, statistics, reading, seed)
    return _in_dtypes_of(start, spec)


def _identity(spec: MoESpec, plan: BlockPlan) -> MoESpec:
    eye = torch.eye(spec.hidden_size, dtype=spec.experts.up.dtype, device=spec.experts.up.device)
    latent = replace(spec, latent=LatentSpec(eye, eye.clone()))
    return expand(latent, plan.experts_factor, plan.topk_factor).map_tensors(torch.clone)


def _from_weights(spec: MoESpec, rank: int) -> MoESpec:
    """Both projections from the weights: x taken as white, all experts as equally used."""
    loads = torch.ones(spec.num_experts, dtype=torch.float64, device=spec.experts.up.device)
    moment = torch.eye(spec.hidden_size, dtype=torch.float64, device=spec.experts.up.device)
    down = input_projection(gram(spec.experts, loads, loads), moment, rank)
    return narrow(spec, down, repeat(down.T, spec.num_experts), leading(output_gram(spec.experts, loads), rank))


def _from_moments(spec: MoESpec, rank: int, statistics: BlockStatistics) -> MoESpec:
    """Both projections from the weights and second moments, where tokens cannot be used: one expert at a time.

    The output side is truncated and not refitted, which takes tokens.
    """
    loads = statistics.counts[: spec.num_experts].double() / statistics.tokens
    moment = shrink(statistics.input_moment, statistics.tokens)
    down = input_projection(gram(spec.experts, loads, loads), moment, rank)
    compute = torch.promote_types(spec.experts.up.dtype, torch.float32)
    guess = reconstruction(down, moment).to(compute)
    up = leading(statistics.output_moment, rank).to(compute)
    return narrow(spec, down, repeat(guess, spec.num_experts), up)


def _from_activations(
    spec: MoESpec, plan: BlockPlan, statistics: BlockStatistics, reading: Reading | None, seed: int
) -> MoESpec:
    tokens = _Tokens.of(spec, statistics)
    target = experts_forward(routed_only(spec), tokens.hidden, tokens.routing)
    if reading is not None:
        tokens = tokens.moved_to(reading, spec)
    importance = metric(statistics.sensitivity, spec.hidden_size)
    moment = shrink(tokens.input_moment(), len(tokens.hidden))
    few = tokens.first(SENSITIVITY_TOKENS)
    needed = input_sensitivity(spec, few.hidden, few.routing, importance, seed)
    trim()  # what gradients were computed from
    down = input_projection(shrink(needed, DRAWS * len(few.hidden)), moment, plan.latent_dim)
    guess = reconstruction(down, moment)

    dropped = torch.eye(len(moment), dtype=moment.dtype, device=moment.device) - guess @ down
    router = _multiply(spec, plan, dropped.to(tokens.hidden.dtype), tokens)
    parents = replace(divided(spec, plan.topk_factor), router=router)  # child c of expert e is number c * N + e
    routing = router_forward(parents, tokens.seen)
    trim()  # the decompositions' workspaces
    children = plan.experts_factor * spec.num_experts
    guesses = local_guesses(down, moment, tokens.hidden * tokens.weights, routing, children)
    start = narrow_inputs(parents, down, guesses, plan.experts_factor)
    fitted = fit_output(start, parents, tokens.hidden, routing, target, importance, tokens.weights)
    if not plan.bypass_rank:
        return fitted

    def bypass(inner: MoESpec) -> tuple[Tensor, Tensor]:
        missing = target - experts_forward(routed_only(inner), tokens.hidden, routing)
        return fit_bypass(tokens.hidden, missing, tokens.weights, importance, plan.bypass_rank)

    into, out = bypass(fitted)
    left = target - tokens.hidden @ into.T @ out.T  # what the experts need not give any more
    fitted = fit_output(start, parents, tokens.hidden, routing, left, importance, tokens.weights)
    into, out = bypass(fitted)
    assert fitted.latent is not None
    return replace(fitted, latent=replace(fitted.latent, bypass_down=into, bypass_up=out))


def _multiply(spec: MoESpec, plan: BlockPlan, dropped: Tensor, tokens: _Tokens) -> RouterSpec:
    """The router of the multiplied experts, its families told apart by what the down-projection drops."""
    a, b = plan.experts_factor, plan.topk_factor
    check_factors(spec, a, b)
    router = copy_router(spec, a, b)
    if a == b:
        return condition(router, spec.num_experts, a, dropped, tokens.seen, tokens.routing)
    return separate_banks(router, bank_directions(tokens.seen, dropped, a), b)


@dataclass(frozen=True)
class _Tokens:
    """The sample in the dtype of computation."""

    hidden: Tensor  # [T, d]
    seen: Tensor  # [T, d] by the router
    routing: Routing  # original
    weights: Tensor  # [T, 1] of each token in least squares: roots of importances

    @classmethod
    def of(cls, spec: MoESpec, statistics: BlockStatistics) -> _Tokens:
        sample, weight = statistics.sample, spec.experts.up
        hidden = sample.hidden.to(weight)
        seen = hidden if sample.router_hidden is None else sample.router_hidden.to(weight)
        routing = Routing(hidden.new_empty(0), sample.weights.to(weight), sample.indices.to(weight.device))
        return cls(hidden, seen, routing, token_weights(sample).to(weight).unsqueeze(1))

    def moved_to(self, reading: Reading, spec: MoESpec) -> _Tokens:
        """The same tokens as the block reads them now, with the routing that the original gives them."""
        hidden = reading.hidden.to(self.hidden)
        seen = hidden if reading.router_hidden is None else reading.router_hidden.to(hidden)
        return _Tokens(hidden, seen, router_forward(spec, seen), self.weights)

    def input_moment(self) -> Tensor:
        """Mean of (Σ_e w_e²) x xᵀ [d, d] in fp64, tokens weighted."""
        total = self.hidden.new_zeros(self.hidden.shape[1], self.hidden.shape[1], dtype=torch.float64)
        scale = self.weights * self.routing.weights.square().sum(-1, keepdim=True).sqrt()
        for x, s in zip(self.hidden.split(4096), scale.split(4096), strict=True):
            rows = (x * s).double()
            total += rows.T @ rows
        return total / len(self.hidden)

    def first(self, count: int) -> _Tokens:
        """The first `count` tokens."""
        routing = Routing(self.routing.logits, self.routing.weights[:count], self.routing.indices[:count])
        return _Tokens(self.hidden[:count], self.seen[:count], routing, self.weights[:count])


def token_weights(sample: Sample) -> Tensor:
    """[S] what each token's residual counts by in least squares: roots of importances, within bounds."""
    importance = torch.ones(len(sample.hidden)) if sample.importance is None else sample.importance
    least, most = IMPORTANCE_RANGE
    return importance.clamp(least, most).pow(IMPORTANCE_POWER / 2)


def input_sensitivity(spec: MoESpec, hidden: Tensor, routing: Routing, importance: Tensor, seed: int) -> Tensor:
    """Mean of Jᵀ M J [d, d] in fp64, J the Jacobian of the routed output at each token and M the metric `importance`.

    The output side of a balanced truncation, from `DRAWS` random products vᵀ J with E[v vᵀ] = M. Routing is held fixed.

    Args:
        spec: the original block.
        hidden: [T, d].
        routing: original, of these tokens.
        importance: [d, d].
        seed: of the random products.
    """
    generator = torch.Generator().manual_seed(seed)
    root = square_root(importance.to(hidden.device)).to(hidden.dtype)
    total = torch.zeros_like(root, dtype=torch.float64)
    block = routed_only(spec.map_tensors(torch.detach))
    drawn = [torch.randn(hidden.shape, generator=generator, dtype=torch.float64).to(hidden) for _ in range(DRAWS)]
    for rows in torch.arange(len(hidden), device=hidden.device).split(SENSITIVITY_AT_ONCE):
        with torch.enable_grad():
            x = hidden[rows].detach().requires_grad_()
            output = experts_forward(block, x, Routing(routing.logits, routing.weights[rows], routing.indices[rows]))
        for direction in drawn:
            product = torch.autograd.grad(output, x, direction[rows] @ root, retain_graph=True)[0].double()
            total += product.T @ product
        trim()
    return total / (DRAWS * len(hidden))


def local_guesses(down: Tensor, moment: Tensor, hidden: Tensor, routing: Routing, experts: int) -> Iterator[Tensor]:
    """R_e [d, l] for each expert: R_e P x is the best linear guess of x over the expert's own tokens.

    Their second moment is pulled towards the common one as if `PRIOR_TOKENS` more tokens had that.

    Args:
        down: P [l, d].
        moment: [d, d] of all tokens.
        hidden: [T, d].
        routing: of these tokens; they count by the squares of their routing weights.
        experts: how many.
    """
    for expert in range(experts):
        token, weight = selected(routing, expert)
        rows = (hidden[token] * weight).double()
        own = rows.T @ rows
        prior = moment * (own.trace() / moment.trace()) if own.trace() > 0 else moment
        yield reconstruction(down, own + prior * (PRIOR_TOKENS / max(1, len(rows))))


def narrow(spec: MoESpec, down: Tensor, guesses: Iterable[Tensor], up: Tensor) -> MoESpec:
    """The block at the latent width: gate and up times their `guesses` [d, l], outputs in the basis `up` [d, l].

    down [l, d] is the down-projection. Output biases keep their part in the span of `up`.
    """
    e = spec.experts
    start = narrow_inputs(spec, down, guesses)
    out = e.down.new_empty(len(e.down), up.shape[1], e.down.shape[2])
    for expert in range(len(e.down)):
        out[expert] = (up.T @ e.down[expert].to(up.dtype)).to(out.dtype)
    bias = None if e.down_bias is None else (e.down_bias.to(up.dtype) @ up).to(out.dtype)
    assert start.latent is not None
    latent = replace(start.latent, up=up.to(start.latent.up))
    return replace(start, experts=replace(start.experts, down=out, down_bias=bias), latent=latent)


def narrow_inputs(spec: MoESpec, down: Tensor, guesses: Iterable[Tensor], copies: int = 1) -> MoESpec:
    """The block with `copies` of its experts, gate and up times the `guesses` [d, l] of each; its outputs are zeros.

    The router, which is that of the copies already, stays as it is. down [l, d] is the down-projection.
    """
    e, rank = spec.experts, len(down)
    count = copies * len(e.up)
    dtype, device = e.up.dtype, e.up.device
    gate = None if e.gate is None else e.gate.new_empty(count, e.gate.shape[1], rank)
    wide = e.up.new_empty(count, e.up.shape[1], rank)
    for child, guess in zip(range(count), guesses, strict=True):
        expert = child % len(e.up)
        wide[child] = (e.up[expert].to(guess.dtype) @ guess).to(dtype)
        if gate is not None and e.gate is not None:
            gate[child] = (e.gate[expert].to(guess.dtype) @ guess).to(dtype)
        trim()
    zero = e.down.new_zeros(())
    experts = replace(
        e, up=wide, gate=gate, down=zero.expand(count, rank, e.down.shape[2]), num_identity=copies * e.num_identity,
        gate_bias=None if e.gate_bias is None else e.gate_bias.repeat(copies, 1),
        up_bias=None if e.up_bias is None else e.up_bias.repeat(copies, 1),
        down_bias=None if e.down_bias is None else zero.expand(count, rank),
    )  # fmt: skip
    return replace(spec, experts=experts, latent=LatentSpec(down.to(device, dtype), zero.expand(down.T.shape)))


def fit_output(
    start: MoESpec,
    full: MoESpec,
    hidden: Tensor,
    routing: Routing,
    target: Tensor,
    importance: Tensor,
    weights: Tensor,
) -> MoESpec:
    """`start` with its output side refitted, in closed form.

    Args:
        start: the latent block.
        full: the same experts with their outputs at width d, which the fit starts from; or fewer, when expert e of
            `start` is a copy of the one at e modulo their number.
        hidden: [T, d].
        routing: of `start` on these tokens.
        target: [T, d] the routed output to reach.
        importance: [d, d] metric of output errors.
        weights: [T, 1] of the tokens' residuals.
    """
    phi = features(start, hidden, routing, weights)
    before = coefficients(full.experts.down, full.experts.down_bias)
    ridge, wanted = damping(phi), target * weights
    predicted, squares, fitted = explained(phi, wanted, before, ridge)
    up, mix = factorise(predicted, squares, importance, start.latent_dim, ridge)
    if fitted is not None:
        fitted = fitted @ mix
    else:  # the fit is linear in what is to be reached and where it starts: mixed before it, less has to be held
        trim()
        fitted = fit(phi, wanted @ mix, Computed(len(before), lambda expert: before[expert] @ mix), ridge)
    m = start.intermediate_size
    down = fitted[:, :m].mT.contiguous()
    bias = None if start.experts.down_bias is None else fitted[:, m]
    assert start.latent is not None
    experts = replace(start.experts, down=down, down_bias=bias)
    return replace(start, experts=experts, latent=replace(start.latent, up=up.contiguous()))


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
        if not all_finite(tensor):
            raise LatentizeError(f"{plan.name}: {name} {list(tensor.shape)} is not finite; repair the weights")


def _in_dtypes_of(start: MoESpec, spec: MoESpec) -> MoESpec:
    """`start` in the dtypes of `spec`; a router with banks keeps at least fp32 (see `rescale.separate_banks`)."""
    dtypes = {name: tensor.dtype for name, tensor in spec.tensors().items()}
    if start.router.groups is not None and spec.router.groups is None:
        dtypes["router.weight"] = torch.promote_types(spec.router.weight.dtype, torch.float32)
    names = {id(tensor): name for name, tensor in start.tensors().items()}
    given = {tensor.untyped_storage().data_ptr() for tensor in spec.tensors().values()}

    def own(tensor: Tensor) -> Tensor:
        made = tensor.to(dtypes.get(names[id(tensor)], spec.experts.up.dtype)).contiguous()
        return made.clone() if made.untyped_storage().data_ptr() in given else made

    return start.map_tensors(own)
