"""How evenly a router spreads tokens over its experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentize.inputs import Batch, Inputs, observing
from latentize.moe import LatentMoE
from latentize.routing import Routing


@dataclass(frozen=True)
class ExpertLoad:
    """Selections per expert over some tokens.

    `counts` has one entry per expert and sums to tokens · k; `max_over_mean` and `min_over_mean` compare the busiest
    and the idlest expert with an even spread; `entropy` is that of the shares over log N: 1 is even, 0 is one expert
    alone; `dead` experts were never selected.
    """

    tokens: int
    counts: tuple[int, ...]
    max_over_mean: float
    min_over_mean: float
    entropy: float
    dead: int

    @classmethod
    def of(cls, counts: Sequence[int], tokens: int) -> ExpertLoad:
        """The load that `counts` [N] describe."""
        total = sum(counts)
        mean = total / len(counts) if counts else 0.0
        shares = [count / total for count in counts if count] if total else []
        entropy = -sum(share * math.log(share) for share in shares)
        return cls(
            tokens=tokens,
            counts=tuple(int(count) for count in counts),
            max_over_mean=max(counts) / mean if mean else 0.0,
            min_over_mean=min(counts) / mean if mean else 0.0,
            entropy=entropy / math.log(len(counts)) if len(counts) > 1 else 1.0,
            dead=sum(count == 0 for count in counts),
        )


def expert_load(model: nn.Module, blocks: Mapping[str, LatentMoE], batches: Iterable[Batch]) -> dict[str, ExpertLoad]:
    """The load of every block of `model` over `batches`; identity experts are left out.

    Args:
        model: runs the batches; its mode and the random state are left as found.
        blocks: name -> the `LatentMoE` inside `model` (canonical or rewritten).
        batches: tuples of args or dicts of kwargs.
    """
    experts = {name: block.spec.num_experts for name, block in blocks.items()}
    counts = {name: torch.zeros(n, dtype=torch.int64) for name, n in experts.items()}
    tokens = dict.fromkeys(blocks, 0)

    def watch(name: str) -> Any:
        def count(_module: nn.Module, _args: Any, routing: Routing) -> None:
            counts[name] += _histogram(routing.indices, experts[name])
            tokens[name] += routing.indices.shape[0]

        return count

    handles = [block.router.register_forward_hook(watch(name)) for name, block in blocks.items()]
    try:
        with observing(model):
            for batch in batches:
                Inputs.of(batch).call(model)
    finally:
        for handle in handles:
            handle.remove()
    return {name: ExpertLoad.of(counts[name].tolist(), tokens[name]) for name in blocks}


def _histogram(indices: Tensor, experts: int) -> Tensor:
    return torch.bincount(indices.reshape(-1), minlength=experts)[:experts].cpu()
