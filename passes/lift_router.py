"""Which routing function turns a region's logits into the weights that its routed output was found to need."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from latentize.passes import graph
from latentize.passes.bound import Bound
from latentize.passes.detect import Region
from latentize.passes.head import Head
from latentize.passes.replay import replays
from latentize.routing import normalize, score, selection_scores
from latentize.spec import Groups, RouterSpec
from latentize.ties import TIE, group_ties

#: Relative error of the routing weights below which a rule is taken for a hypothesis; routers often compute in fp32.
FITS = 2e-5
#: Why no rule fits.
NO_SELECTION = "its selection is not the top-k of any supported score of its logits"
NO_WEIGHTS = "its routing weights are not a supported function of its logits (score, normalisation, scale)"


@dataclass(frozen=True)
class RouterFit:
    """A routing rule that reproduces the selection and the weights, with the tensors it reads."""

    rule: RouterSpec  # without tensors
    weight: Bound
    tensors: dict[str, Bound]  # bias, selection_bias, per_expert_scale where present


@dataclass(frozen=True)
class _Target:
    """What the rule has to reproduce: selected experts as a mask [T, N] and their weights [T, N], zero elsewhere."""

    logits: Tensor
    selected: Tensor
    weights: Tensor
    top_k: int
    experts: int  # real ones; the rest pass their input on
    clear: Tensor  # [T] tokens whose weights are known


@torch.no_grad()
def fit_router(
    region: Region,
    indices: Tensor,
    weights: Tensor,
    applies_to: Literal["output", "input"],
    experts: int,
    clear: Tensor,
) -> tuple[RouterFit | None, str]:
    """The routing rule behind the weights, or the reason why none fits.

    Args:
        region: the candidate.
        indices: [T, k] selected experts.
        weights: [T, k] weights the routed output needs.
        applies_to: "output" or "input".
        experts: real experts; logits past them belong to identity experts.
        clear: [T] tokens whose weights are known; an expert whose output vanishes tells nothing of its own.
    """
    if not bool(clear.any()):
        return None, "its routing weights cannot be read off its output: for every token a selected expert adds nothing"
    logits = region.head.logit_rows().double()
    count = logits.shape[1]
    if experts > count:
        return None, f"it has {experts} experts for {count} logits"
    if not 1 <= indices.shape[1] < count:
        return None, f"it selects {indices.shape[1]} of {count} experts: nothing is routed"
    selected = torch.zeros_like(logits).scatter(1, indices, 1.0).bool()
    dense = torch.zeros_like(logits).scatter(1, indices, weights.double())
    target = _Target(logits, selected, dense, indices.shape[1], experts, clear)
    reason = NO_SELECTION
    others: list[_Target] | None = None
    doubtful: list[_Match] = []  # rules that select alike for the recorded tokens and otherwise for others
    for factor in (None, *_temperatures(region)):
        scaled = target if factor is None else replace(target, logits=logits * float(factor.recorded()))
        for rule, bounds in _selection_rules(region, scaled):
            if factor is not None and (bounds or rule.softcap is not None):
                continue
            if not _selects(rule, _capped(scaled.logits, rule), scaled):
                continue
            reason = NO_WEIGHTS
            match = _Match(rule, bounds, factor)
            others = _elsewhere(region.head, indices, target) if others is None else others
            if not all(_selects(rule, _capped(other.logits, rule), other) for other in match.scaled(others)):
                doubtful.append(match)
                continue
            found = _weighed(region, match, scaled, applies_to)
            if found is not None:
                return found, ""
        if factor is None and reason == NO_SELECTION:
            break
    for match in doubtful:
        found = _weighed(region, match, match.scaled([target])[0], applies_to)
        if found is not None:
            return found, ""
    return None, reason


@dataclass(frozen=True)
class _Match:
    """A rule that selects what was selected: the tensors it reads, the factor that logits are multiplied by first."""

    rule: RouterSpec
    bounds: dict[str, Bound]
    factor: Bound | None

    def scaled(self, targets: list[_Target]) -> list[_Target]:
        factor = 1.0 if self.factor is None else float(self.factor.recorded())
        return targets if self.factor is None else [replace(t, logits=t.logits * factor) for t in targets]


def _elsewhere(head: Head, indices: Tensor, target: _Target) -> list[_Target]:
    """What is selected for other logits, where the recorded calls tell."""
    wanted = indices.sort(-1).values
    for value in sorted(head.dependent, key=lambda v: v.index):
        for found in _as_indices(value.tensor, head):
            if found.shape != wanted.shape or not torch.equal(found.sort(-1).values, wanted):
                continue
            others = []
            for logits, chosen in replays(head, value):
                experts = next((e for e in _as_indices(chosen, head)), None)
                if experts is None or experts.shape != wanted.shape:
                    break
                selected = torch.zeros_like(logits).scatter(1, experts, 1.0).bool()
                others.append(replace(target, logits=logits, selected=selected))
            if others:
                return others
    return []


def _weighed(
    region: Region, match: _Match, target: _Target, applies_to: Literal["output", "input"]
) -> RouterFit | None:
    """The rule with the normalisation and the scale that make its weights the target's; None when there are none."""
    logits = _capped(target.logits, match.rule)
    for weighing in _weighings(region, match.rule):
        scale = _scale(weighing, logits, target, region)
        if scale is not None:
            found = replace(
                weighing, scale=scale, applies_to=applies_to, selection_bias=None, per_expert_scale=None, bias=None
            )
            return _fit(region, found, match.bounds, match.factor)
    return None


