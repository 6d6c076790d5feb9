"""Blocks to prove a lift with, in little memory: a few tokens at a time; N and k multiplied without copies."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from latentize import rescale
from latentize.moe import LatentExperts, LatentMoE
from latentize.spec import MoESpec

#: Tokens whose experts are computed together.
TOKENS = 64


def multiplied(spec: MoESpec, factor: int) -> LatentMoE:
    """What `rescale.expand(spec, factor, factor)` computes, to rounding: its router, and experts that copies share."""
    rescale.check_factors(spec, factor, factor)
    block = LatentMoE(spec if factor == 1 else replace(spec, router=rescale.copy_router(spec, factor, factor)))
    block.experts = _Siblings(spec, factor)
    return block


class _Siblings(LatentExperts):
    """Child c of expert e is number c * N + e and computes as expert e; identity experts come after all children."""

    def __init__(self, spec: MoESpec, copies: int) -> None:
        super().__init__(spec)
        self._copies = copies

    def forward(self, hidden: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """As that of `LatentExperts`, on the children's numbers."""
        assert self.up is not None
        real = len(self.up)
        return super().forward(hidden, torch.where(indices < self._copies * real, indices % real, real), weights)

    def combine(self, latent: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """As that of `LatentExperts`; weights on the input are whole, so that outputs are divided instead."""
        parts = zip(latent.split(TOKENS), indices.split(TOKENS), weights.split(TOKENS), strict=True)
        combined = torch.cat([super(_Siblings, self).combine(*part) for part in parts])
        return combined / self._copies if self.weights_on_input else combined
