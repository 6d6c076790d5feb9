"""A latent width for every block under one budget, and the one width for all that a bound on the loss allows.

Each block has options, from narrow and cheap to wide and dear. Starting from the narrowest, the step that saves most
loss for what it costs is taken again and again. Steps run along the lower convex hull of a block's options, where this
is the best there is at every point it passes; what is left of the budget at the end goes to single options.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from latentize.errors import LatentizeError
from latentize.recipe import round_width, width_step

#: The narrowest width that is tried on its own accord, as a share of d.
NARROWEST = 1 / 16

#: Widths that a block is tried at, as shares of d; predictions in between are interpolated.
TRIED = (NARROWEST, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)


@dataclass(frozen=True)
class Option:
    """One width of one block: its cost (bytes or FLOPs for one token), and the loss that it is predicted to add."""

    latent_dim: int
    cost: float
    loss: float


#: What may follow an option of a block.
Steps = Callable[[Sequence[Option], Option], list[Option]]


def widths(hidden_size: int) -> list[int]:
    """The widths that a block of width d may be given, ascending, d among them."""
    step = width_step(hidden_size)
    first = round_width(hidden_size, hidden_size * NARROWEST)
    return sorted({*range(first, hidden_size, step), hidden_size})


def tried_widths(hidden_size: int) -> list[int]:
    """The widths below d that a prediction rests on."""
    found = {round_width(hidden_size, hidden_size * share) for share in TRIED}
    return sorted(width for width in found if width < hidden_size)


def within_cost(options: Mapping[str, Sequence[Option]], limit: float, what: str = "budget") -> dict[str, int]:
    """The widths of least total loss among those whose total cost is at most `limit`.

    Raises:
        LatentizeError: the narrowest widths cost more already.
    """
    chosen = {name: min(block, key=lambda o: (o.cost, o.loss)) for name, block in options.items()}
    spent = sum(option.cost for option in chosen.values())
    if spent > limit * (1 + 1e-9):
        raise LatentizeError(
            f"{what}: the narrowest widths (ℓ = d/{1 / NARROWEST:.0f}) take {spent:,.0f} a token, "
            f"and {limit:,.0f} were given; raise it"
        )
    room = limit * (1 + 1e-9) - spent
    for steps in (_hull_steps, _single_steps):
        while step := _best(options, chosen, room, steps):
            name, option = step
            room -= option.cost - chosen[name].cost
            chosen[name] = option
    return _widths_of(_better(chosen, _uniform(options, limit)))


def within_loss(options: Mapping[str, Sequence[Option]], limit: float) -> dict[str, int]:
    """Widths of little total cost among those whose total loss is at most `limit`; at width d nothing is lost."""
    chosen = {name: min(block, key=lambda o: (o.cost, o.loss)) for name, block in options.items()}
    while sum(option.loss for option in chosen.values()) > limit:
        step = _best(options, chosen, math.inf, _hull_steps)
        if step is None:
            break
        chosen[step[0]] = step[1]
    for name in sorted(chosen, key=lambda name: -chosen[name].cost):  # the last steps may have been longer than needed
        room = limit - sum(option.loss for option in chosen.values()) + chosen[name].loss
        fitting = [option for option in options[name] if option.loss <= room and option.cost <= chosen[name].cost]
        chosen[name] = min(fitting, key=lambda o: (o.cost, o.loss), default=chosen[name])
    return _widths_of(chosen)


def knee(losses: Sequence[Mapping[int, float]], bound: float) -> int | None:
    """The smallest width that all blocks can have while their losses add up to at most `bound`; None without one.

    Args:
        losses: of each block, by width.
        bound: on their sum.
    """
    shared = set.intersection(*(set(block) for block in losses))
    return next((width for width in sorted(shared) if sum(block[width] for block in losses) <= bound), None)


def _hull_steps(block: Sequence[Option], now: Option) -> list[Option]:
    """The next option on the lower convex hull of (cost, loss) after `now`: the one reached by the steepest descent."""
    better = [option for option in block if option.cost > now.cost and option.loss < now.loss]
    return [max(better, key=lambda o: ((now.loss - o.loss) / (o.cost - now.cost), o.cost))] if better else []


def _single_steps(block: Sequence[Option], now: Option) -> list[Option]:
    """Every option that costs more and loses less than `now`."""
    return [option for option in block if option.cost > now.cost and option.loss < now.loss]


def _best(
    options: Mapping[str, Sequence[Option]], chosen: Mapping[str, Option], room: float, steps: Steps
) -> tuple[str, Option] | None:
    """The affordable step that saves most loss for what it costs; None when there is none."""
    found = [
        ((chosen[name].loss - option.loss) / (option.cost - chosen[name].cost), name, option)
        for name, block in options.items()
        for option in steps(block, chosen[name])
        if option.cost - chosen[name].cost <= room
    ]
    if not found:
        return None
    _, name, option = max(found, key=lambda item: item[0])
    return name, option


def _uniform(options: Mapping[str, Sequence[Option]], limit: float) -> dict[str, Option] | None:
    """The widest one share of d for all blocks that fits."""
    best = None
    for share in sorted({o.latent_dim / block[-1].latent_dim for block in options.values() for o in block}):
        chosen = {
            name: max((o for o in block if o.latent_dim <= share * block[-1].latent_dim + 1e-9),
                      key=lambda o: o.latent_dim, default=block[0])
            for name, block in options.items()
        }  # fmt: skip
        if sum(option.cost for option in chosen.values()) <= limit * (1 + 1e-9):
            best = chosen
    return best


def _better(one: dict[str, Option], other: dict[str, Option] | None) -> dict[str, Option]:
    if other is None:
        return one
    losses = [sum(option.loss for option in chosen.values()) for chosen in (one, other)]
    return one if losses[0] <= losses[1] else other


def _widths_of(chosen: Mapping[str, Option]) -> dict[str, int]:
    return {name: option.latent_dim for name, option in chosen.items()}
