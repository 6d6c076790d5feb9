"""What each body form of `latentize::LatentExperts` costs in onnxruntime on CPU, and which forms suit a node.

Every form starts some nodes, reads the weights of some experts once and multiplies them with some rows; the forms
differ in how many of each and at what price. The prices were fitted to measured times (`benchmarks/onnx_costs.py`, one
thread) and judge forms against one another: other machines are faster or slower in all of them together.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, permutations
from types import MappingProxyType
from typing import Protocol

from latentize.exporters.onnx_forms import NodeConfig
from latentize.exporters.tensorrt_profiles import Profile

#: Numbers of tokens that forms are chosen for where nothing is said about them.
TOKENS = tuple(1 << power for power in range(11))
#: Nanoseconds of a choice between two forms, in the graph.
CHOICE = 8_000
#: Forms that one body may hold, and what a further one must save somewhere: it may be one more copy of the weights.
MOST, _WORTH = 3, 0.02
#: Beyond this many tokens a form that is still the cheaper one always is.
ALWAYS = 1 << 16


@dataclass(frozen=True)
class Prices:
    """Nanoseconds: of a call, of an expert, of an expert that has rows, of a weight of such an expert, of a row of an
    expert, of a weight that is multiplied with a row, and of a row's intermediate value.
    """

    call: float
    expert: float = 0.0
    active: float = 0.0
    read: float = 0.0
    row: float = 0.0
    multiply: float = 0.0
    value: float = 0.0


#: Fitted but for the call and the row of "dense": those were moved by what its OneHot was measured to save and to cost.
PRICES: Mapping[str, Prices] = MappingProxyType(
    {
        "gather": Prices(48_900, multiply=0.641),
        "moe": Prices(67_500, 163, 1_710, 0.229, 173, 0.0814, 15.3),
        "dense": Prices(50_500, 0, 0, 0.15, 20, 0.0263, 2.03),
        "batched": Prices(60_700, 3_070, 926, 0.135, 165, 0.0552, 1.46),
        "unrolled": Prices(47_500, 5_410, 1_590, 0.163, 217, 0.0534, 0),
        "loop": Prices(80_000, 0, 13_500, 0.328, 452, 0.0763, 0),
    }
)


def tokens_in_flight(profiles: Sequence[Profile]) -> tuple[int, ...]:
    """The numbers of tokens that a graph is used for, in order: those of its profiles' whole batches.

    They are the smallest, usual and largest of each profile, and the powers of two in between, since it takes these
    too; without profiles `TOKENS`.
    """
    if not profiles:
        return TOKENS
    found: set[int] = set()
    for low, usual, high in (profile.in_flight for profile in profiles):
        between = (1 << power for power in range(low.bit_length(), high.bit_length()))
        found |= {low, usual, high, *between}
    return tuple(sorted(found))


def amounts(form: str, config: NodeConfig, tokens: int) -> tuple[float, ...]:
    """How much of everything in `Prices` a form takes for a uniform routing, in the order of its fields."""
    n, k, m = config.num_experts, min(config.top_k, config.num_experts), config.intermediate_size
    weights = m * config.latent_dim * (2 + config.gated)
    active, rows = n * (1 - (1 - k / n) ** tokens), tokens * config.top_k
    if form == "dense":  # every expert works on every token
        active, rows = n, tokens * n
    return 1, n, active, active * weights, rows, rows * weights, rows * m


def cost(form: str, config: NodeConfig, tokens: int) -> float:
    """Nanoseconds that a form takes for this many tokens."""
    p = PRICES[form]
    prices = (p.call, p.expert, p.active, p.read, p.row, p.multiply, p.value)
    return sum(price * amount for price, amount in zip(prices, amounts(form, config, tokens), strict=True))


class Costs(Protocol):
    """Nanoseconds that a form takes for so many tokens; hashable, since what follows from it is kept."""

    def __call__(self, form: str, tokens: int, /) -> float:
        """What this form takes for this many tokens."""

    def __hash__(self) -> int:
        """Equal for equal costs."""


@dataclass(frozen=True)
class Priced:
    """What forms of a node cost by `PRICES`."""

    config: NodeConfig

    def __call__(self, form: str, tokens: int) -> float:
        """Nanoseconds that a form takes for this many tokens."""
        return cost(form, self.config, tokens)


@lru_cache(maxsize=1024)
def last_tokens(costs: Costs, few: str, many: str) -> int | None:
    """Up to how many tokens form `few` is cheaper than form `many`; None where it always is, 1 at least."""

    def cheaper(tokens: int) -> bool:
        return costs(few, tokens) <= costs(many, tokens)

    low, high = 1, 2
    while cheaper(high):
        if high >= ALWAYS:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cheaper(middle) else (low, middle)
    return low


def taken(costs: Costs, forms: Sequence[str], tokens: int) -> int:
    """Which of its forms a body takes for this many tokens: the first that is cheaper than the one after it."""
    for place, (few, many) in enumerate(pairwise(forms)):
        limit = last_tokens(costs, few, many)
        if limit is None or tokens <= limit:
            return place
    return len(forms) - 1


@lru_cache(maxsize=256)
def ranked(costs: Costs, forms: tuple[str, ...], tokens: tuple[int, ...] = TOKENS) -> tuple[tuple[str, ...], ...]:
    """One to three of `forms`, for few, some and many tokens, those first that stay closest to the best over `tokens`.

    Where several do equally well there, they are judged over `TOKENS`: other numbers may come too. Copies of the
    weights of every pair, "gather", are never the form for many: their memory grows with the tokens.
    """
    best = {count: min(costs(form, count) for form in forms) for count in {*tokens, *TOKENS}}

    def worst(chosen: tuple[str, ...], counts: tuple[int, ...]) -> float:
        def taking(count: int) -> float:
            place = taken(costs, chosen, count)
            choices = min(place + 1, len(chosen) - 1)
            return costs(chosen[place], count) + choices * CHOICE

        return max(taking(count) / best[count] for count in counts) + _WORTH * len(chosen)

    several = (chosen for size in range(1, MOST + 1) for chosen in permutations(forms, size))
    safe = (chosen for chosen in several if chosen[-1] != "gather")
    return tuple(sorted(safe, key=lambda chosen: (worst(chosen, tokens), worst(chosen, TOKENS))))


def cheapest(costs: Costs, forms: tuple[str, ...], tokens: tuple[int, ...] = TOKENS) -> tuple[str, ...]:
    """The first of `ranked`."""
    return ranked(costs, forms, tokens)[0]
