"""How much a model's output minds an error in a block's output: the metric of block-wise healing.

To second order, an error Δ [d] of a token's block output moves the output by Δᵀ F Δ, with F the Gauss-Newton matrix of
the output's distance (for logits the Fisher matrix of the model's own predictions; Martens, "New insights and
perspectives on the natural gradient method", 2020, section 9). Its mean over tokens is estimated from one random
backward pass a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentize.compare import main_output
from latentize.distill import OutputLoss
from latentize.inputs import Batch, Inputs
from latentize.moe import LatentMoE

#: Share of the plain squared error in the metric, so that no direction is free.
PLAIN = 0.1


def output_metrics(
    model: nn.Module, blocks: Mapping[str, LatentMoE], batches: Iterable[Batch], loss: OutputLoss, seed: int
) -> dict[str, Tensor]:
    """A root R [d, d] (fp32) per block: ‖Δ R‖² measures an error Δ [T, d] of its output; RRᵀ has trace d.

    Args:
        model: the teacher.
        blocks: its blocks by name; one that does not reach the output gets the identity.
        batches: a few batches; those whose gradients are not finite are left out.
        loss: how outputs are compared.
        seed: of the random directions.
    """
    moments: dict[str, Tensor] = {}
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        for batch in batches:
            for name, gradient in _gradients(model, blocks, batch, loss).items():
                wide = gradient.double()
                if bool(wide.isfinite().all()):
                    moments[name] = moments.get(name, 0) + wide.T @ wide
    return {name: _root(moments.get(name), block) for name, block in blocks.items()}


def _gradients(
    model: nn.Module, blocks: Mapping[str, LatentMoE], batch: Batch, loss: OutputLoss
) -> dict[str, Tensor]:
    """Gradients [T, d] of a random functional of the output with respect to every block's output."""
    probes: dict[str, list[Tensor]] = {name: [] for name in blocks}

    def watch(name: str) -> Any:
        def shift(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
            probe = torch.zeros_like(output, requires_grad=True)
            probes[name].append(probe)
            return output + probe

        return shift

    handles = [block.experts.register_forward_hook(watch(name)) for name, block in blocks.items()]
    try:
        output = main_output(Inputs.of(batch).call(model))[0]
    finally:
        for handle in handles:
            handle.remove()
    leaves = [probe for parts in probes.values() for probe in parts]
    found = iter(torch.autograd.grad(_functional(output, loss), leaves, allow_unused=True))
    gradients = {name: [g for g in (next(found) for _ in parts) if g is not None] for name, parts in probes.items()}
    return {n: torch.cat([g.reshape(-1, g.shape[-1]) for g in parts]) for n, parts in gradients.items() if parts}


def _functional(output: Tensor, loss: OutputLoss) -> Tensor:
    """A scalar whose gradient with respect to the output has the Hessian of the distance as its second moment."""
    wide = output.to(torch.promote_types(output.dtype, torch.float32))
    if loss.kind == "mse":
        return (wide * torch.randn_like(wide)).sum()
    logits = wide.flatten(0, -2)
    drawn = torch.multinomial(logits.detach().softmax(-1), 1).squeeze(1)
    return F.cross_entropy(logits, drawn, reduction="sum")


def _root(moment: Tensor | None, block: LatentMoE) -> Tensor:
    spec = block.spec
    size, device = spec.hidden_size, spec.experts.up.device
    eye = torch.eye(size, dtype=torch.float64, device=device)
    trace = 0.0 if moment is None else float(moment.trace())
    if moment is None or trace <= 0.0:
        return eye.float()
    values, vectors = torch.linalg.eigh((1 - PLAIN) * size / trace * moment + PLAIN * eye)
    root: Tensor = vectors * values.clamp_min(0.0).sqrt()
    return root.float()