def _fit(region: Region, rule: RouterSpec, bounds: dict[str, Bound], factor: Bound | None) -> RouterFit:
    weight, bias, tensors = region.head.weight, region.head.bias, dict(bounds)
    if bias is not None:
        added = tensors.get("bias")
        tensors["bias"] = bias if added is None else bias.with_(added, torch.add)
    if factor is not None:
        weight = weight.with_(factor, torch.mul)
        tensors = {name: bound.with_(factor, torch.mul) for name, bound in tensors.items()}
    return RouterFit(rule, weight, tensors)


def _temperatures(region: Region) -> Iterator[Bound]:
    """Factors by which logits may be multiplied before they are scored, as tensors of no axes."""
    near = [c for c in region.calls if c.name in {"mul", "div"} and any(v in region.head.dependent for v in c.inputs)]
    numbers = {abs(s) for c in near for s in c.scalars}
    for number in sorted({n for s in numbers if s for n in (s, 1 / s)} - {1.0}):
        yield Bound((), partial(_number, number))
    single = dict.fromkeys(v for c in near for v in c.inputs if v.const and v.tensor.numel() == 1)
    for value in single:
        if float(value.tensor) > 0:
            yield Bound((value,), lambda tensors: tensors[0].reshape(()))
            yield Bound((value,), lambda tensors: tensors[0].reshape(()).reciprocal())


def _number(number: float, _: list[Tensor]) -> Tensor:
    return torch.tensor(number)


def _vector(value: Tensor, count: int) -> Tensor:
    return value.reshape(-1).expand(count) if value.numel() == 1 else value.reshape(count)


_PARTS = ("selection_bias", "selection_bias_logit", "bias", "per_expert_scale", "")


def _selection_rules(region: Region, target: _Target) -> Iterator[tuple[RouterSpec, dict[str, Bound]]]:
    """Every rule of selection worth trying, plain ones first; its leaves are given parts in every way."""
    count = target.logits.shape[1]
    leaves = [leaf for leaf in region.routing_leaves if leaf.value.tensor.numel() in (1, count)]
    caps: list[float | None] = [None]
    if any(c.name == "tanh" and c.inputs[0] in region.head.dependent - region.fed for c in region.calls):
        caps = [*(s for s in region.scalars() if s > 0), None]
    orders = (
        ["topk_first", "score_first"] if _softmax_over_selected(region, target.top_k) else ["score_first", "topk_first"]
    )
    scores = ("softmax", "sigmoid", "sqrt_softplus")
    groupings: list[Groups | None] = [None, *_groups(region, target)]
    for parts in itertools.product(_PARTS, repeat=len(leaves)):
        named = [p.removesuffix("_logit") for p in parts if p]
        if len(named) != len(set(named)):
            continue
        bounds = {
            part.removesuffix("_logit"): Bound((leaf.value,), lambda t: _vector(t[0], count))
            for part, leaf in zip(parts, leaves, strict=True)
            if part
        }
        tensors = {name: bound.recorded().double() for name, bound in bounds.items()}
        for cap, group, order, kind in itertools.product(caps, groupings, orders, scores):
            on = "logit" if "selection_bias_logit" in parts else "score"
            if order == "topk_first" and on == "score" and "selection_bias" in bounds:
                continue
            rule = RouterSpec(
                torch.empty(0), target.top_k, softcap=cap, score=kind, order=order, groups=group,  # type: ignore[arg-type]
                selection_bias_on=on, **tensors,  # type: ignore[arg-type]
            )  # fmt: skip
            yield rule, dict(bounds)


