"""The forms in which published methods hold experts' matrices, and healing in those forms.

A block that runs multiplied out would be healed out of its form: full matrices where the method has factors. While it
is healed, `held` therefore puts the factors in the matrices' place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from latentize.moe import LatentMoE


@dataclass(frozen=True)
class Form:
    """base + left core right, for one kind of matrix of all experts; what is absent is left out.

    `core` [N, a, r] is each expert's own. `left` [b, a] and `base` [b, c] are shared; `right` is shared [r, c], or each
    expert's own [N, r, c], or with `mix` [N, j] the silu of each expert's mixture of j bases [j, r, c].
    """

    core: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    base: Tensor | None = None
    mix: Tensor | None = None

    def dense(self) -> Tensor:
        """The matrices [N, b, c]."""
        found = self.core if self.left is None else self.left @ self.core
        right = self.right
        if self.mix is not None:
            right = torch.nn.functional.silu(torch.einsum("nj,jrc->nrc", self.mix, right))
        found = found if right is None else found @ right
        return found if self.base is None else found + self.base

    def transposed(self) -> Form:
        """The form of the transposed matrices, where neither side is each expert's own."""
        left, right, base = (t if t is None else t.T for t in (self.right, self.left, self.base))
        return Form(self.core.transpose(1, 2), left, right, base)


class _Product(nn.Module):
    """A form as a parametrization of its core."""

    def __init__(self, factors: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        for name, factor in factors.items():
            self.register_parameter(name, factor)

    def forward(self, core: Tensor) -> Tensor:
        return Form(core, **dict(self.named_parameters())).dense()


@contextmanager
def held(blocks: Mapping[str, LatentMoE], forms: Mapping[str, Mapping[str, Form]]) -> Iterator[None]:
    """While it lasts, the blocks' parameters are the factors of their forms; then the products of what became of them.

    Tensors that several matrices of a block share stay shared.
    """
    for block, by_name in forms.items():
        experts, dtype = blocks[block].experts, blocks[block].experts.up.dtype
        known: dict[int, nn.Parameter] = {}
        for name, form in by_name.items():
            there = {f.name: getattr(form, f.name) for f in fields(form)}
            factors = {
                key: known.setdefault(id(t), nn.Parameter(t.to(dtype).contiguous()))
                for key, t in there.items() if t is not None
            }  # fmt: skip
            setattr(experts, name, factors.pop("core"))
            parametrize.register_parametrization(experts, name, _Product(factors), unsafe=True)
    yield
    for block, by_name in forms.items():
        for name in by_name:
            parametrize.remove_parametrizations(blocks[block].experts, name)
