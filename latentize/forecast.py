"""What narrower experts are predicted to cost: each block's error and loss by width, and the loss of all together."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Curve:
    """Predictions for one block over ascending latent widths, the last of which is d and costs nothing.

    `errors` are relative errors of the routed output on the original's own inputs, right after initialisation.
    `losses` are what these errors alone would add to the model's loss, to second order: nats per position from the
    original's predictions, or (of a model that gives no class scores) the relative squared error of its output. None
    where there were no gradients.
    """

    latent_dims: tuple[int, ...]
    errors: tuple[float, ...]
    losses: tuple[float, ...] | None = None

    def error_at(self, latent: int) -> float:
        """Predicted relative error at any width."""
        return _interpolate(self.latent_dims, self.errors, latent)

    def loss_at(self, latent: int) -> float | None:
        """Predicted loss at any width."""
        if self.losses is None:
            return None
        return _interpolate(self.latent_dims, [math.sqrt(loss) for loss in self.losses], latent) ** 2


@dataclass(frozen=True)
class Forecast:
    """The curves of all blocks by name, and how the losses of blocks add up.

    Errors of one block grow in the next ones, so that together they cost more than their sum. `measured` holds, in
    ascending order, (sum of the blocks' own losses, loss of the model with all of them narrowed) as they were measured
    at a few widths. In between the measured loss follows a power of the sum; below, their ratio stays. Where blocks are
    to have a bypass, `without_bypass` holds the curves of the same blocks without one.
    """

    curves: Mapping[str, Curve]
    measured: tuple[tuple[float, float], ...] = field(default=())
    without_bypass: Mapping[str, Curve] = field(default_factory=dict)

    def together(self, total: float) -> float:
        """The loss of the model when those of its blocks add up to `total`."""
        return _power(self.measured, total)

    def alone(self, loss: float) -> float:
        """The inverse of `together`."""
        return _power([(after, before) for before, after in self.measured], loss)


def _power(points: Sequence[tuple[float, float]], x: float) -> float:
    """y at x: proportional below the first point, a power of x between points and after the last two."""
    if not points or x <= 0:
        return x
    (x0, y0), right = points[0], [p for p in points[1:] if p[0] > points[0][0]]
    if x <= x0 or not right:
        return y0 * x / x0
    for i, (x1, y1) in enumerate(right):
        if x <= x1 or i == len(right) - 1:
            exponent = math.log(y1 / y0) / math.log(x1 / x0)
            return float(y0 * (x / x0) ** exponent)
        x0, y0 = x1, y1
    raise AssertionError("unreachable")


def _interpolate(at: Sequence[int], values: Sequence[float], x: int) -> float:
    """Piecewise linear; below the first width its value."""
    right = bisect.bisect_left(at, x)
    if right == len(at):
        return values[-1]
    if at[right] == x or right == 0:
        return values[right]
    share = (x - at[right - 1]) / (at[right] - at[right - 1])
    return values[right - 1] + share * (values[right] - values[right - 1])
