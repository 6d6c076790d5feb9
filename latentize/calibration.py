"""Calibration data as a user gives it: an iterable of batches, made into a sequence and tried on the model."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentize.errors import LatentizeError, first_line
from latentize.heal_plan import HealPlan
from latentize.inputs import Batch, Inputs, observing
from latentize.sources import as_inputs, check_runs, out_of_memory

_log = logging.getLogger("latentize")

#: Tokens, and batches for each step of healing, that are taken of an iterable which does not say how much it holds.
ENOUGH_TOKENS = 2**19
ENOUGH_BATCHES = 2.5


class Taken(list[Batch]):
    """The first batches of an iterable that held more; `note` says how many."""

    def __init__(self, batches: Iterable[Batch], tokens: int) -> None:
        super().__init__(batches)
        self.note = (
            f"calibration: the first {len(self):,} batches, {tokens:,} tokens, were taken of an iterable that goes on: "
            "enough for this recipe (a list is taken whole)"
        )


def batches_of(
    calibration: Iterable[Batch] | None, model: nn.Module, heal_steps: int | None = None
) -> Sequence[Batch]:
    """Calibration data as a sequence that can be gone through again; empty when there is none.

    Args:
        calibration: an iterable, possibly one-shot, of tuples (args) or dicts (kwargs); None for none. One that does
            not say how many batches it holds may go on for ever: no more is taken than there is use for.
        model: checked to accept them, as far as they differ.
        heal_steps: those of the recipe.

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
    batches = calibration if isinstance(calibration, (list, tuple)) else _taken(calibration, heal_steps)
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


def _taken(calibration: Iterable[Batch], heal_steps: int | None) -> list[Batch]:
    """All batches of an iterable, or the first ones where there is no end in sight and they are enough."""
    if _says_its_length(calibration):
        return list(_produced(calibration))
    wanted = ENOUGH_BATCHES * HealPlan.chosen(heal_steps).model_steps
    batches: list[Batch] = []
    tokens = 0
    for batch in _produced(calibration):
        if len(batches) >= wanted and tokens >= ENOUGH_TOKENS:
            taken = Taken(batches, tokens)
            _log.info(taken.note)
            return taken
        batches.append(batch)
        tokens += _tokens(batch)
    return batches


def _says_its_length(calibration: Iterable[Batch]) -> bool:
    try:
        return len(calibration) >= 0  # type: ignore[arg-type]
    except TypeError:
        return False


def _tokens(batch: Batch) -> int:
    """Tokens of a batch; 1 where no axis of them is seen, so that any number of batches comes to an end."""
    leading = Inputs.of(batch).leading() if isinstance(batch, (tuple, list, Mapping)) else None
    if leading is None:
        return 1
    shape = leading.shape[:-1] if leading.is_floating_point() else leading.shape
    return max(1, shape.numel())


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
