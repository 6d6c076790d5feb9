"""The routing function: logits -> selected experts and weights. One definition for reference, module and verifier."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from latentize.spec import RouterSpec


class Routing(NamedTuple):
    """What a router decided for T tokens."""

    logits: Tensor  # [T, N]
    weights: Tensor  # [T, k]
    indices: Tensor  # [T, k] int64


def route(logits: Tensor, router: RouterSpec) -> Routing:
    """Select experts and weigh them.

    Args:
        logits: [T, N] raw router logits, hidden @ weight.T + bias.
        router: the routing function; its `weight` and `bias` are not used here.

    Returns:
        Routing with the logits as given, weights [T, k] in the logits' dtype and indices [T, k].
    """
    capped = logits if router.softcap is None else router.softcap * torch.tanh(logits / router.softcap)
    scores = capped if router.order == "topk_first" else score(capped, router.score)
    choice = selection_scores(capped, scores, router)
    weights, indices = choice.topk(router.top_k, dim=-1)
    if choice is not scores:
        weights = scores.gather(-1, indices)
    if router.order == "topk_first":
        weights = score(weights, router.score)
    weights = normalize(weights, router) * router.scale
    if router.per_expert_scale is not None:
        weights = weights * router.per_expert_scale.to(weights.dtype)[indices]
    return Routing(logits, weights, indices)


def score(logits: Tensor, kind: str) -> Tensor:
    """Scores from logits, over the last axis."""
    if kind == "softmax":
        return logits.softmax(-1)
    return logits.sigmoid() if kind == "sigmoid" else F.softplus(logits).sqrt()


def selection_scores(logits: Tensor, scores: Tensor, router: RouterSpec) -> Tensor:
    """The values [T, N] whose top-k is selected: biased, and masked outside the kept groups."""
    choice = logits if router.selection_bias_on == "logit" else scores
    if router.selection_bias is not None:
        choice = choice + router.selection_bias.to(choice.dtype)
    if router.groups is None:
        return choice
    groups = router.groups
    grouped = choice.unflatten(-1, (groups.count, -1))
    if groups.score == "max":
        group_scores = grouped.amax(-1)
    else:
        group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    kept = group_scores.topk(groups.kept, dim=-1).indices
    mask = torch.zeros_like(group_scores).scatter(-1, kept, 1.0).bool().unsqueeze(-1).expand_as(grouped).flatten(-2)
    return choice.masked_fill(~mask, -math.inf if groups.fill == "-inf" else 0.0)


def normalize(weights: Tensor, router: RouterSpec) -> Tensor:
    """Divide the selected scores [T, k] as the router says."""
    if router.normalize == "none":
        return weights
    if router.normalize == "norm":
        size: Tensor = torch.linalg.vector_norm(weights, router.p, dim=-1, keepdim=True)
        return weights / size
    total = weights.sum(-1, keepdim=True)
    return weights / (total + router.eps if router.normalize == "sum" else total.clamp_min(router.eps))
