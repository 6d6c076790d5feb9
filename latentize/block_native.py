"""A block's routing, its experts with their projections, or both, by one call of the compiled kernels.

For a few tokens on CPU, whose weights are read in less time than PyTorch takes to dispatch a dozen operations. Forward
only: gradients, whoever watches operations, and what the kernel does not do get the operations of `latentize.moe`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from latentize import ops
from latentize.kernels_native import activation_number, activation_scalars, block_of, raise_for
from latentize.route_triton import watched
from latentize.routing import Routing
from latentize.spec import RouterSpec

if TYPE_CHECKING:
    from latentize.moe import LatentExperts, Router

#: Tokens up to which the kernel reads every weight once for all of them.
FEW = 8
_SCORES = {"softmax": 0, "sigmoid": 1, "sqrt_softplus": 2}
_NORMALIZE = {"none": 0, "sum": 1, "clamp": 2}


class _RouterPlan(ctypes.Structure):
    """`RouterPlan` of kernels_native_block.h, with the kernel that takes it and where it lies."""

    function: Callable[..., int]
    address: int
    _fields_ = (
        ("tensors", ctypes.c_void_p * 4), ("numbers", ctypes.c_int64 * 8), ("scalars", ctypes.c_double * 3)
    )  # fmt: skip


class _ExpertsPlan(ctypes.Structure):
    """`ExpertsPlan` of kernels_native_block.h, with the kernel that takes it and where it lies."""

    function: Callable[..., int]
    address: int
    _fields_ = (
        ("tensors", ctypes.c_void_p * 9), ("numbers", ctypes.c_int64 * 7), ("scalars", ctypes.c_double * 7)
    )  # fmt: skip


_P = TypeVar("_P", _RouterPlan, _ExpertsPlan)
#: `Others` of kernels_native_block.h: k, indices, weights; logits, weights and indices to be written.
_Others = ctypes.c_void_p * 6


class Kept:
    """What a module was last found to hold, and what the kernel is told of it.

    A copy of the module, or one that was read from a file, starts anew.
    """

    def __init__(self) -> None:
        self.plan: Any = None  # None where the kernel cannot compute this
        self.source: Any = None
        self.others: tuple[Any, ...] = ()
        self.present: list[tuple[str, int, torch.dtype, torch.Size, bool]] = []
        self.absent: list[str] = []

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()

    def holds(self, module: nn.Module, others: tuple[Any, ...]) -> bool:
        """Whether the module holds what it held, at the same places."""
        if self.others != others:
            return False
        parameters, buffers, attributes = module._parameters, module._buffers, module.__dict__
        for name, pointer, dtype, shape, contiguous in self.present:
            t = buffers[name] if name in buffers else parameters.get(name)
            if t is None or t.data_ptr() != pointer or t.dtype is not dtype or t.shape != shape:
                return False
            if t.is_contiguous() is not contiguous:
                return False
        return all((buffers[name] if name in buffers else attributes.get(name, self)) is None for name in self.absent)

    def look(self, tensors: Mapping[str, Tensor | None], others: tuple[Any, ...], plan: Any) -> None:
        """Remember a plan and what it was made of."""
        self.others, self.plan = others, plan
        self.absent = [name for name, t in tensors.items() if t is None]
        self.present = [
            (name, t.data_ptr(), t.dtype, t.shape, t.is_contiguous()) for name, t in tensors.items() if t is not None
        ]


def route_few(hidden: Tensor, router: Router) -> Routing | None:
    """Routing of hidden [T, d], or None where the kernel does not serve."""
    if not _serves(hidden) or hidden.dim() != 2:
        return None
    plan = _router(hidden, router)
    if plan is None:
        return None
    tokens, (k, rows), wide = hidden.shape[0], plan.numbers[:2], _wide(hidden.dtype)
    logits, weights = torch.empty(tokens, rows, dtype=wide), torch.empty(tokens, k, dtype=wide)
    indices = torch.empty(tokens, k, dtype=torch.int64)
    _call(hidden, hidden, plan, None, None, _Others(k, None, None, *(t.data_ptr() for t in (logits, weights, indices))))
    return Routing(logits, weights, indices)


def experts_few(hidden: Tensor, indices: Tensor, weights: Tensor, experts: LatentExperts) -> Tensor | None:
    """Routed output [T, d] of hidden [T, d], indices and weights [T, k], or None where the kernel does not serve.

    Raises:
        ValueError: an index is negative.
    """
    if not _serves(hidden) or indices.dim() != 2 or len(indices) != len(hidden) or weights.shape != indices.shape:
        return None
    plan = _experts(hidden, experts)
    if plan is None or indices.dtype != torch.int64 or not (_ordinary(indices) and _ordinary(weights)):
        return None
    ops.check_indices(indices, plan.numbers[1] + plan.numbers[6])
    indices, weights = indices.contiguous(), weights.to(hidden.dtype).contiguous()
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    others = _Others(indices.shape[1], indices.data_ptr(), weights.data_ptr(), None, None, None)
    raise_for(_call(hidden, hidden, None, plan, out, others), indices)
    return _with_bypass(out, hidden, experts)


def block_few(
    hidden: Tensor, seen: Tensor, router: tuple[nn.Module, type[Router]], experts: tuple[nn.Module, type[LatentExperts]]
) -> Tensor | None:
    """Routed output [..., d] of hidden and of what the router reads [..., d]; None where the kernel does not serve.

    Nor does it where `router` and `experts`, modules with their types, are of other types or somebody listens to them.
    """
    if not (_serves(hidden) and _unheard(*router) and _unheard(*experts)):
        return None
    if seen is not hidden and not (_ordinary(seen) and seen.dtype == hidden.dtype and seen.shape == hidden.shape):
        return None
    first, second = _router(hidden, router[0]), _experts(hidden, experts[0])  # type: ignore[arg-type]
    if first is None or second is None:
        return None
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    _call(hidden, seen, first, second, out, None)
    return _with_bypass(out, hidden, experts[0])  # type: ignore[arg-type]


def _with_bypass(out: Tensor, hidden: Tensor, experts: LatentExperts) -> Tensor:
    """The kernel's output [..., d] and what goes around it, which the kernel knows nothing of."""
    passed_by = experts.bypassed(hidden)
    return out if passed_by is None else out.add_(passed_by)


