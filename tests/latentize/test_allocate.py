"""Widths under a budget: budgets are kept, nothing uniform is better, small cases equal the best there is."""

from __future__ import annotations

import itertools
import random

import pytest

from latentize.allocate import Option, knee, tried_widths, widths, within_cost, within_loss
from latentize.errors import LatentizeError


def block(scale: float, *, d: int = 8, power: float = 2.0, price: float = 1.0) -> list[Option]:
    """A block of widths 1 to d whose loss falls convexly to nothing."""
    return [Option(width, price * width, scale * (1 - width / d) ** power) for width in range(1, d + 1)]


def jagged(seed: int, d: int = 6) -> list[Option]:
    """A block whose loss falls, but not convexly."""
    draw = random.Random(seed)
    losses = sorted((draw.random() for _ in range(d - 1)), reverse=True)
    return [Option(w, w * draw.choice([2.0, 2.0, 3.0]), loss) for w, loss in enumerate([*losses, 0.0], start=1)]


def total(options: dict[str, list[Option]], chosen: dict[str, int], what: str) -> float:
    return sum(getattr(o, what) for name, opts in options.items() for o in opts if o.latent_dim == chosen[name])


def uniform_loss(options: dict[str, list[Option]], limit: float) -> float:
    """The least loss of one width for all blocks that costs at most `limit`."""
    found = []
    for width in {o.latent_dim for o in next(iter(options.values()))}:
        chosen = dict.fromkeys(options, width)
        if total(options, chosen, "cost") <= limit:
            found.append(total(options, chosen, "loss"))
    return min(found)


@pytest.mark.parametrize("limit", [6, 9, 12, 16.5, 24])
def test_convex_blocks_get_the_best_widths_there_are(limit):
    options = {"a": block(1.0), "b": block(0.2), "c": block(5.0)}
    chosen = within_cost(options, limit)
    assert total(options, chosen, "cost") <= limit
    best = min(
        sum(o.loss for o in picks)
        for picks in itertools.product(*options.values())
        if sum(o.cost for o in picks) <= limit
    )
    assert total(options, chosen, "loss") == pytest.approx(best)
    assert total(options, chosen, "loss") <= uniform_loss(options, limit)


@pytest.mark.parametrize("seed", range(30))
def test_no_uniform_width_is_better_and_the_budget_is_kept(seed):
    options = {name: jagged(10 * seed + i) for i, name in enumerate("abcd")}
    least = sum(min(o.cost for o in opts) for opts in options.values())
    limit = least + random.Random(seed).random() * 30
    chosen = within_cost(options, limit)
    assert total(options, chosen, "cost") <= limit + 1e-6
    feasible = [o for o in [total(options, dict.fromkeys(options, w), "cost") for w in range(1, 7)] if o <= limit]
    if feasible:
        assert total(options, chosen, "loss") <= uniform_loss(options, limit) + 1e-12


def test_a_block_that_matters_gets_more_than_one_that_does_not():
    chosen = within_cost({"deaf": block(0.01), "keen": block(10.0)}, 9)
    assert chosen["keen"] > chosen["deaf"]


def test_an_impossible_budget_says_what_the_least_is():
    with pytest.raises(LatentizeError, match=r"budget.bytes = 0.1: the narrowest widths .* take 200 a token, and 150"):
        within_cost({"a": block(1.0, price=100.0), "b": block(1.0, price=100.0)}, 150, "budget.bytes = 0.1")


@pytest.mark.parametrize("limit", [1e-9, 0.01, 0.2, 3.0, 100.0])
def test_a_bound_on_the_loss_is_kept_with_no_block_wider_than_it_need_be(limit):
    options = {"a": block(1.0), "b": block(0.2), "c": block(5.0)}
    chosen = within_loss(options, limit)
    assert total(options, chosen, "loss") <= limit
    for name, width in chosen.items():
        if width > 1:
            assert total(options, {**chosen, name: width - 1}, "loss") > limit


def test_the_knee_is_the_smallest_shared_width_within_the_bound():
    losses = [{4: 1.0, 8: 0.1, 12: 0.0}, {4: 0.5, 8: 0.3, 16: 0.0}]
    assert knee(losses, 2.0) == 4
    assert knee(losses, 0.5) == 8
    assert knee(losses, 0.1) is None


def test_widths_are_the_multiples_that_compressions_round_to():
    assert widths(128) == [8, *range(16, 128, 8), 128]
    assert widths(2048) == [*range(128, 2048, 128), 2048]
    assert widths(20) == list(range(2, 21))
    assert tried_widths(128) == [8, 16, 32, 48, 64, 96]
    assert set(tried_widths(2048)) <= set(widths(2048))
