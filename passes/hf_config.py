"""Keep a transformers model's configuration true after a rewrite, for what reads it: auxiliary loss, saving."""

from __future__ import annotations

import copy
import inspect
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
    _keep_readers(model, {attribute for name in sizes for attribute in _NAMES[name]})
    for holder in holders:
        for name, value in sizes.items():
            for attribute in _NAMES[name]:
                if value is not None and type(vars(holder).get(attribute)) is int:
                    setattr(holder, attribute, value)
    for holder in holders:
        if not isinstance(holder, nn.Module) and len(latent) == 1 and _has_experts(holder):
            holder.latent_dim = latent.copy().pop()


def _keep_readers(model: nn.Module, names: set[str]) -> None:
    """Give modules that read a size from a configuration when they run, MoE blocks that stay, the old one to keep."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is None or hasattr(module, "save_pretrained") or not names & _read_names(type(module)):
            continue
        module.config = copy.deepcopy(config)


def _read_names(kind: type) -> set[str]:
    """Names of the attributes that the methods of a module's class mention, its constructor aside."""
    methods = [
        inspect.unwrap(item)
        for base in kind.__mro__
        if base not in nn.Module.__mro__
        for name, item in vars(base).items()
        if inspect.isfunction(item) and name != "__init__"
    ]
    return {name for method in methods for name in method.__code__.co_names}


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