def _serves(hidden: Tensor) -> bool:
    """Whether hidden [..., d] is a few tokens on CPU, and nobody watches what is done with them."""
    if torch.compiler.is_compiling() or watched() or not _ordinary(hidden):
        return False
    return 0 < hidden.numel() <= FEW * hidden.shape[-1] and not (ops.is_plain() or torch.is_autocast_enabled("cpu"))


def _ordinary(tensor: Tensor) -> bool:
    """Whether this is `_dense`, [..., d], and nobody asks for its gradient."""
    return _dense(tensor) and tensor.dim() > 0 and not (tensor.requires_grad and torch.is_grad_enabled())


def _dense(tensor: Tensor) -> bool:
    """Whether this is a dense CPU tensor of torch's own."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu and tensor.layout is torch.strided


def _unheard(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is one of `kind` itself, and nobody listens to its calls."""
    if type(module) is not kind or "forward" in module.__dict__:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook())


def _learns(module: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in module.parameters())


def _router(hidden: Tensor, router: Router) -> _RouterPlan | None:
    """What the kernel is told of a router that reads hidden [..., d]."""
    kept, rule = router.kept, router.rule
    others = (hidden.dtype, hidden.shape[-1])
    if kept.source is not rule or not kept.holds(router, others):
        names = "weight", "bias", "selection_bias", "per_expert_scale"
        tensors = {name: getattr(router, name) for name in names}
        kept.look(tensors, others, _plan_router(hidden, [*tensors.values()], rule))
        kept.source = rule
        if not kept.holds(router, others):  # a parametrised tensor, made anew at each look
            return None
    plan: _RouterPlan | None = kept.plan
    return None if _learns(router) else plan


