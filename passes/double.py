"""Run any module in fp64: widened copies, casts and factories, and the kernels that PyTorch lacks in it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from latentize.passes.copying import deep_copy

_NARROW = (torch.float32, torch.bfloat16, torch.float16)


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype that a module computes in: of its first floating parameter that is not only a code for storage."""
    found = (p.dtype for p in module.parameters() if p.is_floating_point() and p.element_size() >= 2)
    return next(found, torch.float32)


def in_double(module: nn.Module, known: Mapping[int, Tensor] | None = None) -> nn.Module:
    """A copy of the module in fp64 and eval mode; dtypes written into captured graphs are widened too.

    Args:
        module: what to copy.
        known: fp64 tensors that the copy is to use in place of the module's own, by the ids of those.
    """
    memo: dict[int, Any] = dict(known or {})
    for parameter in module.parameters():
        if type(parameter) is nn.Parameter and parameter.is_floating_point() and id(parameter) not in memo:
            wide = parameter.detach().to(torch.float64, copy=True)  # copied once, not first as it is
            memo[id(parameter)] = nn.Parameter(wide, requires_grad=parameter.requires_grad)
    return widen(evaluating(deep_copy(module, memo).double()))


def in_own_dtype(module: nn.Module) -> nn.Module:
    """A copy of the module in eval mode that has its own buffers and reads the module's parameters."""
    return evaluating(deep_copy(module, {id(parameter): parameter for parameter in module.parameters()}))


def widen(module: nn.Module) -> nn.Module:
    """Let the captured graphs in a module compute in fp64, in place."""
    for child in module.modules():
        graph = child.__dict__.get("_graph", child.__dict__.get("graph"))
        if isinstance(graph, fx.Graph):
            _widen(graph)
            if isinstance(child, fx.GraphModule):
                child.recompile()
    return module


def _widen(graph: fx.Graph) -> None:
    def wide(item: Any) -> Any:
        return torch.float64 if isinstance(item, torch.dtype) and item in _NARROW else item

    for node in list(graph.nodes):
        if "_assert_tensor_metadata" in str(node.target) and not node.users:
            graph.erase_node(node)
            continue
        node.args = pytree.tree_map(wide, node.args)
        node.kwargs = pytree.tree_map(wide, node.kwargs)


def evaluating(module: nn.Module) -> nn.Module:
    """The module itself in eval mode, exported modules included, whose own `eval` refuses."""
    for child in module.modules():
        child.training = False
    return module


def kernel(func: Any, args: tuple[Any, ...]) -> Any:
    """The fp64 implementation to call instead of `func` on these arguments; `func` itself where it has one."""
    if func is not torch.ops.aten._grouped_mm.default:
        return func
    if args[0].is_meta:
        return grouped_mm_shape
    return grouped_mm if args[0].dtype == torch.float64 else func


def grouped_mm_shape(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """What `aten._grouped_mm` returns on the meta device, for dtypes that its own shape function refuses."""
    if a.dim() == 2 and b.dim() == 3:
        return a.new_empty(a.shape[0], b.shape[2])
    if a.dim() == 2 and offs is not None:
        return a.new_empty(offs.shape[0], a.shape[0], b.shape[1])
    return a.new_empty(*a.shape[:-1], b.shape[-1])


def grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor | None = None, bias: Tensor | None = None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """`aten._grouped_mm`: rows (or columns) of `a` up to each offset times their own matrix of `b`.

    Args:
        a: [rows, inner] or [groups, rows, inner].
        b: [groups, inner, columns] or [inner, columns].
        offs: [groups] end of each group along the axis that is shared out; None when both have a group axis.
        bias: not supported by PyTorch's own kernel either.
        out_dtype: dtype of the result.
    """
    assert bias is None
    if offs is None:
        return torch.bmm(a, b).to(out_dtype or a.dtype)
    ends = offs.tolist()
    spans = list(zip([0, *ends[:-1]], ends, strict=True))
    if a.dim() == 2 and b.dim() == 3:
        out = a.new_zeros(a.shape[0], b.shape[2])
        for group, (start, end) in enumerate(spans):
            if end > start:
                out[start:end] = a[start:end] @ b[group]
    elif a.dim() == 2:
        out = torch.stack([a[:, start:end] @ b[start:end] for start, end in spans])
    else:
        out = a.new_zeros(a.shape[1], b.shape[1])
        for group, (start, end) in enumerate(spans):
            out[:, start:end] = a[group] @ b[:, start:end]
    return out.to(out_dtype or a.dtype)


class Fp64Kernels(TorchDispatchMode):
    """Lets modules run in fp64 whose kernels do not, or which cast to another floating dtype on the way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return kernel(func, args)(*args, **widened(kwargs or {}))


def widened(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments of an ATen call with a narrow floating dtype replaced by fp64."""
    return {k: torch.float64 if k == "dtype" and v in _NARROW else v for k, v in kwargs.items()}


@contextlib.contextmanager
def in_fp64() -> Iterator[None]:
    """Everything that is computed inside is computed in fp64, whatever dtypes the code names."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Fp64Kernels():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch.set_default_dtype(before)
