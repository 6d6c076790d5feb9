"""What a conversion will do to each block, before any work: sizes, bytes, FLOPs, predicted error, warnings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentize.allocate import Option, widths, within_cost, within_loss
from latentize.errors import LatentizeError
from latentize.forecast import Curve, Forecast
from latentize.output_fit import FIT_BYTES, fit_bytes
from latentize.projections import gram, output_gram, shrink, spectrum
from latentize.recipe import Recipe
from latentize.rescale import check_factors
from latentize.spec import MoESpec
from latentize.statistics import BlockStatistics

#: Sizes at which kernels that serve MoE models are known to stop.
TOP_K_LIMITS = (8, 16, 22)
EXPERT_LIMITS = (128, 256, 512)
#: Multiples that matrix products of experts want their sizes in: 16 bytes of 16-bit weights, said of hidden states of
#: `SMALL` or more; and the blocks of fp8 weights, said of hidden states of `LARGE` or more.
ALIGNMENT, SMALL, BLOCK_SCALE, LARGE = 8, 64, 128, 1024


@dataclass(frozen=True)
class BlockPlan:
    """The conversion of one block. Bytes and FLOPs are per token; "before" is the block as it came in.

    `expert_bytes` are the weights of the selected experts; `projection_bytes`, those of the two projections, and
    `bypass_bytes`, those of a bypass of `bypass_rank`, are read once per batch. `dispatched_bytes` are the activations
    that travel to the experts and back. FLOPs count the router, the projections, the bypass and the experts.
    `spectrum` holds the singular values of G C^½ (see `latentize.projections`).
    `predicted_error` is the relative error of the routed output right after initialisation, and `predicted_loss` what
    it adds to the model's loss beside the other blocks (see `latentize.forecast`). `error_without_bypass` is the error
    predicted of the same block without its bypass.
    """

    name: str
    hidden_size: int
    latent_dim: int
    intermediate_size: int
    num_experts: int
    new_num_experts: int
    top_k: int
    new_top_k: int
    experts_factor: int
    topk_factor: int
    expert_bytes_before: int
    expert_bytes_after: int
    dispatched_bytes_before: int
    dispatched_bytes_after: int
    projection_bytes: int
    flops_before: int
    flops_after: int
    spectrum: tuple[float, ...] = ()
    effective_rank: float = math.nan
    predicted_error: float = math.nan
    predicted_loss: float | None = None
    warnings: tuple[str, ...] = ()
    bypass_rank: int = 0
    bypass_bytes: int = 0
    error_without_bypass: float | None = None


def make_plan(
    specs: Mapping[str, MoESpec],
    recipe: Recipe,
    statistics: Mapping[str, BlockStatistics] | None = None,
    forecast: Forecast | None = None,
) -> dict[str, BlockPlan]:
    """The plan of every block, by name.

    Args:
        specs: the original blocks.
        recipe: says how wide the experts become, or what may be spent on their widths.
        statistics: of the blocks over calibration data.
        forecast: predictions from trials (`latentize.predict`). The spectra alone predict where a block has none.

    Raises:
        LatentizeError: a latent size, a factor or a bypass that a block cannot have, naming the block and its sizes; or
            a budget that no widths can keep.
    """
    check_plan(specs, recipe)
    statistics = statistics or {}
    spectra = {name: Spectra.of(spec, statistics.get(name)) for name, spec in specs.items()}
    blind = forecast is None
    forecast = forecast or Forecast({})
    known = {name: forecast.curves.get(name) or spectra[name].curve() for name in specs}
    chosen = allocate(specs, recipe, replace(forecast, curves=known)) if recipe.auto else {}
    plans = {}
    for name, spec in specs.items():
        plan, said = plan_block(name, spec, recipe, chosen.get(name)), statistics.get(name)
        plans[name] = replace(
            plan,
            spectrum=tuple(spectra[name].input.tolist()),
            effective_rank=effective_rank(spectra[name].input),
            predicted_error=known[name].error_at(plan.latent_dim),
            predicted_loss=known[name].loss_at(plan.latent_dim),
            error_without_bypass=_without_bypass(plan, forecast),
            warnings=(*plan.warnings, *_cautions(spec, plan, said, tried=blind or name in forecast.curves)),
        )
    return _together(plans, forecast)


def _without_bypass(plan: BlockPlan, forecast: Forecast) -> float | None:
    """The error predicted of a block that has a bypass, did it not have one; None where that was not tried."""
    curve = forecast.without_bypass.get(plan.name) if plan.bypass_rank else None
    return None if curve is None else curve.error_at(plan.latent_dim)


def _together(plans: dict[str, BlockPlan], forecast: Forecast) -> dict[str, BlockPlan]:
    """The plans with the blocks' losses scaled to add up to that of the model."""
    total = sum(plan.predicted_loss or 0.0 for plan in plans.values())
    if not total:
        return plans
    scale = forecast.together(total) / total
    return {
        name: plan if plan.predicted_loss is None else replace(plan, predicted_loss=scale * plan.predicted_loss)
        for name, plan in plans.items()
    }


