"""Ties: tokens whose selection of experts hangs on rounding, so that two runs of one function may part there."""

from __future__ import annotations

import math
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from latentize.moe import Router
from latentize.routing import Routing, score, selection_scores
from latentize.spec import RouterSpec

#: Selections closer than this are ties, decided by rounding.
TIE = 1e-6


def margin(logits: Tensor, rule: RouterSpec) -> Tensor:
    """How far each token's selection is from a tie: [T], from logits [T, N]; infinite where all are selected."""
    return _margins(logits, rule)[0]


def group_ties(choice: Tensor, scores: Tensor, rule: RouterSpec) -> Tensor:
    """Tokens [T] whose choice of groups is a tie; choice and scores are [T, N]."""
    if rule.groups is None:
        return torch.zeros(len(choice), dtype=torch.bool)
    plain = scores if rule.selection_bias is None else scores + rule.selection_bias
    grouped = plain.unflatten(-1, (rule.groups.count, -1))
    totals = (
        grouped.amax(-1) if rule.groups.score == "max" else grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
    )
    ranked = totals.sort(-1, descending=True).values
    tied: Tensor = (ranked[:, rule.groups.kept - 1] - ranked[:, rule.groups.kept]) < TIE
    return tied


class TieWatch:
    """While entered, notes how close to a tie the routers of a model come; `closest` is relative to the values ranked.

    A model whose outputs differ between two runtimes is not known to differ where `closest` is within rounding.
    """

    def __init__(self, model: nn.Module) -> None:
        self._routers = [module for module in model.modules() if isinstance(module, Router)]
        self._handles: list[Any] = []
        self.closest = math.inf

    def __enter__(self) -> Self:
        self._handles = [router.register_forward_hook(self._note) for router in self._routers]
        return self

    def __exit__(self, _kind: type[BaseException] | None, _e: BaseException | None, _at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, router: Router, _args: Any, routing: Routing) -> None:
        gap, size = _margins(routing.logits.detach().double(), router.spec)
        if len(gap):
            self.closest = min(self.closest, float((gap / size.clamp_min(1e-300)).min()))


def _margins(logits: Tensor, rule: RouterSpec) -> tuple[Tensor, Tensor]:
    """Each token's margin, and the largest of the values that were ranked."""
    capped = logits if rule.softcap is None else rule.softcap * torch.tanh(logits / rule.softcap)
    scores = capped if rule.order == "topk_first" else score(capped, rule.score)
    choice = selection_scores(capped, scores, rule)
    ranked = choice.sort(-1, descending=True).values
    size = choice.masked_fill(choice.isinf(), 0.0).abs().amax(-1)
    if ranked.shape[1] == rule.top_k:
        return torch.full((len(ranked),), math.inf, dtype=torch.float64), size
    gap = (ranked[:, rule.top_k - 1] - ranked[:, rule.top_k]).nan_to_num(nan=math.inf)
    return torch.where(group_ties(capped, scores, rule), torch.zeros_like(gap), gap), size
