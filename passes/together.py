"""The last proof: the whole model with all its blocks in canonical form computes what it computed."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn

from latentize.errors import first_line
from latentize.moe import LatentMoE
from latentize.passes.double import in_double
from latentize.passes.probes import Inputs, Prober, in_proportion
from latentize.passes.rewrite import replace_at
from latentize.passes.sites import Site
from latentize.passes.verify import difference, run_double, run_native
from latentize.passes.widened import Widened
from latentize.spec import MoESpec

_log = logging.getLogger(__name__)

#: What is said when an attribute is missing of a module that stands for a block.
_ASKED = re.compile(r"'(?:LatentBlock|RoutedExperts|GraphModule)' object has no attribute ('\w+')")
#: Relative error of a whole model's outputs; rounding and ties may have grown through its layers.
TOGETHER = 2e-2
#: The same in fp64, where nothing but the rounding of weights that are computed from others grows.
TOGETHER_DOUBLE = 1e-4
#: Parameters of a model that is small: it is analysed on one thread, and compared as a whole in fp64.
SMALL = 50_000_000


def disagreement(
    model: nn.Module,
    inputs: Inputs,
    places: Mapping[str, Site],
    specs: Mapping[str, MoESpec],
    templates: Mapping[str, fx.GraphModule],
) -> str:
    """Why the blocks may not be rewritten together, "" where they may.

    The model is asked on its example inputs and on others that it takes, one token and more than it was given.

    Args:
        model: the original.
        inputs: its example inputs.
        places, specs, templates: where the blocks sit, what they compute and the graphs of graph sites, by name.
    """
    if not specs:
        return ""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    exact = is_small(model) and dtypes <= {torch.float32, torch.float64}
    others = Prober.of(model, inputs).others()
    blocks = {name: LatentMoE(spec) for name, spec in specs.items()}
    half = 1.0 if dtypes <= {torch.float32, torch.float64} else 10.0
    try:
        whole = replace_at(model, places, blocks, templates=templates)
        error = _worst(model, whole, [inputs], [] if exact else others, run_native)
        if exact and error <= TOGETHER:
            error = _apart_as_stored(model, whole, inputs, others)
            if not error <= TOGETHER_DOUBLE:
                double = in_double(model)
                wide = {name: LatentMoE(block.spec.to(torch.float64)) for name, block in blocks.items()}
                whole = replace_at(double, places, wide, templates=templates)
                error = _worst(double, whole, [inputs], others, run_double)
    except Exception as failure:  # a captured graph may hold for some sizes only
        _log.debug("running the model in canonical form failed", exc_info=True)
        asked = _ASKED.search(str(failure)) if isinstance(failure, AttributeError) else None
        if asked:
            if "GraphModule" in str(failure):
                return f"the code around it uses {asked[1]} of it, and to be rewritten its module must become a graph"
            return f"the code around it reads {asked[1]} of it, which its forward sets beside what it returns"
        return f"with its blocks in canonical form the whole model does not run: {first_line(failure)}"
    if error <= (TOGETHER_DOUBLE if exact else TOGETHER * half):
        return ""
    return f"with its blocks in canonical form the whole model gives other outputs (relative error {error:.1e})"


def _apart_as_stored(one: nn.Module, other: nn.Module, inputs: Inputs, others: list[Inputs]) -> float:
    """`_worst` in fp64 of models whose weights are widened as they are read; infinite where they do not run so."""
    widened = Widened()
    try:
        return _worst(widened.copy(one), widened.copy(other), [inputs], others, run_double)
    except Exception:  # then on copies in fp64
        _log.debug("running the model on weights as they are stored failed", exc_info=True)
        return math.inf


def _worst(
    one: nn.Module, other: nn.Module, given: list[Inputs], others: list[Inputs], run: Callable[..., list[Tensor]]
) -> float:
    """Largest relative difference of two models on given inputs, and on those of `others` that the first one takes."""
    seen = [run(one, item) for item in given]
    errors = [difference(wanted, run(other, item)) for wanted, item in zip(seen, given, strict=True)]
    for item in others:
        try:
            wanted = run(one, item)
        except Exception:  # sizes that this model does not take
            _log.debug("not a size for this model: %s", item.name)
            continue
        stretched = isinstance(one, fx.GraphModule) and not in_proportion(item, wanted, given[0], seen[0])
        try:
            found = run(other, item)
        except Exception:
            if not stretched:
                raise
            continue
        if not stretched or [t.shape for t in wanted] == [t.shape for t in found]:
            errors.append(difference(wanted, found))
    return max(errors)


def is_small(model: nn.Module) -> bool:
    """Whether a model has few parameters."""
    return sum(p.numel() for p in model.parameters()) < SMALL
