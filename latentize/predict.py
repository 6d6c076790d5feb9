"""What narrowing blocks will cost before it is done: errors and losses at several latent widths, by trial.

A width is tried: each block is started at it on some of the sampled tokens, as a conversion would, and held against the
original on those and on others. At one or two widths the model is also run with all its blocks narrowed, because errors
add up to more than their sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from latentize.allocate import tried_widths
from latentize.compare import output_agreement
from latentize.errors import LatentizeError
from latentize.forecast import Curve, Forecast
from latentize.initialise import initialise, routed_only
from latentize.moe import LatentMoE
from latentize.passes import replace_blocks
from latentize.plan import plan_block
from latentize.progress import Progress, silent
from latentize.recipe import Recipe
from latentize.reference import experts_forward
from latentize.routing import Routing
from latentize.spec import MoESpec
from latentize.statistics import BlockStatistics, Sample

if TYPE_CHECKING:
    from latentize.conversion import Prepared

#: Sampled tokens that a trial start is computed from, and other ones that it is judged on as well.
FIT_TOKENS = 4096
HELD_TOKENS = 2048

#: Weights of a block up to which widths are tried; a larger one would take minutes for each.
TRIAL_WEIGHTS = 2**24

#: Shares of d at which all blocks are narrowed together.
TOGETHER = (1 / 2, 1 / 4)


def predict(prepared: Prepared, recipe: Recipe, *, sweep: bool = False, progress: Progress = silent) -> Forecast:
    """Try the widths of a recipe on every block, and some of them on the whole model; nothing without statistics.

    Args:
        prepared: what is known before the plan.
        recipe: its width is tried; where it leaves that open, so is the whole range.
        sweep: try the whole range all the same.
        progress: told of every trial.
    """
    if prepared.statistics is None:
        return Forecast({})
    trials = Trials(prepared.teacher.specs, prepared.statistics, recipe.seed, recipe.bypass)
    tried = rounds(trials.specs, recipe, sweep=sweep)
    joint = joint_rounds(trials.specs, tried)
    measured = []
    for i, widths in enumerate(tried):
        starts = trials.start(widths, progress)
        total = trials.total(widths)
        loss = _loss_of(prepared, starts) if i in joint and total else None
        if total and loss is not None:
            measured.append((total, loss))
    plain = Trials(prepared.teacher.specs, prepared.statistics, recipe.seed)
    for widths in rounds(plain.specs, recipe, sweep=False) if recipe.bypass else ():
        plain.start(widths, progress)
    return Forecast(trials.curves(), _rising(measured), plain.curves() if recipe.bypass else {})


def _loss_of(prepared: Prepared, starts: Mapping[str, MoESpec]) -> float | None:
    """The loss of the model with all its blocks narrowed, on one batch; None where its outputs cannot be compared."""
    blocks = {name: LatentMoE(starts.get(name, block.spec)) for name, block in prepared.teacher.blocks.items()}
    narrowed = replace_blocks(prepared.model, prepared.selected, blocks)
    try:
        found = output_agreement(prepared.model, narrowed, prepared.batches[:1])
    except LatentizeError:
        return None
    return found.relative**2 if found.kl_mean is None else found.kl_mean


def _rising(measured: Iterable[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """The pairs in ascending order, without those that are not finite or do not rise."""
    good = sorted(pair for pair in measured if min(pair) > 0 and all(map(math.isfinite, pair)))
    return tuple(pair for i, pair in enumerate(good) if all(pair[1] > before[1] for before in good[:i]))


class Trials:
    """Trial starts of all blocks at chosen widths, with a bypass of some rank or none (0), and what they cost."""

    def __init__(
        self, specs: Mapping[str, MoESpec], statistics: Mapping[str, BlockStatistics], seed: int = 0, bypass: int = 0
    ) -> None:
        self.specs = {
            name: spec for name, spec in specs.items()
            if len(statistics[name].sample.hidden) and 3 * spec.experts.up.numel() <= TRIAL_WEIGHTS
        }  # fmt: skip
        self.seed, self.bypass = seed, bypass
        self.statistics = statistics
        self._split = {name: _split(statistics[name]) for name in self.specs}
        self._costs: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in self.specs}

    def start(self, widths: Mapping[str, int], progress: Progress = silent) -> dict[str, MoESpec]:
        """The trial starts at one width for each block; their costs are remembered."""
        starts = {}
        for done, (name, spec) in enumerate(self.specs.items()):
            progress(done, len(self.specs), f"{name}, ℓ {widths[name]}")
            fitted, held = self._split[name]
            plan = plan_block("trial", spec, Recipe(latent_dim=widths[name], variant="fixed", bypass=self.bypass))
            starts[name] = initialise(spec, plan, fitted, seed=self.seed)
            if widths[name] < spec.hidden_size:
                self._costs[name][widths[name]] = _cost(spec, starts[name], fitted, held)
        return starts

    def total(self, widths: Mapping[str, int]) -> float | None:
        """The sum of the blocks' own losses at widths that were tried; None without gradients."""
        if any(self.statistics[name].sensitivity is None for name in self.specs):
            return None
        return sum(self._costs[name].get(widths[name], (0.0, 0.0))[1] for name in self.specs)

    def curves(self) -> dict[str, Curve]:
        """Every block's curve through the widths that were tried."""
        return {name: self._curve(name, spec.hidden_size) for name, spec in self.specs.items()}

    def _curve(self, name: str, d: int) -> Curve:
        found = _falling({**self._costs[name], d: (0.0, 0.0)})
        blind = self.statistics[name].sensitivity is None
        losses = None if blind else tuple(loss for _, loss in found.values())
        return Curve(tuple(found), tuple(error for error, _ in found.values()), losses)