def fits(spec: MoESpec, experts_factor: int, statistics: BlockStatistics) -> bool:
    """Whether there are tokens to fit a block's output side on, and memory to do it in."""
    tokens = len(statistics.sample.hidden)
    return tokens > 0 and fit_bytes(spec, tokens, experts_factor) <= FIT_BYTES


def _cautions(spec: MoESpec, plan: BlockPlan, statistics: BlockStatistics | None, *, tried: bool) -> Iterator[str]:
    """What the data and the size of a block leave open."""
    if statistics is None:
        return
    yield from statistics.warnings
    tokens = len(statistics.sample.hidden)
    if tokens and not fits(spec, plan.experts_factor, statistics):
        size = fit_bytes(spec, tokens, plan.experts_factor) / 2**30
        yield (
            f"{plan.name}: its output side is truncated and not fitted: a fit would take {size:,.0f} GiB, "
            f"more than {FIT_BYTES / 2**30:.0f}"
        )
    if tokens and not tried:
        yield f"{plan.name}: too large to try widths on: its error is predicted from spectra"


def check_plan(specs: Mapping[str, MoESpec], recipe: Recipe) -> None:
    """Raise the LatentizeError that `make_plan` would for sizes that a block cannot have."""
    for name, spec in specs.items():
        for latent in widths(spec.hidden_size) if recipe.auto else [None]:
            plan_block(name, spec, recipe, latent)


def allocate(specs: Mapping[str, MoESpec], recipe: Recipe, forecast: Forecast) -> dict[str, int]:
    """The width of every block, by name, that the recipe's budget is best spent on.

    Raises:
        LatentizeError: no widths keep the budget, or it is one on the loss and a block's loss cannot be predicted.
    """
    assert recipe.budget is not None
    what, limit = recipe.budget.limit
    curves = forecast.curves
    blind = next((name for name in specs if curves[name].losses is None), None)
    if what == "max_loss" and blind is not None:
        raise LatentizeError(
            f"budget.max_loss: {blind}: no gradients, so the loss cannot be predicted; "
            "give calibration data of a differentiable model, or a budget of bytes or flops"
        )
    measure = "flops" if what == "flops" else "bytes"
    options, whole = {}, 0.0
    for name, spec in specs.items():
        options[name] = list(options_of(spec, recipe, curves[name], measure, by_error=blind is not None))
        before = _Cost(spec, spec.hidden_size, spec.num_experts, spec.top_k, _element(spec, None))
        whole += before.flops if measure == "flops" else before.expert_bytes
    if what == "max_loss":
        return within_loss(options, forecast.alone(limit))
    return within_cost(options, limit * whole, f"budget.{what} = {limit:g}")


