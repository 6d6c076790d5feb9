"""Where a difference begins: blocks compared one after the other, each on the inputs that the reference gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from latentize import conversion
from latentize.compare import block_errors
from latentize.comparison import BlockSearch
from latentize.errors import LatentizeError
from latentize.inputs import Batch, Inputs
from latentize.moe import LatentMoE
from latentize.recipe import Recipe
from latentize.sources import Source

#: What is compared with what.
AGAINST_ORIGINAL, IN_ONNXRUNTIME = "rewritten against original", "onnxruntime against PyTorch"
#: Batches that blocks are compared on.
_BATCHES = 2


def against_original(
    source: Source, blocks: Mapping[str, LatentMoE], batches: Sequence[Batch], tolerance: float | None
) -> BlockSearch:
    """Each rewritten block against the original's, on the original's own inputs; sums are held, no activations.

    Blocks differ by design unless ℓ = d, so without a `tolerance` all are compared and none is over it.

    Args:
        source: the original; its blocks are looked for again.
        blocks: the rewritten ones, by the names of the original's.
        batches: what the original reads; a few of them.
        tolerance: largest relative error.
    """
    used = batches[:_BATCHES]
    leading = [tensor for batch in used if (tensor := Inputs.of(batch).leading()) is not None]
    tokens = sum(len(t) if t.is_floating_point() and t.ndim == 2 else t.shape[0] * t.shape[1] for t in leading)
    survey = conversion.survey(source.model, source.args, source.kwargs, Recipe(include=tuple(blocks)))
    teacher = conversion.canonical(source.model, survey.selected)
    missing = [name for name in blocks if name not in teacher.blocks]
    errors = block_errors(teacher.blocks, blocks, teacher.model, used)
    over = [name for name, error in errors.items() if tolerance is not None and not error <= tolerance]
    note = f"{', '.join(missing)}: not found again in the original" if missing else ""
    if over:
        errors = {name: errors[name] for name in list(errors)[: list(errors).index(over[0]) + 1]}
    return BlockSearch(AGAINST_ORIGINAL, tokens, tolerance, errors, over[0] if over else "", note)


def in_onnxruntime(path: Path, model: nn.Module, inputs: Inputs, tokens: int, tolerance: float) -> BlockSearch:
    """Each block of the exported graph against the rewritten model, until one is over the tolerance."""
    from latentize.exporters import onnx_blocks

    what = IN_ONNXRUNTIME
    try:
        errors, first = onnx_blocks.block_errors(path, model, inputs, tolerance)
    except LatentizeError as error:
        return BlockSearch(what, tokens, tolerance, {}, note=str(error))
    return BlockSearch(what, tokens, tolerance, errors, first)
