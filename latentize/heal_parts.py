"""A step of healing taken in parts, and the parts put together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Part(NamedTuple):
    """What one worker found on its part of a step.

    `wrong` over `whole` is the distance of the outputs (`latentize.distill.OutputLoss.sums`), `gradients` those of the
    part's own loss, None where a parameter has none; `counts` are selections [N] by block.
    """

    wrong: float
    whole: float
    gradients: list[Tensor | None]
    counts: Mapping[str, Tensor]

    @property
    def distance(self) -> float:
        """Of the outputs, relative to the whole."""
        return self.wrong / max(self.whole, 1e-30)


def together(parts: Sequence[Part | None]) -> Part | None:
    """One part of all, in which each counts by its `whole`; None where any is None."""
    there = [part for part in parts if part is not None]
    if len(there) < len(parts) or len(there) < 2:
        return there[0] if len(there) == len(parts) else None
    whole = sum(part.whole for part in there)
    gradients: list[Tensor | None] = [None] * len(there[0].gradients)
    for part in there:
        scaled = (None if g is None else g * (part.whole / max(whole, 1e-30)) for g in part.gradients)
        gradients = [_sum(a, b) for a, b in zip(gradients, scaled, strict=True)]
    counts = {name: sum((part.counts[name] for part in there[1:]), count) for name, count in there[0].counts.items()}
    return Part(sum(part.wrong for part in there), whole, gradients, counts)


def _sum(a: Tensor | None, b: Tensor | None) -> Any:
    return b if a is None else a if b is None else a.add_(b)
