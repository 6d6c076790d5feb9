"""The outlook of a model: what each latent width is predicted to cost each block, and all of them together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from latentize.allocate import knee, widths
from latentize.conversion import Prepared
from latentize.forecast import Curve, Forecast
from latentize.recipe import round_width

#: Compressions that a table shows.
SHOWN = (4 / 3, 2.0, 4.0, 8.0)

#: What a predicted loss is.
LOSS_WORDS = {
    "divergence": "divergence from the original's predictions, nats per position",
    "output": "squared error of the output, relative to its own square",
}


@dataclass(frozen=True)
class Row:
    """One block: width d, the effective rank of what its experts read, and its curve."""

    name: str
    hidden_size: int
    effective_rank: float
    curve: Curve

    def width(self, compression: float) -> int:
        """The latent width that a compression gives."""
        return round_width(self.hidden_size, self.hidden_size / compression)


@dataclass(frozen=True)
class Outlook:
    """Every block's row; `loss` says what predicted losses are, None where there are none.

    `knee` is the smallest width for all blocks whose losses add up to at most `bound`; None where none was asked for or
    the blocks share no width.
    """

    rows: tuple[Row, ...]
    forecast: Forecast
    loss: str | None
    bound: float | None = None
    knee: int | None = None

    @classmethod
    def of(cls, prepared: Prepared, bound: float | None = None) -> Outlook:
        """The outlook of a plan that was made with a sweep over the widths."""
        rows = tuple(
            Row(name, plan.hidden_size, plan.effective_rank, prepared.forecast.curves[name])
            for name, plan in prepared.plans.items()
            if name in prepared.forecast.curves
        )
        kinds = {prepared.statistics[row.name].loss_kind for row in rows} if prepared.statistics else set()
        known = bool(rows) and all(row.curve.losses is not None for row in rows)
        if not known:
            return cls(rows, prepared.forecast, None, bound)
        found = None if bound is None else _knee(rows, prepared.forecast.alone(bound))
        return cls(rows, prepared.forecast, LOSS_WORDS[kinds.pop()], bound, found)

    def loss_at(self, compression: float) -> float | None:
        """Predicted loss of all blocks together at one compression."""
        losses = [row.curve.loss_at(row.width(compression)) for row in self.rows]
        known = [loss for loss in losses if loss is not None]
        return self.forecast.together(sum(known)) if len(known) == len(losses) else None


def _knee(rows: Sequence[Row], bound: float) -> int | None:
    return knee([{width: row.curve.loss_at(width) or 0.0 for width in widths(row.hidden_size)} for row in rows], bound)
