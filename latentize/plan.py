"""What a conversion will do to each block, before any work: sizes, bytes, FLOPs, predicted error, warnings."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from latentize.errors import LatentizeError
from latentize.projections import gram, output_gram, shrink, spectrum, square_root
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

    `expert_bytes` are the weights of the selected experts; `projection_bytes`, those of the two projections, are read
    once per batch. `dispatched_bytes` are the activations that travel to the experts and back. FLOPs count the router,
    the projections and the experts. `spectrum` holds the singular values of G C^½ (see `latentize.projections`).
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
    spectrum: tuple[float, ...]
    effective_rank: float
    predicted_error: float
    warnings: tuple[str, ...] = ()


def make_plan(
    specs: Mapping[str, MoESpec], recipe: Recipe, statistics: Mapping[str, BlockStatistics] | None = None
) -> dict[str, BlockPlan]:
    """The plan of every block, by name.

    Raises:
        LatentizeError: a latent size or a factor that a block cannot have; the message names the block and its sizes.
    """
    return {name: plan_block(name, spec, recipe, (statistics or {}).get(name)) for name, spec in specs.items()}


def plan_block(name: str, spec: MoESpec, recipe: Recipe, statistics: BlockStatistics | None) -> BlockPlan:
    """The plan of one block."""
    d, latent = spec.hidden_size, recipe.latent_dim_for(spec.hidden_size)
    a, b = recipe.factors_for(d)
    _check(name, spec, latent, a, b)
    element = getattr(torch, recipe.dtype).itemsize if recipe.dtype else spec.experts.up.element_size()
    values, error = _predict(spec, latent, statistics)
    before = _Cost(spec, d, spec.num_experts, spec.top_k, spec.experts.up.element_size())
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
        flops_after=after.flops + 4 * d * latent,
        spectrum=tuple(values.tolist()),
        effective_rank=effective_rank(values),
        predicted_error=error,
        warnings=(*_limits(name, spec, latent, a, b), *(statistics.warnings if statistics is not None else ())),
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


def _predict(spec: MoESpec, latent: int, statistics: BlockStatistics | None) -> tuple[Tensor, float]:
    """Singular values of the input side, and the relative output error expected of truncating both sides."""
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
    outgoing = torch.linalg.eigvalsh(square_root(output)).flip(0)
    lost_in, lost_out = _tail(values, latent), _tail(outgoing, latent)
    return values, math.sqrt(1.0 - (1.0 - lost_in) * (1.0 - lost_out))


def _tail(values: Tensor, kept: int) -> float:
    """Share of the energy past the first `kept` singular values."""
    energy = values.double().square()
    return (energy[kept:].sum() / energy.sum().clamp_min(1e-300)).item()
