"""The metric of block-wise healing: an error in a block's output counts as much as the model's output minds it.

To second order, an error Δ [d] of a token's block output moves the model's output by Δᵀ F Δ, F being the Gauss-Newton
matrix of the output's distance (for logits the Fisher matrix of the model's own predictions; Martens, "New insights and
perspectives on the natural gradient method", 2020, section 9). `latentize.sensitivity` estimates its mean over tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from latentize.inputs import Batch, Inputs
from latentize.moe import LatentMoE
from latentize.sensitivity import Sensitivity

#: Share of the plain squared error in the metric, so that no direction is free.
PLAIN = 0.1
#: Tokens that the metric is estimated from.
_TOKENS = 16384


def output_metrics(
    model: nn.Module, blocks: Mapping[str, LatentMoE], batches: Iterable[Batch], seed: int
) -> dict[str, Tensor]:
    """A root R [d, d] (fp32) per block: ‖Δ R‖² measures an error Δ [T, d] of its output; RRᵀ has trace d.

    Args:
        model: the teacher.
        blocks: its blocks by name; one that no gradient reaches gets the identity.
        batches: a few batches.
        seed: of the random directions.
    """
    sensitivity = Sensitivity(model, blocks, _TOKENS, seed)
    for batch in batches:
        if sensitivity.done:
            break
        inputs = Inputs.of(batch)
        sensitivity.add(inputs.args, inputs.kwargs)
    return {name: metric_root(sensitivity.result(name), block) for name, block in blocks.items()}


def metric_root(moment: Tensor | None, block: LatentMoE) -> Tensor:
    """The root of (1 - PLAIN) · moment, scaled to trace d, + PLAIN · I; of I where there is no moment."""
    spec = block.spec
    size, device = spec.hidden_size, spec.experts.up.device
    eye = torch.eye(size, dtype=torch.float64, device=device)
    if moment is None:
        return eye.float()
    scaled = moment.to(device) * (size / float(moment.trace()))
    values, vectors = torch.linalg.eigh((1 - PLAIN) * scaled + PLAIN * eye)
    root: Tensor = vectors * values.clamp_min(0.0).sqrt()
    return root.float()
