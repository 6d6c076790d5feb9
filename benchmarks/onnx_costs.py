"""Prices of the ONNX body forms on CPU, fitted to measured times, and how far the choice by them is from the best form.

    python benchmarks/onnx_costs.py            measure every form at every size, fit, judge

Times are taken as in onnx_forms.py, for less long: of the forms in turn, as in a model whose other layers want the
caches too, and of each in a loop of its own. The forms of one size and number of tokens share what the machine was like
just then: a factor that is fitted along with the prices. The sizes of `HELD` take no part in the fit. `ratio` is that
of the form which the exporter takes (`latentize.exporters.onnx_costs`, as it is) to the best, without what the choice
itself costs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from measured import keep, table

from latentize.activations import Activation
from latentize.exporters.onnx_alone import node_feeds, node_session
from latentize.exporters.onnx_choice import names_of
from latentize.exporters.onnx_costs import PRICES, Priced, Prices, amounts, cost, taken
from latentize.exporters.onnx_experts import choose_form
from latentize.exporters.onnx_forms import NodeConfig
from latentize.exporters.onnx_timing import interleaved

TOKENS = (1, 4, 16, 64, 256)
#: That each form is run for, at each of these.
SECONDS = 0.15
#: (ℓ, m, N, k)
FITTED = (
    (32, 32, 8, 2), (32, 32, 64, 4), (32, 64, 32, 8), (64, 32, 16, 2), (64, 64, 16, 4), (64, 64, 64, 8),
    (64, 128, 32, 4), (64, 128, 8, 2), (64, 64, 128, 8), (128, 64, 32, 8), (128, 128, 16, 4), (128, 128, 64, 4),
    (128, 128, 32, 8), (128, 256, 16, 2), (128, 256, 64, 8), (256, 128, 32, 4), (256, 256, 16, 4), (256, 256, 64, 8),
    (256, 512, 32, 8), (512, 256, 16, 4), (512, 512, 16, 2), (32, 64, 128, 4), (64, 256, 32, 16), (16, 32, 32, 4),
)  # fmt: skip
HELD = (
    (48, 96, 24, 4), (32, 48, 16, 4), (96, 64, 48, 6), (64, 96, 64, 16), (128, 96, 16, 2), (96, 192, 32, 8),
    (192, 128, 128, 8), (160, 320, 24, 4), (384, 256, 32, 4), (24, 48, 64, 8),
)  # fmt: skip
#: Forms whose times are far from the best one's are not waited for: milliseconds that one call may be expected to take,
#: and times the best one's that it may always take.
TOO_LONG, ALWAYS = 40.0, 2.0
#: What a form does not have, so that it costs nothing: its own nodes for each expert, rows that are put in order.
FREE = {
    "gather": {"expert", "active", "read", "row", "value"}, "dense": {"expert", "active"}, "loop": {"expert"},
}  # fmt: skip


@dataclass(frozen=True)
class Times:
    """Milliseconds of each form at one size and number of tokens."""

    config: NodeConfig
    tokens: int
    how: str  # "in turn" or "alone"
    ms: dict[str, float]


def main() -> None:
    """Measure, print the fitted prices and how the choice fares, keep the rows."""
    torch.set_num_threads(1)
    fitted, held = measure(FITTED), measure(HELD)
    for form, prices in fit(fitted).items():
        print(f'"{form}": Prices({", ".join(f"{price:.3g}" for price in astuple(prices))}),')
    rows = [judged(times, held=False) for times in fitted] + [judged(times, held=True) for times in held]
    keep("onnx_costs", rows, ("sizes", "tokens", "how"))
    plain = dict.fromkeys(("sizes", "held", "tokens", "how", "form", "best"), "")
    print(table(rows, {**plain, "ms": ".3f", "ratio": ".2f"}))


def measure(sizes: Sequence[tuple[int, int, int, int]]) -> list[Times]:
    """Times of every form at these sizes, as far as they are not out of all proportion."""
    found = []
    for latent, intermediate, experts, k in sizes:
        config = NodeConfig(experts, k, latent, intermediate, 1, Activation("silu"), ("gate",), False, True)
        sessions = {form: node_session(form, config, 1) for form in PRICES}
        for tokens in TOKENS:
            feeds = node_feeds(config, tokens)
            expected = {form: cost(form, config, tokens) for form in PRICES}
            limit = max(TOO_LONG * 1e6, ALWAYS * min(expected.values()))
            calls = {
                form: partial(session.run, None, feeds) for form, session in sessions.items() if expected[form] < limit
            }
            found.append(Times(config, tokens, "in turn", interleaved(calls, SECONDS, in_a_row=1)))
            alone = {form: interleaved({form: call}, SECONDS, in_a_row=1)[form] for form, call in calls.items()}
            found.append(Times(config, tokens, "alone", alone))
    return found


def fit(measured: Sequence[Times], rounds: int = 6) -> dict[str, Prices]:
    """Prices that explain the times best, relatively, beside a factor for each size and number of tokens."""
    factors = np.ones(len(measured))
    prices: dict[str, np.ndarray[Any, Any]] = {}
    for _ in range(rounds):
        for form in PRICES:
            used = np.array([field.name not in FREE.get(form, ()) for field in fields(Prices)])
            there = [(t, f) for t, f in zip(measured, factors, strict=True) if form in t.ms]
            shares = np.array([np.array(amounts(form, t.config, t.tokens)) * f / (t.ms[form] * 1e6) for t, f in there])
            prices[form] = np.zeros(len(used))
            prices[form][used] = positive(shares[:, used])
        for number, t in enumerate(measured):
            expected = [prices[form] @ amounts(form, t.config, t.tokens) for form in t.ms]
            ratios = [ms * 1e6 / each for ms, each in zip(t.ms.values(), expected, strict=True)]
            factors[number] = math.exp(np.log(ratios).mean())
        factors /= math.exp(np.log(factors).mean())
    return {form: Prices(*map(float, found)) for form, found in prices.items()}


def positive(shares: np.ndarray[Any, Any], steps: int = 5000) -> np.ndarray[Any, Any]:
    """Numbers >= 0 whose products with `shares` are closest to one, by multiplicative steps."""
    size = np.linalg.norm(shares, axis=0)
    scaled = shares / size
    square, wanted = scaled.T @ scaled, scaled.sum(axis=0)
    found = np.ones(len(size))
    for _ in range(steps):
        found *= wanted / (square @ found)
    return found / size


def judged(times: Times, *, held: bool) -> dict[str, Any]:
    """The form that the exporter takes at this size and number of tokens, beside the best."""
    c = times.config
    forms = names_of(choose_form(c, [c]))
    form = forms[taken(Priced(c), forms, times.tokens)]
    best = min(times.ms, key=lambda form: times.ms[form])
    sizes = f"l{c.latent_dim}_m{c.intermediate_size}_N{c.num_experts}_k{c.top_k}"
    ratio = times.ms[form] / times.ms[best]
    return {
        "sizes": sizes, "held": held, "tokens": times.tokens, "how": times.how, "form": form, "best": best,
        "ms": times.ms[form], "ratio": ratio,
    }  # fmt: skip


if __name__ == "__main__":
    main()
