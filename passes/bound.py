"""Tensors of a spec as functions of a recording's constants, so that they can be evaluated for other weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from latentize.passes.capture import Recording, Value


@dataclass(frozen=True)
class Bound:
    """A tensor computed by `build` from constants of a recording."""

    values: tuple[Value, ...]
    build: Callable[[list[Tensor]], Tensor]

    def tensor(self, recording: Recording, state: Mapping[str, Tensor]) -> Tensor:
        """The tensor, with parameters and buffers taken from `state`."""
        return self.build([recording.constant(v, state) for v in self.values])

    def recorded(self) -> Tensor:
        """The tensor as it was in the recorded run."""
        return self.build([v.tensor for v in self.values])

    def then(self, function: Callable[[Tensor], Tensor]) -> Bound:
        """The same with `function` applied."""
        return Bound(self.values, lambda tensors: function(self.build(tensors)))

    def with_(self, other: Bound, function: Callable[[Tensor, Tensor], Tensor]) -> Bound:
        """`function` of this tensor and another."""
        count = len(self.values)

        def build(tensors: list[Tensor]) -> Tensor:
            return function(self.build(tensors[:count]), other.build(tensors[count:]))

        return Bound(self.values + other.values, build)
