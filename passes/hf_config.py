"""Keep a transformers model's configuration true after a rewrite, for what reads it: auxiliary loss, saving."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from latentize.moe import LatentMoE
from latentize.spec import MoESpec

#: What transformers configurations call the sizes that a rewrite changes.
_NAMES = {
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"),
    "top_k": (
        "num_experts_per_tok",
        "num_experts_per_token",
        "moe_topk",
        "moe_top_k",
        "moe_k",
        "top_k_experts",
        "top_k",
    ),
    "group_count": ("n_group", "num_expert_group"),
    "group_kept": ("topk_group",),
}


def update(model: nn.Module, blocks: Sequence[LatentMoE]) -> None:
    """Write N, k, groups and the latent size of the new blocks into the model's configurations, in place.

    Nothing is written when the blocks differ in a size: no one number would be true.
    """
    if not blocks:
        return
    specs = [block.spec for block in blocks]
    sizes = {name: values.pop() for name in _NAMES if len(values := {_size(spec, name) for spec in specs}) == 1}
    latent = {spec.latent_dim for spec in specs if spec.latent is not None}
    holders = list(_holders(model))
    for holder in holders:
        for name, value in sizes.items():
            for attribute in _NAMES[name]:
                if value is not None and type(vars(holder).get(attribute)) is int:
                    setattr(holder, attribute, value)
    for holder in holders:
        if not isinstance(holder, nn.Module) and len(latent) == 1 and _has_experts(holder):
            holder.latent_dim = latent.copy().pop()


def _size(spec: MoESpec, name: str) -> int | None:
    groups = spec.router.groups
    return {
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "group_count": None if groups is None else groups.count,
        "group_kept": None if groups is None else groups.kept,
    }[name]


def _has_experts(config: Any) -> bool:
    return any(name in vars(config) for name in _NAMES["num_experts"])


def _holders(model: nn.Module) -> Iterator[Any]:
    """Configurations of the model and its sub-models, and the sub-models themselves, which may keep copies of sizes."""
    seen: set[int] = set()
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is None or not hasattr(config, "to_dict") or not hasattr(module, "save_pretrained"):
            continue
        yield module
        stack = [config]
        while stack:
            item = stack.pop()
            if id(item) in seen:
                continue
            seen.add(id(item))
            yield item
            stack += [v for v in vars(item).values() if hasattr(v, "to_dict") and hasattr(v, "model_type")]