def options_of(
    spec: MoESpec, recipe: Recipe, curve: Curve, measure: str = "bytes", *, by_error: bool = False
) -> Iterator[Option]:
    """What each width of a block costs; with `by_error` its loss is the squared relative error."""
    d = spec.hidden_size
    for latent in widths(d):
        a, b = recipe.factors_for(d, latent)
        after = _Cost(spec, latent, a * spec.num_experts, b * spec.top_k, _element(spec, recipe))
        around = latent + _bypass_rank(d, latent, recipe)
        cost = after.flops + 4 * d * around if measure == "flops" else after.expert_bytes
        loss = None if by_error else curve.loss_at(latent)
        yield Option(latent, cost, curve.error_at(latent) ** 2 if loss is None else loss)


def plan_block(name: str, spec: MoESpec, recipe: Recipe, latent: int | None = None) -> BlockPlan:
    """The sizes and costs of one block, without predictions; `latent` where the recipe leaves it open."""
    d = spec.hidden_size
    latent = recipe.latent_dim_for(d) if latent is None else latent
    a, b = recipe.factors_for(d, latent)
    _check(name, spec, latent, a, b)
    _check_bypass(name, d, recipe.bypass)
    rank = _bypass_rank(d, latent, recipe)
    element = _element(spec, recipe)
    before = _Cost(spec, d, spec.num_experts, spec.top_k, _element(spec, None))
    after = _Cost(spec, latent, a * spec.num_experts, b * spec.top_k, element)
    return BlockPlan(
        name=name,
        hidden_size=d,
        latent_dim=latent,
        intermediate_size=spec.intermediate_size,
        num_experts=spec.num_experts,
        new_num_experts=a * spec.num_experts,
        top_k=spec.top_k,
        new_top_k=b * spec.top_k,
        experts_factor=a,
        topk_factor=b,
        expert_bytes_before=before.expert_bytes,
        expert_bytes_after=after.expert_bytes,
        dispatched_bytes_before=before.dispatched_bytes,
        dispatched_bytes_after=after.dispatched_bytes,
        projection_bytes=2 * d * latent * element,
        flops_before=before.flops,
        flops_after=after.flops + 4 * d * (latent + rank),
        warnings=tuple(_limits(name, spec, latent, a, b)),
        bypass_rank=rank,
        bypass_bytes=2 * d * rank * element,
    )


def check_bypass(spec: MoESpec, plan: BlockPlan, statistics: BlockStatistics | None) -> None:
    """Raise the LatentizeError of a plan with a bypass that there is nothing to fit on."""
    if not plan.bypass_rank:
        return
    asked = f"{plan.name}: bypass {plan.bypass_rank}"
    if statistics is None or not len(statistics.sample.hidden):
        raise LatentizeError(
            f"{asked} is fitted to calibration data, and none reaches this block; give data, exclude the block, or set "
            "bypass to 0"
        )
    if not fits(spec, plan.experts_factor, statistics):
        raise LatentizeError(
            f"{asked} is fitted with the output side, which is too large here; exclude the block, or set bypass to 0"
        )


def _bypass_rank(d: int, latent: int, recipe: Recipe) -> int:
    """The rank of a block's bypass: none at the full width, where nothing is lost."""
    return recipe.bypass if latent < d else 0


def _check_bypass(name: str, d: int, rank: int) -> None:
    if rank >= d:
        raise LatentizeError(
            f"{name}: bypass {rank} is not below the hidden size {d}, where it would be no saving over a full matrix; "
            "lower bypass"
        )


def effective_rank(values: Tensor) -> float:
    """exp of the entropy of the normalised squared singular values [d] (after Roy and Vetterli, EUSIPCO 2007)."""
    energy = values.double().square()
    share = energy / energy.sum().clamp_min(1e-300)
    return math.exp(-(share * share.clamp_min(1e-300).log()).sum().item())


class _Cost:
    """Per-token cost of routed experts at `width`, with `experts` experts of which `selected` are used."""

    def __init__(self, spec: MoESpec, width: int, experts: int, selected: int, element: int) -> None:
        e = spec.experts
        m, matrices = spec.intermediate_size, 3 if spec.gated else 2
        biases = m * sum(t is not None for t in (e.gate_bias, e.up_bias)) + width * (e.down_bias is not None)
        self.expert_bytes = selected * (matrices * m * width + biases) * element
        self.dispatched_bytes = 2 * selected * width * element
        self.flops = 2 * spec.hidden_size * experts + 2 * selected * matrices * m * width


