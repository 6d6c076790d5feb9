"""Children that differ by what the down-projection drops, which only the router still sees.

A parent's router row r becomes r + q_c for its children c. The q_c of a family add up to zero and lie along the leading
directions of the dropped part of x over the parent's tokens, scaled so that the children's logits differ by about one.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from latentize.memory import trim
from latentize.projections import leading
from latentize.rescale import simplex
from latentize.routing import Routing
from latentize.spec import RouterSpec

#: Standard deviation of the difference between two siblings' logits.
SPLIT = 0.5

#: The same between two banks of experts.
BANK_SPLIT = 0.1


def condition(
    router: RouterSpec, parents: int, a: int, dropped: Tensor, hidden: Tensor, routing: Routing
) -> RouterSpec:
    """The expanded router with its families' rows split.

    Args:
        router: after `rescale.copy_router`; child c of expert e at c * parents + e.
        parents: experts N before it was expanded.
        a: copies of each.
        dropped: [d, d] D such that D x is what the down-projection drops.
        hidden: [T, d] what the router reads.
        routing: the original routing of these tokens, over `parents` experts.
    """
    if a == 1:
        return router
    weight = router.weight
    shifts = torch.zeros(a, *weight.shape[1:], dtype=hidden.dtype, device=hidden.device).unsqueeze(1)
    shifts = shifts.repeat(1, parents, 1)
    for expert in range(parents):
        x = hidden[(routing.indices == expert).any(-1)]
        shifts[:, expert] = family_shifts(x, dropped, a)
        trim()
    rows = weight.clone()
    rows[: a * parents] += shifts.flatten(0, 1).to(weight)
    return replace(router, weight=rows)


def family_shifts(x: Tensor, dropped: Tensor, count: int) -> Tensor:
    """Router shifts [count, d] of one family from its tokens x [n, d]; zero where nothing is dropped."""
    lost = x @ dropped.T
    if len(x) < 2 or lost.norm() <= 1e-6 * x.norm():
        return x.new_zeros(count, x.shape[1])
    rank = min(count - 1, x.shape[1])
    directions = leading(lost.T.double() @ lost.double(), rank).to(x.dtype)
    projected = lost @ directions
    scale = projected.square().mean(0).sqrt().clamp_min(1e-6 * x.norm() / len(x) ** 0.5)
    corners = simplex(count).to(x)[:, :rank]
    corners = corners / (corners[0] - corners[1]).norm()
    shifts: Tensor = SPLIT * (corners / scale) @ (directions.T @ dropped)
    return shifts


def bank_directions(x: Tensor, dropped: Tensor, count: int) -> Tensor:
    """Directions [count, d] that spread tokens x [n, d] evenly over banks, by the dropped part of x about its mean."""
    centred = x - x.mean(0)
    mean = x.mean(0) / x.mean(0).norm().clamp_min(1e-30)
    lost = centred @ dropped.T
    directions = leading(lost.T.double() @ lost.double(), min(count - 1, x.shape[1])).to(x.dtype)
    rows = directions.T @ dropped
    rows = rows - (rows @ mean).unsqueeze(1) * mean
    scale = (centred @ rows.T).std(0).clamp_min(1e-30)
    shifts: Tensor = BANK_SPLIT * simplex(count).to(x)[:, : len(scale)] @ (rows / scale.unsqueeze(1))
    return shifts
