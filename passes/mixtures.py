"""Near misses without a selection: mixtures of experts that every token, or every slot, goes through."""

from __future__ import annotations

from collections.abc import Callable

import torch

from latentize.passes import graph
from latentize.passes.capture import Call, Recording
from latentize.passes.detect import Region, regions
from latentize.passes.head import Head
from latentize.passes.heads import selection_axis
from latentize.passes.leaves import groupings
from latentize.passes.lift_experts import fit_experts
from latentize.passes.scan import SLOTS


def find_mixtures(recording: Recording, asked: Callable[[Call], bool], holds: Callable[[int], bool]) -> list[str]:
    """Why what weighs experts without selecting any is no standard MoE.

    Args:
        recording: a run of a module.
        asked: which scores are asked for.
        holds: whether the module holds weights for so many experts.
    """
    heads: dict[Call, list[Call]] = {}
    for call in recording.calls:
        if call.name not in graph.SCORES or not call.inputs or call.inputs[0].const:
            continue
        found, mixing = graph.nearest_projections(call.inputs[0])
        if len(found) == 1 and not mixing:
            heads.setdefault(found.pop(), []).append(call)
    wanted = [(projection, scores) for projection, scores in heads.items() if asked(scores[0])]
    return [reason for projection, scores in wanted if (reason := _reason(recording, projection, scores, holds))]


def _reason(recording: Recording, call: Call, scores: list[Call], holds: Callable[[int], bool]) -> str:
    projection = graph.projection(call)
    assert projection is not None
    logits = call.outputs[0]
    head = Head(recording, projection, logits, scores, graph.forward_cone([logits]), -1)
    if head.num_experts < 2 or head.tokens < 2:
        return ""
    over_tokens = any(_across(s, head.num_experts) for s in scores)
    counts = {head.num_experts // slots for slots in (SLOTS if over_tokens else (1,))}
    if not any(holds(count) for count in counts):
        return ""
    for region in regions(head):
        if over_tokens:
            if _repeats(region):
                return "every expert reads a mixture of all tokens (soft MoE): no token selects experts"
        elif head.num_experts < region.width:
            reason = _dense(region)
            if reason:
                return reason
    return ""


def _across(score: Call, logits: int) -> bool:
    """Whether a score is normalised along an axis that no part of a token's logits can fill: along tokens."""
    axis = selection_axis(score)
    return axis is not None and score.inputs[0].tensor.dim() >= 2 and bool(logits % score.inputs[0].shape[axis])


def _repeats(region: Region) -> bool:
    """Whether a region holds at least two kinds of weights, each once an expert; an expert may have several logits."""
    for roles in groupings(region):
        kinds = [r for r in roles if r.kind == "weight"]
        counts = {len(r.members) if not r.stacked else r.members[0].shape[0] for r in kinds}
        if len(kinds) >= 2 and len(counts) == 1 and min(counts) > 1 and region.head.num_experts % min(counts) == 0:
            return True
    return False


def _dense(region: Region) -> str:
    """The reason when the region's output is a weighted sum of all experts; "" when it is none."""
    tokens, count = region.head.tokens, region.head.num_experts
    experts, _ = fit_experts(region, torch.arange(count).expand(tokens, count))
    if experts is None or experts.num_experts != count:
        return ""
    weights = experts.coefficients.abs()
    used = (weights > 1e-7 * weights.amax(-1, keepdim=True)).sum(-1)
    if 1 <= int(used.min()) == int(used.max()) < count:
        return f"each token uses {int(used.max())} of {count} experts, but its scores do not choose them"
    if int(used.min()) < count:
        return f"no top-k: its tokens use {int(used.min())} to {int(used.max())} of {count} experts, by a threshold"
    return f"each token goes through all {count} experts, weighted (a dense mixture): nothing is selected"
