"""More experts and more active ones without changing what the block computes: every expert becomes several copies.

With a copies of every expert and b of a family selected, a child's score is r times its parent's: r = 1/a for a
softmax over all experts, 1/b for a softmax over the selected ones, 1 for sigmoid and sqrt(softplus). Everything below
follows from asking that a child's routing weight be its parent's divided by b (b = a: all copies of a selected expert).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from latentize.errors import LatentizeError
from latentize.spec import ExpertsSpec, Groups, MoESpec, RouterSpec

#: Length of a bank direction relative to a router row: enough to tell banks apart in fp32, too little to move a score.
BANK_SHARE = 1e-3


def expand(spec: MoESpec, experts_factor: int, topk_factor: int) -> MoESpec:
    """The block with a = `experts_factor` copies of every expert and b = `topk_factor` times as many selected.

    Child c of expert e has index c * N + e; identity experts stay numbered after all the real ones. With a = b the
    function is unchanged to rounding for every routing a spec can hold. With b < a ("eff") the copies form a banks, and
    each token uses the b banks that a fixed random direction chooses: unchanged up to `BANK_SHARE` of a logit.

    Raises:
        LatentizeError: a factor below 1, b > a, a group of both real and identity experts, or b < a where the routing
            leaves no room for banks (it has groups or identity experts already).
    """
    a, b = experts_factor, topk_factor
    check_factors(spec, a, b)
    if a == 1:
        return spec
    copies = copy_experts(spec, a, b)
    if a == b:
        return copies
    return replace(copies, router=separate_banks(copies.router, _random_directions(spec.router.weight, a), b))


def copy_experts(spec: MoESpec, a: int, b: int) -> MoESpec:
    """a exact copies of every expert, each with 1/b of its parent's routing weight when b of a family are selected."""
    experts = map_experts(divided(spec, b).experts, lambda t: torch.cat([t] * a))
    experts = replace(experts, num_identity=a * spec.experts.num_identity)
    return replace(spec, router=copy_router(spec, a, b), experts=experts)


def divided(spec: MoESpec, b: int) -> MoESpec:
    """The experts of `copy_experts(spec, 1, b)`, under the router as it is: f(w x / b) is not f(w x) / b.

    Where weights are on the input, copies get them whole and outputs are divided; elsewhere nothing changes.
    """
    e = spec.experts
    if spec.router.applies_to != "input" or b == 1:
        return spec
    down_bias = None if e.down_bias is None else e.down_bias / b
    return replace(spec, experts=replace(e, down=e.down / b, down_bias=down_bias))


def copy_router(spec: MoESpec, a: int, b: int) -> RouterSpec:
    """The router of `copy_experts(spec, a, b)`."""
    router = _copy_router(spec.router, spec.num_experts, a, b, _score_share(spec.router, a, b))
    if router.applies_to != "input":
        return router
    scales = _divide_identities(router, a * spec.num_experts, b)
    return replace(router, scale=router.scale * b, per_expert_scale=scales)