def rounds(specs: Mapping[str, MoESpec], recipe: Recipe, *, sweep: bool) -> list[dict[str, int]]:
    """The widths to try, a round for each share of d: what the recipe asks for, and with `sweep` the whole range."""
    asked = [] if recipe.auto else [{name: recipe.latent_dim_for(spec.hidden_size) for name, spec in specs.items()}]
    if not (sweep or recipe.auto):
        return asked
    tried = {name: tried_widths(spec.hidden_size) or [spec.hidden_size] for name, spec in specs.items()}
    longest = max(map(len, tried.values()), default=0)
    found = [{name: ws[min(i, len(ws) - 1)] for name, ws in tried.items()} for i in range(longest)]
    return found + [widths for widths in asked if widths not in found]


def joint_rounds(specs: Mapping[str, MoESpec], tried: Sequence[Mapping[str, int]]) -> list[int]:
    """Which of the rounds to narrow all blocks together at: those nearest the shares `TOGETHER`, or the only one."""

    def distance(widths: Mapping[str, int], share: float) -> float:
        return sum(abs(widths[name] / spec.hidden_size - share) for name, spec in specs.items())

    nearest = (min(range(len(tried)), key=lambda i: distance(tried[i], share)) for share in TOGETHER if tried)
    return sorted(set(nearest))


def _falling(found: Mapping[int, tuple[float, float]]) -> dict[int, tuple[float, float]]:
    """Costs by ascending width, made to fall: a wider block can do what a narrower one does."""
    most = (math.inf, math.inf)
    result = {}
    for width, (error, loss) in sorted(found.items()):
        most = (min(most[0], error), min(most[1], loss))
        result[width] = most
    return result


def _split(statistics: BlockStatistics) -> tuple[BlockStatistics, Sample]:
    """Statistics whose sample is the tokens to fit, and those to hold out: a third of the tokens, evenly spread."""
    sample = statistics.sample
    count = len(sample.hidden)
    rows = torch.arange(0, count, max(1, count // (FIT_TOKENS + HELD_TOKENS)))
    held = torch.arange(len(rows)) % 3 == 2
    return replace(statistics, sample=_rows(sample, rows[~held])), _rows(sample, rows[held])


def _rows(sample: Sample, rows: Tensor) -> Sample:
    def pick(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[rows.to(tensor.device)]

    return replace(
        sample,
        hidden=sample.hidden[rows.to(sample.hidden.device)],
        router_hidden=pick(sample.router_hidden),
        weights=sample.weights[rows.to(sample.weights.device)],
        indices=sample.indices[rows.to(sample.indices.device)],
        importance=pick(sample.importance),
        places=pick(sample.places),
    )


def _cost(spec: MoESpec, start: MoESpec, fitted: BlockStatistics, held: Sample) -> tuple[float, float]:
    """Relative error and loss. Tokens that were fitted flatter a fit as much as others do the opposite: their mean."""
    metric = fitted.sensitivity
    results = [_errors(spec, start, sample, metric) for sample in (fitted.sample, held) if len(sample.hidden)]
    wrong = sum(r[0] for r in results) / len(results)
    return math.sqrt(wrong), sum(r[1] for r in results) / len(results) / fitted.loss_scale


def _errors(spec: MoESpec, start: MoESpec, sample: Sample, metric: Tensor | None) -> tuple[float, float]:
    """Squared relative error on a sample, and half the error's mean square in the sensitivity's metric."""
    dtype = torch.promote_types(spec.experts.up.dtype, torch.float32)
    hidden = sample.hidden.to(spec.experts.up.device, dtype)
    routing = Routing(hidden.new_empty(0), sample.weights.to(hidden), sample.indices.to(hidden.device))
    with torch.no_grad():
        target = experts_forward(routed_only(spec.to(dtype)), hidden, routing).double()
        wrong = experts_forward(routed_only(start.to(dtype)), hidden, routing).double() - target
    relative = (wrong.square().sum() / target.square().sum().clamp_min(1e-300)).item()
    if metric is None:
        return relative, 0.0
    lengths = ((wrong @ metric.to(wrong.device)) * wrong).sum(-1)
    if sample.importance is not None:
        lengths = lengths * sample.importance.to(lengths)
    return relative, 0.5 * lengths.mean().item()
