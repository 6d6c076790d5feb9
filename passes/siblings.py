"""Blocks to prove a lift with, in little memory: a few tokens at a time; N and k multiplied without copies."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from latentize import rescale
from latentize.moe import LatentExperts, LatentMoE, Router
from latentize.spec import MoESpec

#: Tokens whose experts are computed together.
TOKENS = 64


def multiplied(spec: MoESpec, factor: int) -> LatentMoE:
    """What `rescale.expand(spec, factor, factor)` computes, to rounding: its router, and experts that copies share."""
    rescale.check_factors(spec, factor, factor)
    block = LatentMoE(spec if factor == 1 else replace(spec, router=rescale.copy_router(spec, factor, factor)))
    block.experts = _Siblings(spec, factor)
    return block


def renumbered(spec: MoESpec, factor: int) -> LatentMoE:
    """`multiplied`, with the children of an expert, or of a group of them, one after the other.

    In `multiplied` the first N children are the N experts, so that code which counts on there being N finds what it
    did; here it finds something else.
    """
    block = multiplied(spec, factor)
    rule, real = block.router.spec, spec.num_experts
    unit = 1 if spec.router.groups is None else len(rule.weight) // (spec.router.groups.count * factor)
    order = torch.arange(factor * real).view(factor, real // unit, unit).transpose(0, 1).reshape(-1)
    order = torch.cat([order, torch.arange(len(order), len(rule.weight))])

    def moved(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[order.to(tensor.device)]

    rule = replace(
        rule, weight=rule.weight[order.to(rule.weight.device)], bias=moved(rule.bias),
        selection_bias=moved(rule.selection_bias), per_expert_scale=moved(rule.per_expert_scale),
    )  # fmt: skip
    block.router = Router(rule)
    block.experts = _Siblings(spec, factor, order)
    return block


class _Siblings(LatentExperts):
    """Child c of expert e is number c * N + e and computes as expert e; identity experts come after all children.

    With `order` [αN] number i is what would be number `order[i]`.
    """

    def __init__(self, spec: MoESpec, copies: int, order: Tensor | None = None) -> None:
        super().__init__(spec)
        self._copies = copies
        self._order = order

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """As that of `LatentExperts`, on the children's numbers."""
        assert self.up is not None
        real = len(self.up)
        if self._order is not None:
            indices = self._order.to(indices.device)[indices]
        return super().forward(hidden, torch.where(indices < self._copies * real, indices % real, real), weights)

    def combine(self, latent: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """As that of `LatentExperts`; weights on the input are whole, so that outputs are divided instead."""
        parts = zip(latent.split(TOKENS), indices.split(TOKENS), weights.split(TOKENS), strict=True)
        combined = torch.cat([super(_Siblings, self).combine(*part) for part in parts])
        return combined / self._copies if self.weights_on_input else combined
