"""Put blocks in place at the boundaries of modules: no graph, nothing but submodules exchanged."""

from __future__ import annotations

from torch import nn

from latentize.moe import LatentMoE
from latentize.passes.blocks import LatentBlock, RoutedExperts, hooked_router
from latentize.passes.sites import PartsSite, WholeSite


def put_parts(model: nn.Module, site: PartsSite, moe: LatentMoE, prefix: nn.Module | None) -> None:
    """Replace a router and its experts, each a submodule of the block at `site.path`, in place.

    `prefix` computes what the router's weight multiplies, where that is not the router's input itself.
    """
    router_path, experts_path = join(site.path, site.router.path), join(site.path, site.experts.path)
    router = hooked_router(model.get_submodule(router_path), moe.router, site.router, prefix)
    experts = RoutedExperts(moe.experts, site.experts)
    experts.training = model.get_submodule(experts_path).training
    _put_here(model, router_path, router)
    _put_here(model, experts_path, experts)


def put_whole(model: nn.Module, site: WholeSite, moe: LatentMoE) -> nn.Module:
    """Replace a module that is nothing but a routed block, in place; returns the model, anew where it is the block."""
    original = model.get_submodule(site.path)
    hooked = None
    if site.router is not None:
        hooked = hooked_router(original.get_submodule(site.router.path), moe.router, site.router, None)
    block = LatentBlock(moe, site, hooked)
    block.training = original.training
    return put(model, site.path, block)


def put(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Replace the module at a path, and wherever else that module is used; an empty path replaces the model."""
    if not path:
        return module
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    old = owner._modules[name]
    for other in model.modules():  # a block that is shared between places is replaced in each
        for key, child in other._modules.items():
            if child is old:
                other._modules[key] = module
    return model


def _put_here(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at a path alone: another block may use the same experts with a router of its own."""
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module


def join(*paths: str) -> str:
    """Paths of modules, one inside the other."""
    return ".".join(p for p in paths if p)