def separate_banks(router: RouterSpec, directions: Tensor, kept: int) -> RouterSpec:
    """Copies made into banks (bank c: every expert's child c), of which each token may use only the best `kept`.

    Args:
        router: that of an ungrouped block whose experts are a consecutive banks.
        directions: [a, d] added to the router rows of each bank. The bank with the largest direction · x wins; a shift
            common to a bank does not reorder its experts. Not scaled here.
        kept: banks a token may use.

    Returns:
        The router with its weight in at least fp32, since a small direction does not survive rounding to bf16.
    """
    a = len(directions)
    weight = router.weight
    dtype = torch.promote_types(weight.dtype, torch.float32)
    shift = directions.to(weight.device, dtype).repeat_interleave(len(weight) // a, 0)
    groups = Groups(count=a, kept=kept, score="max")
    return replace(router, weight=weight.to(dtype) + shift, groups=groups)


def simplex(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """`count` unit vectors [count, count - 1] with equal angles between them: the corners of a regular simplex."""
    if count == 1:
        return torch.zeros(1, 0, dtype=dtype)
    centred = torch.eye(count, dtype=torch.float64) - 1.0 / count
    basis = torch.linalg.qr(centred[:, : count - 1])[0]
    corners: Tensor = torch.nn.functional.normalize(centred @ basis, dim=1)
    return corners.to(dtype)


def check_factors(spec: MoESpec, a: int, b: int) -> None:
    """Raise the LatentizeError that `expand(spec, a, b)` would."""
    if a < 1 or b < 1:
        raise LatentizeError(f"experts factor {a} and top-k factor {b}: both must be at least 1")
    if b > a:
        raise LatentizeError(
            f"top-k factor {b} is larger than experts factor {a}: with {a} copies of each expert a token cannot select "
            f"{b} of them; lower the top-k factor or raise the experts factor"
        )
    groups, identities = spec.router.groups, spec.experts.num_identity
    if a > 1 and groups is not None and identities:
        size = (spec.num_experts + identities) // groups.count
        if spec.num_experts % size:
            raise LatentizeError(
                f"a routing group of {size} holds both real and identity experts ({spec.num_experts} real, "
                f'{identities} identity): its copies cannot be numbered with the real ones first; use variant "fixed"'
            )
    if b < a and (groups is not None or identities):
        what = f"{groups.count} routing groups" if groups is not None else f"{identities} identity experts"
        raise LatentizeError(
            f"{a} times the experts with only {b} times as many selected needs routing groups of its own, and this "
            f'block has {what}: use variant "acc" (top-k factor {a}) or "fixed" (experts factor 1)'
        )


def _score_share(router: RouterSpec, a: int, b: int) -> float:
    """A child's score relative to its parent's."""
    if router.score != "softmax":
        return 1.0
    return 1.0 / (a if router.order == "score_first" else b)


def _copy_router(router: RouterSpec, real: int, a: int, b: int, share: float) -> RouterSpec:
    """Rows, biases and scales copied; eps, scale and score biases such that a child's weight is its parent's / b."""
    if router.normalize == "norm":
        scale = b ** (1.0 / router.p - 1.0)
    else:
        scale = 1.0 / (b * share) if router.normalize == "none" else 1.0

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else torch.cat([tensor[:real]] * a + [tensor[real:]] * a)

    selection_bias = rows(router.selection_bias)
    on_score = router.order == "score_first" and router.selection_bias_on == "score"
    if selection_bias is not None and on_score and share != 1.0:
        selection_bias = selection_bias * share  # it is compared with scores, which have shrunk
    groups = router.groups
    if groups is not None:
        groups = replace(groups, count=groups.count * a, kept=groups.kept * b)
    weight = rows(router.weight)
    assert weight is not None
    return replace(
        router,
        weight=weight,
        top_k=router.top_k * b,
        bias=rows(router.bias),
        selection_bias=selection_bias,
        groups=groups,
        eps=router.eps * b * share,
        scale=router.scale * scale,
        per_expert_scale=rows(router.per_expert_scale),
    )


def _divide_identities(router: RouterSpec, real: int, b: int) -> Tensor | None:
    """Per-expert scales for identity experts, which have no output weights that could be divided."""
    scales = router.per_expert_scale
    if len(router.weight) == real:
        return scales
    scales = router.weight.new_ones(len(router.weight)) if scales is None else scales.clone()
    scales[real:] /= b
    return scales


def map_experts(experts: ExpertsSpec, function: Callable[[Tensor], Tensor]) -> ExpertsSpec:
    """The experts with `function` applied to each of their tensors."""

    def optional(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else function(tensor)

    return replace(
        experts,
        up=function(experts.up),
        down=function(experts.down),
        gate=optional(experts.gate),
        gate_bias=optional(experts.gate_bias),
        up_bias=optional(experts.up_bias),
        down_bias=optional(experts.down_bias),
    )


def _random_directions(weight: Tensor, count: int) -> Tensor:
    """Bank directions [count, d] that need no data: the corners of a simplex in a fixed random subspace.

    The subspace avoids what the router reads most, so that every expert's tokens spread over the banks.
    """
    rows = weight.double()
    unread = torch.linalg.eigh(rows.T @ rows)[1][:, : max(count - 1, weight.shape[1] // 2)]
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(count - 1, unread.shape[1], generator=generator, dtype=torch.float64) / unread.shape[1] ** 0.5
    length = BANK_SHARE * rows.norm(dim=1).mean().item()
    directions: Tensor = length * simplex(count).to(rows) @ (mix.to(rows) @ unread.T)
    return directions
