"""A block's routing, its experts with their projections, or both, by one call of the compiled kernels.

For a few tokens on CPU, whose weights are read in less time than PyTorch takes to dispatch a dozen operations. Forward
only: gradients, whoever watches operations, and what the kernel does not do get the operations of `latentize.moe`.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

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
    """`RouterPlan` of kernels_native_block.h."""

    _fields_ = (
        ("tensors", ctypes.c_void_p * 4), ("numbers", ctypes.c_int64 * 7), ("scalars", ctypes.c_double * 3)
    )  # fmt: skip


class _ExpertsPlan(ctypes.Structure):
    """`ExpertsPlan` of kernels_native_block.h."""

    _fields_ = (
        ("tensors", ctypes.c_void_p * 9), ("numbers", ctypes.c_int64 * 6), ("scalars", ctypes.c_double * 7)
    )  # fmt: skip


class Kept:
    """What a module was last found to hold, and what the kernel is told of it: None where it cannot compute this.

    A copy of the module, or one that was read from a file, starts anew.
    """

    def __init__(self) -> None:
        self.key: tuple[Any, ...] = ()
        self.source: Any = None
        self.plan: Any = None

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


def route_few(hidden: Tensor, router: Router) -> Routing | None:
    """Routing of hidden [T, d], or None where the kernel does not serve."""
    if not (_serves(hidden) and hidden.dim() == 2):
        return None
    plan = _router(hidden, router)
    if plan is None:
        return None
    tokens, (k, rows), wide = hidden.shape[0], plan.numbers[:2], _wide(hidden.dtype)
    logits, weights = torch.empty(tokens, rows, dtype=wide), torch.empty(tokens, k, dtype=wide)
    indices = torch.empty(tokens, k, dtype=torch.int64)
    written = (None, logits.data_ptr(), weights.data_ptr(), indices.data_ptr())
    _call(hidden, hidden, (k, None, None), plan, None, written)
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
    ops.check_indices(indices, plan.numbers[0] + plan.numbers[5])
    indices, weights = indices.contiguous(), weights.to(hidden.dtype).contiguous()
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    chosen = (indices.shape[1], indices.data_ptr(), weights.data_ptr())
    raise_for(_call(hidden, hidden, chosen, None, plan, (out.data_ptr(), None, None, None)), indices)
    return out


def block_few(hidden: Tensor, seen: Tensor, router: Router, experts: LatentExperts) -> Tensor | None:
    """Routed output [..., d] of hidden and of what the router reads [..., d]; None where the kernel does not serve."""
    if not _serves(hidden):
        return None
    if seen is not hidden and not (_ordinary(seen) and seen.dtype == hidden.dtype and seen.shape == hidden.shape):
        return None
    first, second = _router(hidden, router), _experts(hidden, experts)
    if first is None or second is None:
        return None
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    _call(hidden, seen, (first.numbers[0], None, None), first, second, (out.data_ptr(), None, None, None))
    return out


def _serves(hidden: Tensor) -> bool:
    """Whether hidden [..., d] is a few tokens on CPU, and nobody watches what is done with them."""
    if torch.compiler.is_compiling() or watched() or not _ordinary(hidden):
        return False
    if ops.is_plain() or torch.is_autocast_enabled("cpu") or not 0 < hidden.numel() <= FEW * hidden.shape[-1]:
        return False
    return block_of(hidden.dtype) is not None


def _ordinary(tensor: Tensor) -> bool:
    """Whether this is a dense CPU tensor of torch's own, [..., d], whose gradient nobody asks for."""
    dense = type(tensor) in (Tensor, nn.Parameter) and tensor.is_cpu and tensor.layout is torch.strided
    return dense and tensor.dim() > 0 and not (tensor.requires_grad and torch.is_grad_enabled())


def _held(module: nn.Module, names: tuple[str, ...]) -> list[Tensor | None] | None:
    """A module's tensors by name; None where one is made anew at each look, or its gradient is asked for.

    In place of attributes, as a module's `__getattr__` takes longer than all else here.
    """
    attributes = {**vars(module), **module._parameters, **module._buffers}
    try:
        tensors = [attributes[name] for name in names]
    except KeyError:  # a parametrised one
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        return None
    return tensors


def _key(hidden: Tensor, tensors: list[Tensor | None], *others: Any) -> tuple[Any, ...]:
    """All that a plan is made of: it serves as long as this stays as it is."""
    found = [None if t is None else (t.data_ptr(), t.dtype, t.shape, t.is_contiguous()) for t in tensors]
    return (hidden.dtype, hidden.shape[-1], found, others)


