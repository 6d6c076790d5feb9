"""Region -> `Binding`: a `MoESpec` as a function of the module's parameters, or the reason why the region is none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from latentize.passes import graph
from latentize.passes.bound import Bound
from latentize.passes.capture import Call, Recording, Value
from latentize.passes.detect import Region, latent_projection, regions
from latentize.passes.double import in_fp64
from latentize.passes.head import Head
from latentize.passes.lift_experts import ExpertsFit, fit_experts, normed_weights
from latentize.passes.lift_router import RouterFit, carried_weights, fit_router, supports
from latentize.spec import ExpertsSpec, MoESpec

#: How far a candidate came whose experts were read, and only its routing was not.
EXPERTS_READ = 2
#: Activations that pass a factor on as a power of it.
HOMOGENEOUS = frozenset({"relu", "relu_squared", "leaky_relu", "identity"})
#: Relative change of what a router reads of one token that counts as caused by another token, rounding aside.
MOVED = 1e-7


@dataclass(frozen=True)
class Binding:
    """A lifted region: the rule that was found, and where in the module each of its tensors comes from."""

    region: Region
    router: RouterFit
    experts: ExpertsFit
    latent: bool  # projections around the experts are there already

    def spec(self, recording: Recording, state: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> MoESpec:
        """The spec with tensors evaluated from `state`, the module's parameters and buffers by name."""
        wide = any(t.dtype == torch.float64 for t in state.values())
        with in_fp64() if wide else contextlib.nullcontext():
            return self._spec(recording, state, dtype)

    def _spec(self, recording: Recording, state: Mapping[str, Tensor], dtype: torch.dtype | None) -> MoESpec:
        def tensor(bound: Bound) -> Tensor:
            value = bound.tensor(recording, state).detach()
            return value if dtype is None else value.to(dtype)

        router = replace(
            self.router.rule,
            weight=tensor(self.router.weight),
            **{name: tensor(bound) for name, bound in self.router.tensors.items()},  # type: ignore[arg-type]
        )
        experts = {name: tensor(bound) for name, bound in self.experts.bounds().items()}
        identity = router.weight.shape[0] - self.experts.num_experts
        return MoESpec(router, ExpertsSpec(**experts, activation=self.experts.activation, num_identity=identity))

    @property
    def separate_router_input(self) -> bool:
        """Whether the router reads other hidden states than the experts."""
        return graph.base(self.region.head.projection.activation) is not graph.base(self.region.hidden)


@dataclass(frozen=True)
class Lifted:
    """What became of a router: its binding, or the reason of the candidate that came nearest."""

    binding: Binding | None
    reason: str = ""
    experts_read: bool = False  # whether the experts of some candidate were read, and only its routing was not


def lift(head: Head) -> Lifted:
    """The binding of a router's MoE, or why there is none."""
    if all(c.name == "topk" and c.args[1] == head.num_experts for c in head.selections):
        reason = f"it selects all {head.num_experts} experts for each token: a dense mixture, nothing is routed"
        return Lifted(None, reason)
    reasons: list[tuple[float, str]] = []
    for region in regions(head):
        binding, reached, reason = _lift_region(region)
        if binding is not None:
            return Lifted(binding)
        progress = float(reached)
        if region.width != head.router_input_rows().shape[1]:
            reason = f"its experts work at a latent width of {region.width} already, but {reason}"
            progress = max(reached, 1) + 0.5
        reasons.append((progress, reason))
    if not reasons:
        return Lifted(None, _without_regions(head))
    progress, reason = max(reasons, key=lambda r: r[0])
    return Lifted(None, _unselected(head) or reason, progress >= EXPERTS_READ)


def _without_regions(head: Head) -> str:
    """Why nothing that follows a router can be its experts."""
    read = head.router_input_rows().shape[1]
    for region in regions(head, any_width=True):
        if sum(len(leaf.shape) >= 2 for leaf in region.leaves) >= 2:
            return (
                f"its router is more than one projection: its last layer reads {read} features, where the experts work "
                f"at width {region.width}"
            )
    return "a selection by a router was found, but no experts: no weights are used between it and an output"


