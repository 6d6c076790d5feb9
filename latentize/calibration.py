"""Calibration data as a user gives it: an iterable of batches, made into a sequence and tried on the model."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentize.errors import LatentizeError, first_line
from latentize.inputs import Batch, observing
from latentize.sources import as_inputs, check_runs, out_of_memory


def batches_of(calibration: Iterable[Batch] | None, model: nn.Module) -> Sequence[Batch]:
    """Calibration data as a sequence that can be gone through again; empty when there is none.

    Args:
        calibration: an iterable, possibly one-shot, of tuples (args) or dicts (kwargs); None for none.
        model: checked to accept them, as far as they differ.

    Raises:
        LatentizeError: it is not an iterable of batches, is empty, or the model rejects a batch.
    """
    if calibration is None:
        return ()
    if isinstance(calibration, (Mapping, Tensor, str)) or not isinstance(calibration, Iterable):
        raise LatentizeError(
            f"calibration: expected an iterable of batches, found one {type(calibration).__name__}; give a list of "
            "tuples (arguments) or dicts (keyword arguments)"
        )
    batches = calibration if isinstance(calibration, (list, tuple)) else list(_produced(calibration))
    if not batches:
        raise LatentizeError(
            "calibration: it holds no batch; give at least one, or none at all to use the weights alone"
        )
    tried = _Tried()
    with observing(model):
        for number, batch in enumerate(batches):
            what = f"calibration batch {number}"
            args, kwargs = as_inputs(batch, what)
            if tried.is_new(args, kwargs):
                check_runs(model, args, kwargs, what)
    return batches


def example_batch(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Batch:
    """The example inputs as one batch; where there are both kinds of arguments, the positional ones get their names."""
    if not args or not kwargs:
        return dict(kwargs) if kwargs else args
    return {**inspect.signature(model.forward).bind_partial(*args).arguments, **kwargs}


class _Tried:
    """Remembers which inputs a model was tried on, so that only those that could fail differently are run too."""

    def __init__(self) -> None:
        self._shapes: set[str] = set()
        self._low, self._high = 0, -1

    def is_new(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether inputs differ in names, types, axes, sizes of the last axis of floats, or range of integers."""
        leaves, structure = pytree.tree_flatten((args, dict(kwargs)))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        shapes = [(str(t.dtype), t.ndim, t.shape[-1] if t.ndim and t.is_floating_point() else None) for t in tensors]
        integers = [t for t in tensors if t.dtype in (torch.int32, torch.int64) and t.numel()]
        low = min((int(t.min()) for t in integers), default=0)
        high = max((int(t.max()) for t in integers), default=-1)
        key = f"{structure}{shapes}"
        if key in self._shapes and low >= self._low and high <= self._high:
            return False
        self._shapes.add(key)
        self._low, self._high = min(low, self._low), max(high, self._high)
        return True


def _produced(calibration: Iterable[Batch]) -> Iterator[Batch]:
    """Copies of the batches: whatever makes them may fill the same tensors again."""
    number = 0
    try:
        for batch in calibration:
            yield pytree.tree_map(lambda item: item.clone() if isinstance(item, Tensor) else item, batch)
            number += 1
    except LatentizeError:
        raise
    except Exception as error:
        if out_of_memory(error):
            raise
        raise LatentizeError(f"calibration batch {number}: producing it failed: {first_line(error)}") from error
