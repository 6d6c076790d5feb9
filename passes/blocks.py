"""The modules that stand where a block stood: they keep its call signature and its output's structure."""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor, nn

from latentize.moe import LatentExperts, LatentMoE, Router
from latentize.passes.sites import ExpertsCall, Output, RouterCall, Structure, WholeSite, build, check_fixed
from latentize.routing import Routing, route, score


class RoutedExperts(nn.Module):
    """Stands for a submodule called with hidden states, selected experts and weights."""

    def __init__(self, experts: LatentExperts, call: ExpertsCall) -> None:
        super().__init__()
        self.experts = experts
        self._call = call

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The routed output, [*hidden.shape] or [T, d] as the original returned it."""
        check_fixed(self._call.fixed, args, kwargs, "an MoE's experts module")
        hidden: Tensor = self._call.hidden.pick(args, kwargs)
        indices: Tensor = self._call.indices.pick(args, kwargs)
        weights: Tensor = self._call.weights.pick(args, kwargs)
        flat = hidden.reshape(-1, hidden.shape[-1])
        k = indices.shape[-1]
        routed: Tensor = self.experts(flat, indices.reshape(-1, k), weights.reshape(-1, k))
        return routed.view(hidden.shape) if self._call.like_hidden else routed


def parts_of(routing: Routing, router: Router, structure: Structure) -> dict[str, Tensor]:
    """The tensors [T, width] that `structure` asks of a routing."""
    wanted = {item.item for item in structure.items if hasattr(item, "item")}  # type: ignore[union-attr]
    parts: dict[str, Tensor] = {"logits": routing.logits, "weights": routing.weights, "indices": routing.indices}
    rule = router.spec
    if "scores" in wanted:
        parts["scores"] = score(routing.logits, rule.score)
    if "dense" in wanted:
        parts["dense"] = torch.zeros_like(routing.logits).scatter(-1, routing.indices, routing.weights)
    return parts


def _forward_router(self: Any, *args: Any, **kwargs: Any) -> Any:
    call: RouterCall = self._latentize_call
    check_fixed(call.fixed, args, kwargs, "an MoE's router")
    hidden: Tensor = call.hidden.pick(args, kwargs)
    seen = hidden if self.prefix is None else _first(self.prefix(hidden))
    routing: Routing = self.router(seen.reshape(-1, seen.shape[-1]))
    return build(call.output, parts_of(routing, self.router, call.output), tuple(hidden.shape[:-1]))


def _first(value: Any) -> Tensor:
    result: Tensor = value[0] if isinstance(value, (tuple, list)) else value
    return result


@functools.cache
def _hooked_class(base: type[nn.Module]) -> type[nn.Module]:
    """A class that looks like `base` and computes with `hooked_router`'s router; its objects are stored by `base`."""
    return type(
        base.__name__, (base,),
        {
            "forward": _forward_router, "__module__": base.__module__, "__doc__": base.__doc__,
            "extra_repr": lambda _self: "", "__reduce_ex__": lambda self, _protocol: (_again, (base, self.__dict__)),
        },
    )  # fmt: skip


def _again(base: type[nn.Module], state: dict[str, Any]) -> nn.Module:
    """A hooked router from what it was stored as."""
    cls = _hooked_class(base)  # type: ignore[arg-type]
    hooked: nn.Module = cls.__new__(cls)
    hooked.__dict__.update(state)
    return hooked


def hooked_router(original: nn.Module, router: Router, call: RouterCall, prefix: nn.Module | None) -> nn.Module:
    """A router that hooks on the original's class, and hooks on the original itself, still find.

    It is an instance of a subclass of the original's class, returns what the original returned, and computes it with
    `router`. `prefix` computes what the router's weight multiplies, where that is not the input itself.
    """
    subclass = _hooked_class(type(original))  # type: ignore[arg-type]
    hooked = copy.copy(original)
    hooked.__dict__ = dict(original.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        hooked.__dict__[name] = type(original.__dict__[name])()
    hooked.__class__ = subclass
    hooked.router = router
    hooked.prefix = prefix  # type: ignore[assignment]
    hooked._latentize_call = call  # type: ignore[assignment]
    return hooked


def routing_of(output: Any, router: nn.Module) -> Routing:
    """The routing behind what a router module returned, `Router` itself or one made by `hooked_router`."""
    if isinstance(output, Routing):
        return output
    structure: Structure = router._latentize_call.output  # type: ignore[union-attr, assignment]
    values = (
        list(output.values()) if isinstance(output, dict) else [output] if isinstance(output, Tensor) else list(output)
    )
    found = {
        item.item: value.reshape(-1, value.shape[-1]) / item.factor
        if item.factor != 1.0
        else value.reshape(-1, value.shape[-1])
        for item, value in zip(structure.items, values, strict=True)
        if isinstance(item, Output)
    }
    if "weights" in found and "indices" in found:
        logits = found.get("logits", found["weights"])
        return Routing(logits, found["weights"], found["indices"])
    return route(found["logits"], router.router.spec)  # type: ignore[union-attr, arg-type]


class LatentBlock(nn.Module):
    """Stands for a module that was nothing but a routed block."""

    def __init__(self, moe: LatentMoE, site: WholeSite, hooked: nn.Module | None = None) -> None:
        super().__init__()
        self.experts = moe.experts
        self.router: nn.Module = moe.router if hooked is None else hooked
        self._site = site

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's output in the original's structure."""
        check_fixed(self._site.fixed, args, kwargs, "an MoE block")
        hidden: Tensor = self._site.hidden.pick(args, kwargs)
        flat = hidden.reshape(-1, hidden.shape[-1])
        routing = routing_of(self.router(flat), self.router)
        rule = self.router if isinstance(self.router, Router) else self.router.router
        parts = parts_of(routing, rule, self._site.output)  # type: ignore[arg-type]
        parts["routed"] = self.experts(flat, routing.indices, routing.weights)
        return build(self._site.output, parts, tuple(hidden.shape[:-1]))
