"""One room per step from a model to its rewritten form: scan, capture, detect, lift, place, verify, rewrite."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from torch import fx, nn

from latentize import ops
from latentize.moe import LatentMoE
from latentize.passes import hf_config, sites
from latentize.passes.counting import Surroundings
from latentize.passes.find import Found, find_blocks
from latentize.passes.in_training import lost_in_training
from latentize.passes.latentize_pass import LatentizePass
from latentize.passes.probes import Inputs
from latentize.passes.rewrite import replace_at

__all__ = [
    "Found",
    "LatentizePass",
    "find_blocks",
    "find_lost",
    "replace_blocks",
    "replace_blocks_from_sites",
    "site_to_json",
]


def replace_blocks(
    model: nn.Module, found: Sequence[Found], modules: Mapping[str, LatentMoE], *, inplace: bool = False
) -> nn.Module:
    """The model with each block named in `modules` replaced by its module.

    Args:
        model: the model that `found` was found in.
        found: what `find_blocks` returned.
        modules: new blocks by block name.
        inplace: rewrite `model` itself instead of a copy that shares its tensors.
    """
    places = {item.block.name: item.site for item in found if item.site is not None}
    templates = {item.block.name: item.template for item in found if item.template is not None}
    return _replace(model, places, modules, templates, inplace=inplace)


def find_lost(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], found: Sequence[Found], *, grows: bool
) -> tuple[list[str], str]:
    """What the code in and around blocks does that it will not do, or not in the same sense, once they are replaced.

    Args:
        model: the model that `found` was found in, in evaluation mode; its buffers are the caller's to keep.
        args, kwargs: example inputs of its forward.
        found: the blocks that will be replaced.
        grows: whether one of them will have more experts, or select more.

    Returns:
        A line for each loss, and the model's output that would be another function; "" where none would.
    """
    inputs = Inputs("example inputs", args, dict(kwargs))
    places = {item.block.name: item.site for item in found if item.site is not None}
    specs = {item.block.name: item.block.spec for item in found if item.block.spec is not None}
    templates = {item.block.name: item.template for item in found if item.template is not None}
    with ops.plain(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # copying a graph's pytree specs warns of a class of torch's own
        lines = lost_in_training(model, inputs, places)
        counted = Surroundings(model, inputs, places, specs, templates).counting(grows=grows)
    return [*lines, *counted.lines], counted.wrong


def site_to_json(found: Found) -> dict[str, Any]:
    """Where a block sits, as JSON values from which `replace_blocks_from_sites` rebuilds it."""
    assert found.site is not None
    return sites.to_json(found.site)


def replace_blocks_from_sites(
    model: nn.Module, places: Mapping[str, Mapping[str, Any]], modules: Mapping[str, LatentMoE]
) -> nn.Module:
    """Replace blocks of a freshly built model, in place, at sites that were stored; nothing is detected again.

    Args:
        model: the original structure, whatever its weights.
        places: `site_to_json` values by block name.
        modules: new blocks by block name.
    """
    return _replace(model, {name: sites.from_json(place) for name, place in places.items()}, modules, {}, inplace=True)


def _replace(
    model: nn.Module,
    places: Mapping[str, sites.Site],
    modules: Mapping[str, LatentMoE],
    templates: Mapping[str, fx.GraphModule],
    *,
    inplace: bool,
) -> nn.Module:
    result = replace_at(model, places, modules, templates=templates, inplace=inplace)
    hf_config.update(result, list(modules.values()))
    return result