def _softmax_over_selected(region: Region, top_k: int) -> bool:
    return any(
        c.name in {"_softmax", "softmax"} and c.outputs and c.outputs[0].shape[-1:] == (top_k,) for c in region.calls
    )


def _groups(region: Region, target: _Target) -> Iterator[Groups]:
    """Group-limited selections that the shapes in the region allow."""
    tokens, count = target.logits.shape
    if len(region.head.selections) < 2 and not any(c.name in {"amax", "topk"} for c in region.calls):
        return
    seen = {v.shape for c in region.calls for v in c.outputs if v in region.head.dependent}
    sizes = sorted({s[-2] for s in seen if len(s) >= 3 and s[-2] * s[-1] == count and 1 < s[-2] < count})
    for size in sizes:
        kept = {s[-1] for s in seen if len(s) >= 2 and s.numel() == tokens * s[-1] and 1 <= s[-1] < size}
        pairs = any(c.name == "topk" and c.args[1] == 2 and c.inputs[0].shape[-2:-1] == (size,) for c in region.calls)
        kinds = ("top2", "max") if pairs else ("max", "top2")
        for keep, kind, fill in itertools.product(sorted(kept), kinds, ("-inf", "zero")):
            yield Groups(size, keep, kind, fill)  # type: ignore[arg-type]


def _capped(logits: Tensor, rule: RouterSpec) -> Tensor:
    biased = logits if rule.bias is None else logits + rule.bias
    return biased if rule.softcap is None else rule.softcap * torch.tanh(biased / rule.softcap)


