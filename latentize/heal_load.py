"""Expert load while healing: watching the routers of a model, and pushing starved experts back into use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from latentize.moe import LatentMoE
from latentize.routing import Routing, score
from latentize.spec import RouterSpec

#: A starved expert is pushed until it gets this multiple of the least load, so that it stays above it.
_MARGIN = 2.0
#: How fast the running shares follow: the weight of the latest step.
_FOLLOW = 0.1


class RoutingTap:
    """While entered, collects what the routers of some blocks decide. `take` and `counts` empty it."""

    def __init__(self, blocks: Mapping[str, LatentMoE]) -> None:
        self._blocks = blocks
        self._seen: dict[str, list[Routing]] = {name: [] for name in blocks}
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        for name, block in self._blocks.items():
            self._handles.append(block.router.register_forward_hook(self._watch(name)))
        return self

    def __exit__(self, _kind: type[BaseException] | None, _e: BaseException | None, _at: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _watch(self, name: str) -> Any:
        def keep(_module: nn.Module, _args: Any, routing: Routing) -> None:
            self._seen[name].append(routing)

        return keep

    def take(self) -> dict[str, list[Routing]]:
        """What each router decided since the last time, gradients attached."""
        seen, self._seen = self._seen, {name: [] for name in self._blocks}
        return seen

    def counts(self) -> dict[str, Tensor]:
        """Selections [N] of each block's experts since the last time."""
        return {name: count(routings, self._blocks[name].spec.num_experts) for name, routings in self.take().items()}


def count(routings: Sequence[Routing], num_experts: int) -> Tensor:
    """Selections [N] int64 of the real experts over some routings."""
    total = torch.zeros(num_experts, dtype=torch.int64)
    for routing in routings:
        total += torch.bincount(routing.indices.reshape(-1), minlength=num_experts)[:num_experts].cpu()
    return total


def starved_experts(counts: Sequence[int], min_load: float) -> int:
    """How many experts get less than `min_load` of the mean load."""
    mean = sum(counts) / max(1, len(counts))
    return sum(value < min_load * mean for value in counts)


def follow(share: Tensor, counts: Tensor) -> Tensor:
    """Running shares [N] of the load after a step with `counts` [N]."""
    return torch.lerp(share, counts.to(share.dtype) / max(1, int(counts.sum())), _FOLLOW)


def pressure(routings: Sequence[Routing], router: RouterSpec, share: Tensor, min_load: float) -> Tensor | None:
    """A loss that lifts starved experts over the selection threshold on the tokens nearest to it; None without any.

    A token's threshold is the selection value of its last selected expert. Each starved expert is pushed towards it, as
    a hinge in units of the values' spread, on as many of its nearest tokens as it lacks.

    Args:
        routings: a router's decisions on T tokens in each of its calls, with gradients; their losses add up.
        router: its rule.
        share: [N] running shares of the load.
        min_load: the least load over the mean load.
    """
    experts = share.shape[0]
    target = _MARGIN * min_load / experts
    starved = (share < target).nonzero().flatten().tolist()
    if not starved or not routings:
        return None
    return torch.stack([_shortfall(routing, router, starved, target) for routing in routings]).sum()


def _shortfall(routing: Routing, router: RouterSpec, starved: Sequence[int], target: float) -> Tensor:
    """How far the experts `starved` are from a share `target` of the load in one call."""
    values = selection_values(routing.logits, router)
    threshold = values.gather(-1, routing.indices).amin(-1).detach()
    spread = values.detach().std().clamp_min(1e-6)
    tokens = max(1, min(len(threshold), round(target * routing.indices.numel())))
    hinges = []
    for expert in starved:
        short = (threshold - values[:, expert]) / spread
        nearest = short.detach().topk(tokens, largest=False).indices
        hinges.append((short[nearest] + 0.1).relu().mean())
    return torch.stack(hinges).mean()


def selection_values(logits: Tensor, router: RouterSpec) -> Tensor:
    """Values [T, N] in whose order experts are selected, groups aside; logits where the score keeps their order."""
    if router.selection_bias is None:
        return logits
    on_logits = router.order == "topk_first" or router.selection_bias_on == "logit"
    values = logits if on_logits else score(logits, router.score)
    return values + router.selection_bias.to(values.dtype)