def _check(name: str, spec: MoESpec, latent: int, a: int, b: int) -> None:
    d = spec.hidden_size
    if spec.latent is not None:
        raise LatentizeError(f"{name}: already latent ({d}→{spec.latent_dim}); exclude it, it is not projected twice")
    if not 1 <= latent <= d:
        raise LatentizeError(f"{name}: latent size {latent} is not between 1 and the hidden size {d}; lower latent_dim")
    rows = spec.num_experts + spec.experts.num_identity
    if b * spec.top_k > a * rows:
        raise LatentizeError(
            f"{name}: top-k {spec.top_k} x {b} is more than the {rows} x {a} experts there would be; lower topk_factor"
        )
    try:
        check_factors(spec, a, b)
    except LatentizeError as error:
        raise type(error)(f"{name}: {error}") from None


def _limits(name: str, spec: MoESpec, latent: int, a: int, b: int) -> Iterator[str]:
    """What kernels that serve MoE models are known to ask for and this block would not have."""
    sizes = (("top-k", spec.top_k, b, TOP_K_LIMITS), ("experts", spec.num_experts, a, EXPERT_LIMITS))
    for what, size, factor, limits in sizes:
        passed = [limit for limit in limits if size <= limit < factor * size]
        if passed:
            shown = ", ".join(map(str, passed))
            yield f"{name}: {what} {size} → {factor * size} passes {shown}, where some serving kernels stop"
    sides = (("latent size", latent), ("intermediate size", spec.intermediate_size))
    for what, size in sides if latent != spec.hidden_size else sides[1:]:
        if spec.hidden_size >= SMALL and size % ALIGNMENT:
            yield f"{name}: {what} {size} is no multiple of {ALIGNMENT}, which kernels for 16-bit experts ask for"
        elif spec.hidden_size >= LARGE and size % BLOCK_SCALE:
            yield f"{name}: {what} {size} is no multiple of {BLOCK_SCALE}, the blocks in which fp8 experts are scaled"


@dataclass(frozen=True)
class Spectra:
    """Singular values [d], descending, of the input side (G C^½) and of the routed output's second moment."""

    input: Tensor
    output: Tensor

    @classmethod
    def of(cls, spec: MoESpec, statistics: BlockStatistics | None) -> Spectra:
        """From calibration statistics, or from the weights alone where there are none."""
        experts, d = spec.experts, spec.hidden_size
        if statistics is None or not statistics.tokens:
            loads = torch.ones(spec.num_experts, dtype=torch.float64, device=experts.up.device)
            moment = torch.eye(d, dtype=torch.float64, device=experts.up.device)
            output = output_gram(experts, loads)
        else:
            loads = statistics.counts[: spec.num_experts].double() / statistics.tokens
            moment = shrink(statistics.input_moment, statistics.tokens)
            output = statistics.output_moment
        values = spectrum(gram(experts, loads, loads), moment)
        return cls(values, torch.linalg.eigvalsh(output).flip(0).clamp_min(0).sqrt())

    def curve(self) -> Curve:
        """The relative output error expected of truncating both sides, at every width."""
        dims = range(1, len(self.input) + 1)
        lost_in, lost_out = _tails(self.input), _tails(self.output)
        errors = (1.0 - (1.0 - lost_in) * (1.0 - lost_out)).clamp_min(0).sqrt()
        return Curve(tuple(dims), tuple(errors.tolist()))


def _tails(values: Tensor) -> Tensor:
    """Share of the energy past the first n singular values, for n = 1 to d."""
    energy = values.double().square()
    kept = energy.cumsum(0) / energy.sum().clamp_min(1e-300)
    tails: Tensor = (1.0 - kept).clamp_min(0)
    tails[-1] = 0.0
    return tails


def _element(spec: MoESpec, recipe: Recipe | None) -> int:
    """Bytes of one weight, as it is or as the recipe will have it."""
    named = None if recipe is None else recipe.dtype
    return getattr(torch, named).itemsize if named else spec.experts.up.element_size()