def _readable(tensors: list[Tensor | None], dtype: torch.dtype) -> bool:
    """Whether the kernel can read these tensors where they lie, as of this dtype."""
    return all(t is None or (t.dtype == dtype and t.is_contiguous() and _ordinary(t)) for t in tensors)


def _pointers(tensors: list[Tensor | None]) -> tuple[int | None, ...]:
    return tuple(None if t is None else t.data_ptr() for t in tensors)


def _router(hidden: Tensor, router: Router) -> _RouterPlan | None:
    """What the kernel is told of a router that reads hidden [..., d]."""
    tensors = _held(router, ("weight", "bias", "selection_bias", "per_expert_scale"))
    kept, rule = router.kept, router.rule
    if tensors is None:
        return None
    key = _key(hidden, tensors)
    if kept.key != key or kept.source is not rule:
        kept.plan = _plan_router(hidden, tensors, rule)
        kept.key, kept.source = key, rule
    plan: _RouterPlan | None = kept.plan
    return plan


def _plan_router(hidden: Tensor, tensors: list[Tensor | None], rule: RouterSpec) -> _RouterPlan | None:
    weight = tensors[0]
    if weight is None or rule.groups is not None or rule.normalize not in _NORMALIZE or rule.softcap == 0.0:
        return None
    rows, width = weight.shape
    wide = _wide(hidden.dtype)
    if not _readable(tensors[:2], weight.dtype) or not _readable(tensors[2:], wide):
        return None
    if weight.dtype not in (wide, hidden.dtype) or width != hidden.shape[-1] or not 0 < rule.top_k <= rows:
        return None
    first, on_logit = rule.order == "topk_first", rule.selection_bias_on == "logit"
    kinds = (_SCORES[rule.score], _NORMALIZE[rule.normalize], first, on_logit)
    numbers = (rule.top_k, rows, weight.dtype == wide, *kinds)
    return _RouterPlan(_pointers(tensors), numbers, (rule.softcap or 0.0, rule.eps, rule.scale))


def _experts(hidden: Tensor, experts: LatentExperts) -> _ExpertsPlan | None:
    """What the kernel is told of experts that read hidden [..., d]."""
    names = "gate", "up", "down", "gate_bias", "up_bias", "down_bias", "latent_down", "latent_up", "output_bias"
    tensors, kept, e = _held(experts, names), experts.kept, experts
    if tensors is None:
        return None
    key = _key(hidden, tensors, e.weights_on_input, e.num_identity, e.output_scale)
    if kept.key != key or kept.source is not e.activation:
        kept.plan = _plan_experts(hidden, tensors, e)
        kept.key, kept.source = key, e.activation
    plan: _ExpertsPlan | None = kept.plan
    return plan


def _plan_experts(hidden: Tensor, tensors: list[Tensor | None], experts: LatentExperts) -> _ExpertsPlan | None:
    e, up, (down, back) = experts, tensors[1], tensors[6:8]
    if up is None or tensors[2] is None or not _readable(tensors, hidden.dtype) or (down is None) != (back is None):
        return None
    n, m, latent = up.shape
    width = hidden.shape[-1]
    expected = {
        0: (n, m, latent), 2: (n, latent, m), 3: (n, m), 4: (n, m), 5: (n, latent),
        6: (latent, width), 7: (width, latent), 8: (width,),
    }  # fmt: skip
    if any(t is not None and t.shape != expected.get(i, t.shape) for i, t in enumerate(tensors)):
        return None
    if down is None and latent != width:
        return None
    numbers = (n, latent, m, e.weights_on_input, activation_number(e.activation), e.num_identity)
    return _ExpertsPlan(_pointers(tensors), numbers, (*activation_scalars(e.activation), e.output_scale))


def _wide(dtype: torch.dtype) -> torch.dtype:
    """What logits and weights are computed in, for hidden states of a dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _call(
    hidden: Tensor,
    seen: Tensor,
    chosen: tuple[int, int | None, int | None],
    router: _RouterPlan | None,
    experts: _ExpertsPlan | None,
    written: tuple[int | None, ...],
) -> int:
    """Run the kernel; its return code. `chosen`: k, and where the indices and weights lie that are given."""
    alike, hidden = seen is hidden, hidden.contiguous()
    seen = hidden if alike else seen.contiguous()
    width = hidden.shape[-1]
    function = block_of(hidden.dtype)
    assert function is not None
    plans = (None if router is None else ctypes.byref(router), None if experts is None else ctypes.byref(experts))
    threads = torch.get_num_threads()
    return function(
        hidden.numel() // width, width, *chosen, hidden.data_ptr(), seen.data_ptr(), *plans, *written, threads
    )
