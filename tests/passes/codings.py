"""Every coding of the zoo: MOES must be lifted exactly, NOT_MOES refused, EITHER lifted exactly or refused."""

from __future__ import annotations

import codings_around
import codings_dispatch
import codings_near
import codings_others
import codings_others_near
import codings_refused
import codings_routing
import codings_storage
import codings_strangers
import torch
from codings_base import EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, Coding, example
from torch import Tensor, nn

__all__ = ["EITHER", "EXPERTS", "HIDDEN", "INTERMEDIATE", "MOES", "NOT_MOES", "TOP_K", "build", "call", "example"]

_ALL: dict[str, type[Coding]] = {
    **codings_storage.MOES, **codings_routing.MOES, **codings_dispatch.MOES, **codings_around.MOES,
    **codings_near.MOES, **codings_strangers.MOES, **codings_others.MOES,
}  # fmt: skip
#: Standard MoEs that are refused today, and never lifted wrongly.
REFUSED_TODAY: frozenset[str] = frozenset()
MOES = {name: case for name, case in _ALL.items() if name not in REFUSED_TODAY}
NOT_MOES: dict[str, type[Coding]] = {
    **codings_refused.NOT_MOES, **codings_near.NOT_MOES, **codings_strangers.NOT_MOES,
    **codings_others_near.NOT_MOES,
}  # fmt: skip
EITHER: dict[str, type[Coding]] = {
    **codings_refused.EITHER, **codings_near.EITHER, **codings_strangers.EITHER, **codings_others_near.EITHER,
    **{name: _ALL[name] for name in sorted(REFUSED_TODAY)},
}  # fmt: skip


def build(case: type[Coding], seed: int = 0) -> Coding:
    """The case in eval mode with seeded weights."""
    torch.manual_seed(seed)
    return case().eval()


def call(case: type[Coding], model: nn.Module, x: Tensor) -> Tensor:
    """Main output [B, T, ...] of `model`, a case or what became of it, for hidden states x [B, T, d]."""
    args, kwargs = case.arguments(x.clone())
    return case.hidden_first(model(*args, **kwargs))