def _unselected(head: Head) -> str:
    """Says so where a router has logits that nothing selects by; "" otherwise."""
    count, choice = head.num_experts, max(c.inputs[0].tensor.numel() for c in head.selections) // head.tokens
    if not 1 < choice < count:
        return ""
    return (
        f"it selects from {choice} of its router's {count} logits, and the others share in the weights: "
        "what they weigh (shared experts) is part of the routing"
    )


def _lift_region(region: Region) -> tuple[Binding | None, int, str]:
    best = (0, "its selected experts could not be found among the values it computes")
    either = False  # whether experts that are weighted on their input read like those weighted on their output
    for indices in supports(region):
        experts, reason = _weighted_outputs(region, indices)
        if experts is None:
            best = max(best, (1, reason), key=lambda b: b[0])
            continue
        binding, reason = _bind(region, indices, experts, "output")
        if binding is not None:
            return binding, 3, ""
        best = (EXPERTS_READ, reason)
        either = either or experts.activation.name in HOMOGENEOUS
    if best[0] >= EXPERTS_READ and not either:
        return None, *best
    for indices, experts in _weighted_inputs(region):
        binding, reason = _bind(region, indices, experts, "input")
        if binding is not None:
            return binding, 3, ""
        best = (EXPERTS_READ, reason)
    if best[0] >= EXPERTS_READ:
        return None, *best
    found = _from_all_experts(region)
    if found is not None:
        binding, reason = _bind(region, *found, "output")
        if binding is not None:
            return binding, 3, ""
        best = (EXPERTS_READ, reason)
    return None, *best


def _bind(
    region: Region, indices: Tensor, experts: ExpertsFit, applies_to: Literal["output", "input"]
) -> tuple[Binding | None, str]:
    """The region with the routing rule that explains its experts' weights, in their order or in the router's."""
    weights, count, clear = experts.coefficients, experts.num_experts, experts.clear
    if experts.scale is not None:
        return _bind_normed(region, indices, experts)
    router, reason = fit_router(region, indices, weights, applies_to, count, clear)
    if router is not None and _mixes_tokens(region):
        return None, "its router reads other tokens than the one it routes"
    if router is not None:
        return Binding(region, router, experts, _is_latent(region)), ""
    for selected in supports(region):
        row = _rows_of_experts(indices, selected, count)
        if row is None or row == list(range(count)):
            continue
        router, _ = fit_router(region, torch.tensor(row)[indices], weights, applies_to, count, clear)
        if router is not None:
            order = [row.index(place) for place in range(count)]
            return Binding(region, router, experts.reordered(order), _is_latent(region)), ""
    binding, _ = _bind_normed(region, indices, experts)
    return (None, reason) if binding is None else (binding, "")


def _bind_normed(region: Region, indices: Tensor, experts: ExpertsFit) -> tuple[Binding | None, str]:
    """The latent region with the rule that explains its weights, each expert's output having been normalised."""
    reason = "its experts' outputs are normalised one by one"
    if not _is_latent(region):
        return None, reason
    for weights in normed_weights(experts, region, indices):
        router, reason = fit_router(region, indices, weights, "output", experts.num_experts, experts.clear)
        if router is not None:
            return Binding(region, router, experts, latent=True), ""
    return None, reason


def _mixes_tokens(region: Region) -> bool:
    """Whether what the router reads of a token depends on other tokens, given what router and experts both read.

    The calls between are run again with one token changed.
    """
    seen, hidden = region.head.projection.activation, region.hidden
    if graph.base(seen) is graph.base(hidden):
        return False
    behind = {v for v in graph.ancestors([seen]) if not v.const}
    shared = behind & graph.ancestors([hidden])
    tokens = region.head.tokens
    common = max((v for v in shared if _has_tokens(v, tokens)), key=lambda v: v.index, default=None)
    if common is None:
        return False
    changed = common.tensor.detach().clone()
    token = tokens // 2
    changed.view(tokens, -1)[token] += 1.0
    known = {common: changed}
    calls = {v.call for v in behind - shared if v.call is not None}
    with in_fp64():
        for call in sorted(calls, key=lambda c: c.index):
            known.update(graph.rerun(call, known))
    moved = (known[seen] - seen.tensor).reshape(tokens, -1).norm(dim=1) if seen in known else torch.zeros(tokens)
    moved[token] = 0.0
    return bool(moved.max() > MOVED * seen.tensor.norm())


