"""How a model is called here: a batch is a tuple of args or a dict of kwargs, it can be brought to another number of
tokens, and looking at a model leaves it as it was found."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

#: One batch of calibration or evaluation data: positional arguments, or keyword arguments.
Batch = tuple[Any, ...] | Mapping[str, Any]


@dataclass(frozen=True)
class Inputs:
    """The arguments of one call."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: Batch) -> Inputs:
        """The arguments that `batch` stands for."""
        return cls(kwargs=dict(batch)) if isinstance(batch, Mapping) else cls(args=tuple(batch))

    def call(self, model: nn.Module) -> Any:
        """What `model` returns for these arguments, which stay as they are even where it writes to them."""
        args, kwargs = owned(self.args, self.kwargs)
        return model(*args, **kwargs)

    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, in order."""
        return [leaf for leaf in pytree.tree_leaves((self.args, dict(self.kwargs))) if isinstance(leaf, Tensor)]

    @property
    def whole_numbers(self) -> bool:
        """Whether no tensor among the arguments holds floats, as where a model reads token ids."""
        return not any(tensor.is_floating_point() for tensor in self.tensors())

    def leading(self) -> Tensor | None:
        """The tensor whose axes are taken for batch and tokens: see `with_tokens`."""
        return next((tensor for tensor in self.tensors() if _batch_and_tokens(tensor) is not None), None)


def owned(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments for one call: copies of whatever it may write to, tensors and caches for example."""
    copied: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(own, (args, dict(kwargs)))
    return copied


def own(item: Any) -> Any:
    """A copy of one argument that a call may write to; what cannot be copied is shared."""
    if item is None or isinstance(item, (bool, int, float, str)):
        return item
    if isinstance(item, Tensor):
        return item.clone()
    try:
        return copy.deepcopy(item)
    except Exception:  # what cannot be copied is shared
        return item


@contextmanager
def observing(*models: nn.Module) -> Iterator[None]:
    """Run `models` in eval mode without gradients; afterwards their modes and the random states are as they were."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    python_state = random.getstate()
    try:
        for module, _ in modes:
            module.training = False
        with buffers_kept(*models), torch.random.fork_rng(), torch.no_grad():
            yield
    finally:
        random.setstate(python_state)
        for module, training in modes:
            module.training = training


@contextmanager
def buffers_kept(*models: nn.Module) -> Iterator[None]:
    """Whatever runs inside, the buffers of `models` (caches, counters) are afterwards the tensors they were."""
    modules = {m: None for model in models for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)}
    held = [(module, dict(module._buffers)) for module in modules]
    values = {b: b.detach().clone() for _, buffers in held for b in buffers.values() if b is not None and not b.is_meta}
    try:
        yield
    finally:
        for module, buffers in held:
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in values.items():
                if buffer.shape != value.shape:
                    buffer.data = value
                elif not torch.equal(buffer, value) and not buffer.is_inference():
                    buffer.copy_(value)


def with_tokens(args: tuple[Any, ...], kwargs: Mapping[str, Any], tokens: int) -> Inputs | None:
    """The same arguments for one sequence of `tokens` tokens, values repeated or cut; None when no token axis is seen.

    The first tensor of one of these shapes decides: integers [B, T] (token ids), floats [B, T, d] (hidden states),
    floats [T, d]. In every tensor the axes of length T then get length `tokens` and a leading axis of length B gets
    length 1; other integers that count up along an axis (positions) go on counting. Nothing is run: see `runnable_at`.
    """
    inputs = Inputs(args, dict(kwargs))
    leading = inputs.leading()
    sizes = None if leading is None else _batch_and_tokens(leading)
    if sizes is None:
        return None
    batch, length = sizes

    def resize(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return _resize(leaf, batch, length, tokens, _repeat_axis if leaf is leading else _continue_axis)

    new_args, new_kwargs = pytree.tree_map(resize, (inputs.args, inputs.kwargs))
    return Inputs(new_args, new_kwargs)


def runnable_at(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], tokens: int
) -> tuple[Inputs | None, str]:
    """`with_tokens`, proved by running `model` on the result: (inputs, ""), or (None, the reason)."""
    inputs = with_tokens(args, kwargs, tokens)
    if inputs is None:
        shapes = ", ".join(str(list(t.shape)) for t in Inputs(args, kwargs).tensors()) or "none"
        return None, f"no token axis in the example inputs (tensors: {shapes}); expected ids [B, T] or states [B, T, d]"
    try:
        with observing(model):
            inputs.call(model)
    except Exception as error:  # whatever the user's model raises is the reason
        what = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return None, f"the model does not run on {tokens} tokens: {what}"
    return inputs, ""


def _batch_and_tokens(tensor: Tensor) -> tuple[int | None, int] | None:
    if tensor.is_floating_point():
        if tensor.ndim == 3:
            return tensor.shape[0], tensor.shape[1]
        return (None, tensor.shape[0]) if tensor.ndim == 2 else None
    return (tensor.shape[0], tensor.shape[1]) if tensor.ndim == 2 and not tensor.is_complex() else None


def _resize(
    tensor: Tensor, batch: int | None, length: int, tokens: int, along: Callable[[Tensor, int, int], Tensor]
) -> Tensor:
    states = tensor.is_floating_point() and tensor.ndim == (2 if batch is None else 3)
    for axis in range(tensor.ndim - states):  # the last axis of hidden states is d, whatever its length
        size = tensor.shape[axis]
        if axis == 0 and batch is not None and tensor.ndim > 1 and size == batch:
            tensor = tensor[:1]
        elif size == length and size:
            tensor = along(tensor, axis, tokens)
    return tensor


def _repeat_axis(tensor: Tensor, axis: int, tokens: int) -> Tensor:
    return tensor.index_select(axis, torch.arange(tokens, device=tensor.device) % tensor.shape[axis])


def _continue_axis(tensor: Tensor, axis: int, tokens: int) -> Tensor:
    """Repeated, but positions go on counting."""
    repeated, length = _repeat_axis(tensor, axis, tokens), tensor.shape[axis]
    if tensor.dtype not in (torch.int32, torch.int64) or length < 2 or not bool((tensor.diff(dim=axis) == 1).all()):
        return repeated
    shape = [1] * tensor.ndim
    shape[axis] = tokens
    laps = torch.arange(tokens, device=tensor.device) // length * length
    return repeated + laps.to(tensor.dtype).view(shape)
