"""Where a difference begins: blocks compared one after the other, each on the inputs that the reference gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from latentize import conversion
from latentize.compare import block_errors
from latentize.comparison import BlockSearch
from latentize.conversion import Rewritten
from latentize.errors import LatentizeError
from latentize.inputs import Batch, Inputs
from latentize.moe import LatentMoE
from latentize.recipe import Recipe
from latentize.sources import Source
from latentize.ties import TieWatch

#: What is compared with what.
AGAINST_ORIGINAL, IN_ONNXRUNTIME = "rewritten against original", "onnxruntime against PyTorch"
#: Batches that blocks are compared on.
_BATCHES = 2


def canonical_original(source: Source, blocks: Mapping[str, LatentMoE]) -> Rewritten:
    """The original with the blocks that became `blocks`, looked for again, in canonical form."""
    survey = conversion.survey(source.model, source.args, source.kwargs, Recipe(include=tuple(blocks)))
    return conversion.canonical(source.model, survey.selected)


def against_original(
    teacher: Rewritten, blocks: Mapping[str, LatentMoE], batches: Sequence[Batch], tolerance: float | None
) -> BlockSearch:
    """Each rewritten block against the original's, on the original's own inputs; sums are held, no activations.

    Blocks differ by design unless ℓ = d, so without a `tolerance` all are compared and none is over it.

    Args:
        teacher: the original in canonical form.
        blocks: the rewritten ones, by the names of the original's.
        batches: what the original reads; a few of them.
        tolerance: largest relative error.
    """
    used = batches[:_BATCHES]
    leading = [tensor for batch in used if (tensor := Inputs.of(batch).leading()) is not None]
    tokens = sum(len(t) if t.is_floating_point() and t.ndim == 2 else t.shape[0] * t.shape[1] for t in leading)
    missing = [name for name in blocks if name not in teacher.blocks]
    errors = block_errors(teacher.blocks, blocks, teacher.model, used)
    over = [name for name, error in errors.items() if tolerance is not None and not error <= tolerance]
    note = f"{', '.join(missing)}: not found again in the original" if missing else ""
    if over:
        errors = {name: errors[name] for name in list(errors)[: list(errors).index(over[0]) + 1]}
    return BlockSearch(AGAINST_ORIGINAL, tokens, tolerance, errors, over[0] if over else "", note)


def in_onnxruntime(
    path: Path, model: nn.Module, calls: Sequence[Inputs], tokens: int, tolerance: float
) -> BlockSearch:
    """Each block of the exported graph against the rewritten model, until one is over the tolerance.

    That is the first of `calls`, unless it leads to a block over the tolerance and a router's choice in it is a tie
    within the tolerance, which rounding decides: then it is the next.
    """
    from latentize.exporters import onnx_blocks

    for inputs in calls:
        try:
            with TieWatch(model) as ties:
                errors, first = onnx_blocks.block_errors(path, model, inputs, tolerance)
        except LatentizeError as error:
            return BlockSearch(IN_ONNXRUNTIME, tokens, tolerance, {}, note=str(error))
        if not first or ties.closest > tolerance:
            return BlockSearch(IN_ONNXRUNTIME, tokens, tolerance, errors, first)
    note = "in every sequence that leads to a block over the tolerance a router's choice is a tie that rounding decides"
    return BlockSearch(IN_ONNXRUNTIME, tokens, tolerance, {}, note=note)