def _selects(rule: RouterSpec, logits: Tensor, target: _Target) -> bool:
    scores = logits if rule.order == "topk_first" else score(logits, rule.score)
    if rule.groups is not None and rule.groups.kept * (logits.shape[1] // rule.groups.count) < rule.top_k:
        return False
    choice = selection_scores(logits, scores, rule)
    ranked = choice.sort(-1, descending=True)
    gap = ranked.values[:, rule.top_k - 1] - ranked.values[:, rule.top_k]
    clear = (gap > TIE) & ~group_ties(choice, scores, rule)
    chosen = torch.zeros_like(choice).scatter(1, ranked.indices[:, : rule.top_k], 1.0).bool()
    wrong = (chosen != target.selected).any(-1) & clear
    return bool(clear.any()) and not bool(wrong.any())


def _weighings(region: Region, rule: RouterSpec) -> Iterator[RouterSpec]:
    """The rule with every normalisation that the region's calls suggest, hinted ones first."""
    tokens = region.head.tokens
    sums = [c for c in region.calls if c.outputs and c.outputs[0].tensor.numel() == tokens]
    added = sorted({s for c in sums if c.name == "add" for s in graph.numbers(c) if s > 0})
    floors = [c for c in sums if c.name in {"clamp", "clamp_min", "maximum"}]
    clamped = sorted({s for c in floors for s in graph.numbers(c) if s > 0})
    norms = {s for c in region.calls if "norm" in c.name for s in c.scalars if s > 1}
    if rule.order == "score_first" or rule.score != "softmax":
        yield from (replace(rule, normalize="sum", eps=eps) for eps in added)
        yield from (replace(rule, normalize="clamp", eps=eps) for eps in clamped)
        yield replace(rule, normalize="sum")
        yield from (replace(rule, normalize="norm", p=p) for p in sorted({2.0, *norms}))
    yield rule


def _scale(rule: RouterSpec, logits: Tensor, target: _Target, region: Region) -> float | None:
    """The factor that makes the rule's weights the target's, or None when no factor does."""
    indices = target.selected.double().topk(rule.top_k, -1).indices
    values = (logits if rule.order == "topk_first" else score(logits, rule.score)).gather(1, indices)
    if rule.order == "topk_first":
        values = score(values, rule.score)
    weights = normalize(values, rule)
    if rule.per_expert_scale is not None:
        weights = weights * rule.per_expert_scale[indices]
    wanted = target.weights.gather(1, indices)
    weights, wanted = (_pooled(w, indices >= target.experts)[target.clear] for w in (weights, wanted))
    size = float(weights.square().sum())
    if not size > 0 or not torch.isfinite(weights).all():
        return None
    scale = float((weights * wanted).sum()) / size
    snapped = min([1.0, *(s for s in region.scalars() if s)], key=lambda s: abs(s - scale))
    if abs(snapped - scale) <= FITS * abs(scale):
        scale = snapped
    error = (weights * scale - wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-30)
    return scale if float(error.max()) <= FITS else None


def _pooled(weights: Tensor, passing: Tensor) -> Tensor:
    """Weights [T, k] with those of identity experts added up in a column of their own, for nothing tells them apart."""
    if not bool(passing.any()):
        return weights
    return torch.cat([weights.masked_fill(passing, 0.0), (weights * passing).sum(1, keepdim=True)], 1)


def supports(region: Region) -> Iterator[Tensor]:
    """Candidates for the selected experts [T, k] of the recorded run: integer tensors computed from the logits."""
    head = region.head
    seen: set[tuple[tuple[int, ...], bytes]] = set()
    firsts: list[Tensor] = []
    for call in sorted({c for v in head.dependent for c in [v.call] if c is not None}, key=lambda c: c.index):
        for found in (f for value in call.outputs for f in _as_indices(value.tensor, head)):
            if found.shape[1] == 1 and call.name in graph.SELECTIONS:
                firsts.append(found)
            key = (tuple(found.shape), found.sort(-1).values.cpu().numpy().tobytes())
            if key not in seen:
                seen.add(key)
                yield found
    if len(firsts) > 1:
        joined = torch.cat(firsts, 1)
        if all(len(set(row)) == len(row) for row in joined.tolist()):
            yield joined


def has_idle_experts(head: Head) -> bool:
    """Whether the tokens of the recorded run select only some of the experts."""
    used = _numbers_used(head)
    return bool(used) and max(used) < head.num_experts


def uses_several_experts(head: Head) -> bool:
    """Whether the tokens of the recorded run select more than one of the experts, between them."""
    used = _numbers_used(head)
    return bool(used) and min(used) > 1


def _numbers_used(head: Head) -> list[int]:
    """Numbers of different experts in all that may be the selected ones."""
    return [len(f.unique()) for v in head.dependent for f in _as_indices(v.tensor, head)]


def _as_indices(tensor: Tensor, head: Head) -> Iterator[Tensor]:
    """Readings of a tensor as k different experts for each token, [T, k]."""
    tokens, count = head.tokens, head.num_experts
    if tensor.dtype not in (torch.int64, torch.int32) or not tensor.numel() or tensor.numel() % tokens:
        return
    k = tensor.numel() // tokens
    if k >= count or tensor.dim() == 0 or int(tensor.min()) < 0 or int(tensor.max()) >= count:
        return
    for turned in _experts_last(tensor, head):
        rows = turned.reshape(tokens, k).long()
        ordered = rows.sort(-1).values
        if k == 1 or not bool((ordered[:, 1:] == ordered[:, :-1]).any()):
            yield rows


def _experts_last(tensor: Tensor, head: Head) -> Iterator[Tensor]:
    """The tensor as it is, and with the experts' axis moved to the end where the logits have it elsewhere."""
    if not head.experts_last and tensor.dim() == head.logits.tensor.dim():
        yield tensor.movedim(head.axis, -1)
    if head.experts_last or head.projection.call.name != "convolution" or tensor.dim() != 4:
        yield tensor


def carried_weights(region: Region, indices: Tensor) -> Iterator[Tensor]:
    """Candidates for the routing weights [T, k] of the recorded run: floating tensors from the logits alone."""
    head = region.head
    tokens, k = indices.shape
    count = head.num_experts
    for value in sorted(head.dependent - region.fed, key=lambda v: v.index):
        if not value.tensor.is_floating_point() or value.tensor.numel() not in (tokens * k, tokens * count):
            continue
        for tensor in _experts_last(value.tensor, head):
            if tensor.numel() == tokens * k and tensor.shape[0] in (tokens, tensor.numel()):
                yield tensor.reshape(tokens, k)
            elif tensor.numel() == tokens * count and tensor.shape[-1] == count:
                yield tensor.reshape(tokens, count).gather(1, indices)
        if value.shape == (count, tokens):  # one row for each expert
            yield value.tensor.T.gather(1, indices)
