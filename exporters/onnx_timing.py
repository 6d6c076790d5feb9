"""Which body form of `latentize::LatentExperts` is fastest on this machine: each is run and timed.

That is done in graphs of such nodes alone, several where the model has several, whose weights the caches do not keep
from one call to the next. What forms cost elsewhere (`onnx_costs`) says which are worth it, and what lies between the
numbers of tokens that were timed. onnxruntime gets as many threads as PyTorch has (`torch.set_num_threads`).
"""

from __future__ import annotations

import logging
import math
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from statistics import quantiles

import numpy as np
import torch

from latentize.exporters.onnx_alone import node_feeds, node_session
from latentize.exporters.onnx_choice import spell
from latentize.exporters.onnx_costs import ALWAYS, TOKENS, Priced, cheapest, cost, last_tokens, ranked, taken
from latentize.exporters.onnx_forms import NodeConfig
from latentize.exporters.onnx_nodes import DOUBLE

#: Seconds that each graph is run for, at each number of tokens.
SECONDS = 0.1
#: Numbers of tokens that are timed, at most.
_POINTS = 6
#: Forms that should take so many times the cheapest one's time are not waited for.
_FAR = 3.0
#: Nodes of a kind in a graph, and bytes of weights with which there need be no more of them.
_COPIES, _ENOUGH = 8, 16 << 20
#: Bytes of weights beyond which a node is not built a second time to be timed.
_TIMED_BYTES = 1 << 30
_MOST_ROUNDS = 1000

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Timed:
    """What forms of a node cost here: their prices, times how far measured times were from them."""

    config: NodeConfig
    #: form, logarithms of numbers of tokens, logarithms of measured over priced
    found: tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...]

    @classmethod
    def of(cls, config: NodeConfig, ms: Mapping[int, Mapping[str, float]]) -> Timed:
        """From milliseconds by number of tokens and form."""
        found = []
        for form in dict.fromkeys(form for times in ms.values() for form in times):
            points = [(t, times[form] * 1e6 / cost(form, config, t)) for t, times in ms.items() if form in times]
            found.append((form, tuple(math.log(t) for t, _ in points), tuple(math.log(ratio) for _, ratio in points)))
        return cls(config, tuple(found))

    @property
    def forms(self) -> tuple[str, ...]:
        """Those that were timed somewhere."""
        return tuple(form for form, *_ in self.found)

    def __call__(self, form: str, tokens: int) -> float:
        """Nanoseconds that a form takes for this many tokens."""
        at, ratios = next(rest for name, *rest in self.found if name == form)
        return cost(form, self.config, tokens) * math.exp(np.interp(math.log(tokens), at, ratios))


def measurable(config: NodeConfig) -> bool:
    """Whether nodes of this kind are built a second time to be timed: their weights must fit into one ONNX file."""
    return config.weight_bytes * (2 if config.dtype == DOUBLE else 1) < _TIMED_BYTES


def fastest(config: NodeConfig, forms: tuple[str, ...], tokens: tuple[int, ...] = TOKENS, count: int = 1) -> str:
    """The text of the form that stays closest to the fastest over `tokens` on this machine, with its limits.

    Forms are timed one by one; then the best single one, pair and triple of them, as the bodies that they are.

    Args:
        config: the node; weights and inputs are drawn, its routing is uniform.
        forms: names to choose from.
        tokens: numbers of tokens in flight.
        count: how many nodes of this kind the model has.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    if not measurable(config):
        _log.warning("experts of %.1f GiB are not built to be timed: prices decide", config.weight_bytes / 2**30)
        return "+".join(cheapest(Priced(config), forms, tokens))
    points = _points(tokens)
    copies = min(count, _COPIES, max(1, _ENOUGH // config.weight_bytes))
    timed = Timed.of(config, measure(config, {t: _promising(config, forms, t) for t in points}, copies))
    finalists = _finalists(timed, tokens)
    if len(finalists) == 1:
        return finalists[0]
    ms = measure(config, dict.fromkeys(points, finalists), copies)
    behind = {form: max(times[form] / min(times.values()) for times in ms.values()) for form in finalists}
    _log.info("experts %s: times the fastest one's at worst: %s", config, behind)
    return min(finalists, key=lambda form: behind[form])


def _promising(config: NodeConfig, forms: Sequence[str], tokens: int) -> tuple[str, ...]:
    """Forms that may be the fastest for so many tokens, and the cheapest that may be the last of a body."""
    prices = {form: cost(form, config, tokens) for form in forms}
    last = min((form for form in forms if form != "gather"), key=lambda form: prices[form])
    return tuple(form for form in forms if form == last or prices[form] <= _FAR * min(prices.values()))


def _finalists(timed: Timed, tokens: tuple[int, ...]) -> tuple[str, ...]:
    """The best form, pair and triple.

    Of several each but the last, which any number of tokens may need, is taken at some of `tokens`.
    """
    best: dict[int, str] = {}
    for names in ranked(timed, timed.forms, tokens):
        limits = [last_tokens(timed, few, many) or ALWAYS for few, many in pairwise(names)]
        used = {taken(timed, names, count) for count in tokens}
        if used >= set(range(len(names) - 1)) and all(few < many for few, many in pairwise(limits)):
            best.setdefault(len(names), spell(names, limits))
    return tuple(best.values())


def _points(tokens: Sequence[int]) -> tuple[int, ...]:
    """The numbers of tokens to time: the ends and some between."""
    if len(tokens) <= _POINTS:
        return tuple(tokens)
    places = {round(i * (len(tokens) - 1) / (_POINTS - 1)) for i in range(_POINTS)}
    return tuple(tokens[place] for place in sorted(places))


def measure(
    config: NodeConfig, wanted: Mapping[int, Sequence[str]], copies: int = 1
) -> dict[int, dict[str, float]]:
    """Milliseconds of bodies of these forms, by number of tokens: of one node of several, with what is around it."""
    threads = torch.get_num_threads()
    clock = time.thread_time if threads == 1 else time.perf_counter
    every = dict.fromkeys(form for forms in wanted.values() for form in forms)
    sessions = {form: node_session(form, config, threads, copies) for form in every}
    found = {}
    for tokens, forms in wanted.items():
        feeds = node_feeds(config, tokens)
        calls = {form: partial(sessions[form].run, None, feeds) for form in forms}
        found[tokens] = {form: ms / copies for form, ms in interleaved(calls, SECONDS, clock).items()}
    return found


def interleaved(
    calls: Mapping[str, Callable[[], object]], seconds: float, clock: Callable[[], float] = time.thread_time,
    in_a_row: int = 4,
) -> dict[str, float]:  # fmt: skip
    """Lower quartile of the milliseconds of each call, which is run for about `seconds`.

    All are called in every round, in an order drawn for it: what runs before a call decides what it finds in the
    caches. Of several in a row, as where one model serves, the first is not counted.
    """
    generator = random.Random(0)  # noqa: S311 - an order, no secret
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for round_ in range(_MOST_ROUNDS):
        for name in generator.sample(list(calls), len(calls)):
            for place in range(in_a_row):
                start = clock()
                calls[name]()
                if place or in_a_row == 1:
                    samples[name].append((clock() - start) * 1e3)
        if round_ and sum(map(sum, samples.values())) >= seconds * 1e3 * len(calls):
            break
    return {name: quantiles(times, n=4)[0] for name, times in samples.items()}