def _has_tokens(value: Value, tokens: int) -> bool:
    tensor = value.tensor
    return tensor.is_floating_point() and tensor.is_contiguous() and tensor.numel() % tokens == 0 < tensor.numel()


def _rows_of_experts(experts: Tensor, rows: Tensor, count: int) -> list[int] | None:
    """The router row that each expert goes with, from which of both are selected together; None when that is unclear.

    Args:
        experts: [T, k] experts that were used.
        rows: [T, k] router rows that were selected.
        count: number of both.
    """
    if experts.shape != rows.shape or max(int(experts.max()), int(rows.max())) >= count:
        return None
    used, chosen = (torch.zeros(len(t), count).scatter(1, t, 1.0) for t in (experts, rows))
    together = used.T @ chosen
    best = together.argmax(1)
    always = together.gather(1, best.unsqueeze(1)).squeeze(1)
    if not bool(always.all()) or len(set(best.tolist())) < count:
        return None
    if not torch.equal(always, used.sum(0)) or not torch.equal(always, chosen.sum(0)[best]):
        return None
    return [int(row) for row in best]


def _weighted_outputs(region: Region, indices: Tensor) -> tuple[ExpertsFit | None, str]:
    """The reading in which routing weights multiply the experts' outputs, or why there is none.

    The weights are solved for. Where that always works, as many experts adding up to anything at the width that they
    have, they must be among the values that the region carries.
    """
    if indices.shape[1] >= region.width:
        for weights in carried_weights(region, indices):
            experts, _ = fit_experts(region, indices, weights, on_output=True)
            if experts is not None:
                return experts, ""
    return fit_experts(region, indices)


def _weighted_inputs(region: Region) -> Iterator[tuple[Tensor, ExpertsFit]]:
    """Readings in which the routing weight multiplies an expert's input."""
    for indices in supports(region):
        for weights in carried_weights(region, indices):
            experts, _ = fit_experts(region, indices, weights)
            if experts is not None:
                yield indices, experts


def _from_all_experts(region: Region) -> tuple[Tensor, ExpertsFit] | None:
    """Selected experts read off the weights that the routed output needs when every expert may take part."""
    tokens, count = region.head.tokens, region.head.num_experts
    if count >= region.width:
        return None
    everyone = torch.arange(count).expand(tokens, count)
    experts, _ = fit_experts(region, everyone)
    if experts is None:
        return None
    weights = experts.coefficients
    used = weights.abs() > 1e-7 * weights.abs().amax(-1, keepdim=True)
    k = int(used.sum(-1).max())
    if not 1 <= k < count:
        return None
    order = weights.abs().topk(k, -1).indices
    return order, replace(experts, coefficients=weights.gather(1, order))


def _is_latent(region: Region) -> bool:
    """Whether the experts read a projection of what the router reads, and their output is projected back.

    At the router's own width there is nothing between but reshapes; at another, norms may be.
    """
    head = region.head
    down = latent_projection(head, region.hidden)
    width = head.router_input_rows().shape[1]
    if down is None or (region.width == width and graph.base(region.hidden).call is not down.call):
        return False
    projected = [c for c in _onward(region.output, through=region.width != width) if graph.projection(c) is not None]
    return any(c.outputs[0].tensor.numel() == head.tokens * width for c in projected)


def _onward(value: Value, *, through: bool) -> Iterator[Call]:
    """Calls that use a value other than to reshape it; `through`: the contractions that it comes to first."""
    if not through:
        yield from graph.users_through_reshapes(value)
        return
    stack, seen = [value], {value}
    while stack:
        for call in stack.pop().users:
            if call.name in graph.CONTRACTIONS:
                yield call
                continue
            stack.extend(v for v in call.outputs if v not in seen)
            seen.update(call.outputs)
