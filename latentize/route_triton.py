"""`torch.ops.latentize.select_experts`: the routing function on CUDA in one launch. Forward only.

The definition is `latentize.routing.route`; it serves gradients, routers with groups or p-norms, and all other devices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentize import kernels_triton, routing
from latentize.kernels_triton_steps import power_of_two
from latentize.routing import Routing
from latentize.spec import RouterSpec

#: Experts up to which one program holds them all.
MOST_EXPERTS = 2048

torch.library.define(
    "latentize::select_experts",
    "(Tensor logits, Tensor? selection_bias, Tensor? per_expert_scale, int top_k, float? softcap, str score,"
    " bool topk_first, bool bias_on_logit, str normalize, float eps, float scale) -> (Tensor, Tensor)",
)
_select_experts = torch.ops.latentize.select_experts.default


def routed(logits: Tensor, router: RouterSpec) -> Routing:
    """Routing of logits [T, N]: in one launch where that is possible, else by the definition."""
    return route(logits, router) if serves(logits, router) else routing.route(logits, router)


def serves(logits: Tensor, router: RouterSpec) -> bool:
    """Whether one launch can do this routing: no gradient asked for, no groups, no p-norm, a device that runs it."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and logits.requires_grad):
        return False  # a compiler fuses the definition itself, and exporters know its operations
    plain = router.groups is None and router.normalize != "norm" and logits.shape[-1] <= MOST_EXPERTS
    return plain and logits.dtype == torch.float32 and logits.numel() > 0 and kernels_triton.runs_on(logits.device)


def route(logits: Tensor, router: RouterSpec) -> Routing:
    """What `latentize.routing.route` gives for logits [T, N] fp32 and a router that `serves`."""
    indices, weights = _select_experts(
        logits, router.selection_bias, router.per_expert_scale, router.top_k, router.softcap, router.score,
        router.order == "topk_first", router.selection_bias_on == "logit", router.normalize, router.eps, router.scale,
    )  # fmt: skip
    return Routing(logits, weights, indices)


@torch.library.register_fake("latentize::select_experts")  # type: ignore[untyped-decorator]
def _fake(logits: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], others[2])
    return logits.new_empty(shape, dtype=torch.int64), logits.new_empty(shape)


@torch.library.impl("latentize::select_experts", ("cuda", "cpu"))
def _launch(
    logits: Tensor, selection_bias: Tensor | None, per_expert_scale: Tensor | None, top_k: int, softcap: float | None,
    score: str, topk_first: bool, bias_on_logit: bool, normalize: str, eps: float, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from latentize.kernels_triton_route import select_experts

    tokens, experts = logits.shape
    indices = torch.empty(tokens, top_k, dtype=torch.int64, device=logits.device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=logits.device)
    vectors = (None if t is None else t.contiguous() for t in (selection_bias, per_expert_scale))
    with kernels_triton.on_device(logits):
        select_experts[(tokens,)](
            logits.contiguous(), *vectors, indices, weights, NUM_EXPERTS=experts, EXPERTS=power_of_two(experts),
            TOP_K=top_k, SLOTS=power_of_two(top_k), SOFTCAP=softcap, SCORE=score, TOPK_FIRST=topk_first,
            BIAS_ON_LOGIT=bias_on_logit, NORMALIZE=normalize, EPS=eps, SCALE=scale,
            num_warps=1 if experts <= 1024 else 4,
        )  # fmt: skip
    return indices, weights
