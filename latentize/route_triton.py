"""`torch.ops.latentize.select_experts`: the routing function on CUDA in one launch. Forward only.

The definition is `latentize.routing.route`; it serves gradients, routers with groups or p-norms, and all other devices.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from latentize import kernels_triton, ops, routing
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
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._is_torch_function_mode_enabled
_transforms, _tracing = torch._C._functorch.peek_interpreter_stack, torch._C._get_tracing_state
_select_experts = torch.ops.latentize.select_experts.default


def routed(logits: Tensor, router: RouterSpec) -> Routing:
    """Routing of logits [T, N]: in one launch where that is possible, else by the definition."""
    return route(logits, router) if serves(logits, router) else routing.route(logits, router)


def serves(logits: Tensor, router: RouterSpec) -> bool:
    """Whether one launch can do this routing here and now.

    Not where a gradient is asked for or operations are being watched, traced or compiled: they see the definition's.
    """
    if torch.compiler.is_compiling() or watched() or ops.is_plain():
        return False
    tensors = (logits, router.selection_bias, router.per_expert_scale)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return False
    if router.groups is not None or router.normalize == "norm":
        return False
    fits = logits.dim() == 2 and 0 < router.top_k <= logits.shape[-1] <= MOST_EXPERTS and logits.numel() > 0
    return fits and logits.dtype == torch.float32 and kernels_triton.runs_on(logits.device)


def logits_of(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden @ weight.T + bias [T, N] in fp32 (fp64 for fp64 hidden states) of hidden [T, d] and weight [N, d].

    On CUDA in 16 bits one product gives fp32, the same sums without widened copies, where no gradient is asked for.
    """
    narrow = hidden.dtype == weight.dtype and hidden.dtype in (torch.bfloat16, torch.float16)
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    seen = torch.compiler.is_compiling() or watched()
    if narrow and hidden.is_cuda and torch.version.hip is None and hidden.dim() == 2 and not (learns or seen):
        logits = torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return logits if bias is None else logits + bias.to(torch.float32)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def watched() -> bool:
    """Whether somebody sees single operations: a mode of Python's dispatch, a trace, a transform such as vmap."""
    return bool(_dispatch_modes() or _function_modes() or _transforms() is not None or _tracing() is not None)


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