def _experts(hidden: Tensor, experts: LatentExperts) -> _ExpertsPlan | None:
    """What the kernel is told of experts that read hidden [..., d]."""
    kept, e = experts.kept, experts
    others = (hidden.dtype, hidden.shape[-1], e.activation, e.weights_on_input, e.num_identity, e.output_scale)
    if not kept.holds(experts, others):
        names = "gate", "up", "down", "gate_bias", "up_bias", "down_bias", "latent_down", "latent_up", "output_bias"
        tensors = {name: getattr(e, name) for name in names}
        kept.look(tensors, others, _plan_experts(hidden, [*tensors.values()], e))
        if not kept.holds(experts, others):
            return None
    plan: _ExpertsPlan | None = kept.plan
    return None if _learns(experts) else plan


def _plan_router(hidden: Tensor, tensors: list[Tensor | None], rule: RouterSpec) -> _RouterPlan | None:
    weight, wide = tensors[0], _wide(hidden.dtype)
    if weight is None or rule.groups is not None or rule.normalize not in _NORMALIZE or rule.softcap == 0.0:
        return None
    rows, width = weight.shape
    if not _readable(tensors[:2], weight.dtype) or not _readable(tensors[2:], wide):
        return None
    if weight.dtype not in (wide, hidden.dtype) or width != hidden.shape[-1] or not 0 < rule.top_k <= rows:
        return None
    first, on_logit = rule.order == "topk_first", rule.selection_bias_on == "logit"
    kinds = (_SCORES[rule.score], _NORMALIZE[rule.normalize], first, on_logit)
    numbers = (rule.top_k, rows, width, weight.dtype == wide, *kinds)
    plan = _RouterPlan(_pointers(tensors), numbers, (rule.softcap or 0.0, rule.eps, rule.scale))
    return _with_kernel(plan, hidden.dtype)


def _plan_experts(hidden: Tensor, tensors: list[Tensor | None], experts: LatentExperts) -> _ExpertsPlan | None:
    e, up, (down, back) = experts, tensors[1], tensors[6:8]
    if up is None or tensors[2] is None or not _readable(tensors, hidden.dtype) or (down is None) != (back is None):
        return None
    n, m, latent = up.shape
    width = hidden.shape[-1]
    expected = (
        (n, m, latent), (n, m, latent), (n, latent, m), (n, m), (n, m), (n, latent),
        (latent, width), (width, latent), (width,),
    )  # fmt: skip
    if any(t is not None and t.shape != shape for t, shape in zip(tensors, expected, strict=True)):
        return None
    if down is None and latent != width:
        return None
    numbers = (width, n, latent, m, e.weights_on_input, activation_number(e.activation), e.num_identity)
    plan = _ExpertsPlan(_pointers(tensors), numbers, (*activation_scalars(e.activation), e.output_scale))
    return _with_kernel(plan, hidden.dtype)


def _with_kernel(plan: _P, dtype: torch.dtype) -> _P | None:
    function = block_of(dtype)
    if function is None:
        return None
    plan.function, plan.address = function, ctypes.addressof(plan)
    return plan


def _readable(tensors: list[Tensor | None], dtype: torch.dtype) -> bool:
    """Whether the kernel can read these tensors where they lie, as of this dtype."""
    return all(t is None or (t.dtype == dtype and t.is_contiguous() and _dense(t)) for t in tensors)


def _pointers(tensors: list[Tensor | None]) -> tuple[int | None, ...]:
    return tuple(None if t is None else t.data_ptr() for t in tensors)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What logits and weights are computed in, for hidden states of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _call(
    hidden: Tensor,
    seen: Tensor,
    router: _RouterPlan | None,
    experts: _ExpertsPlan | None,
    out: Tensor | None,
    others: ctypes.Array[ctypes.c_void_p] | None,
) -> int:
    """Run the kernel, which writes `out` and what `others` names; its return code."""
    alike, hidden = seen is hidden, hidden.contiguous()
    seen = hidden if alike else seen.contiguous()
    return (experts or router).function(  # type: ignore[union-attr]
        hidden.numel() // hidden.shape[-1],
        hidden.data_ptr(),
        seen.data_ptr(),
        None if router is None else router.address,
        None if experts is None else experts.address,
        None if out is None else out.data_ptr(),
        others,
        torch.get_num_threads(),
    )
