"""How much the model's answer cares about each direction of a block's routed output: mean g gᵀ of its gradients.

For a model that gives logits this is the Fisher information of its own predictions with respect to the routed output
(gradients of the log-likelihood of labels drawn from the model itself), so that ½ eᵀ S e is the divergence that a small
error e costs; for any other model it is the mean of Jᵀ J over its outputs, probed with Gaussian directions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from latentize.inputs import Inputs
from latentize.moe import LatentMoE

#: What half an error's mean square in this metric is: "divergence" of predictions in nats, or a change of the "output".
LossKind = Literal["divergence", "output"]


class Sensitivity:
    """Streams mean g gᵀ for every block. A model without gradients ends it, with the reason in `failure`."""

    def __init__(self, model: nn.Module, blocks: Mapping[str, LatentMoE], max_tokens: int, seed: int) -> None:
        self.model, self.blocks = model, blocks
        self.max_tokens = max_tokens
        self.generator = torch.Generator().manual_seed(seed)
        self.tokens = 0
        self.failure = ""
        self.kind: LossKind = "output"
        self._positions = 0
        self._energy = 0.0
        self._sums: dict[str, Tensor] = {}
        self._counts = dict.fromkeys(blocks, 0)

    @property
    def done(self) -> bool:
        """Whether enough tokens were seen, or no gradient can be had."""
        return bool(self.failure) or self.tokens >= self.max_tokens

    def add(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """One forward and backward; the model's parameters get no gradients.

        Returns:
            The squared length [T] of every token's gradient, for each call of each block that a gradient reached.
        """
        try:
            gradients = self._gradients(args, kwargs)
        except (RuntimeError, NotImplementedError, TypeError, ValueError, MemoryError) as error:
            self.failure = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return {}
        self.tokens += max((sum(map(len, calls)) for calls in gradients.values()), default=0)
        if not gradients:
            self.failure = "its output does not depend on any block through differentiable operations"
        for name, calls in gradients.items():
            for g in calls:
                self._sums[name] = self._sums.get(name, 0.0) + g.T @ g
                self._counts[name] += len(g)
        return {name: [g.square().sum(-1) for g in calls] for name, calls in gradients.items()}

    def result(self, name: str) -> Tensor | None:
        """Mean g gᵀ [d, d] in fp64 of one block; None where no gradient reached it."""
        total = self._sums.get(name)
        return None if total is None or not total.trace() > 0 else total / self._counts[name]

    def loss_scale(self, name: str) -> float:
        """What half of a block's mean eᵀ S e is divided by to give the loss.

        That is nats per position of the model's output, or its squared error relative to its own square.
        """
        count = max(1, self._counts[name])
        return (self._positions if self.kind == "divergence" else 0.5 * self._energy) / count or 1.0

    def _gradients(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """Gradients [T, d] in fp64 at the output of each call of each block; blocks with any missing are left out."""
        outputs: dict[str, list[Tensor]] = {name: [] for name in self.blocks}
        with torch.enable_grad(), _frozen(self.model), _exposed(self.blocks, outputs):
            answer = _answer(Inputs(args, kwargs).call(self.model))
            if answer is None or not answer.requires_grad:
                return {}
            direction = self._direction(answer.detach(), (*args, *kwargs.values()))
            wanted = [tensor for tensors in outputs.values() for tensor in tensors]
            found = iter(torch.autograd.grad(answer, wanted, direction, allow_unused=True))
        gradients = {name: [next(found) for _ in tensors] for name, tensors in outputs.items()}
        return {
            name: [g.double() for g in calls]
            for name, calls in gradients.items()
            if calls and all(g is not None and g.isfinite().all() for g in calls)
        }

    def _direction(self, answer: Tensor, inputs: tuple[Any, ...]) -> Tensor:
        """A random direction v of the output, such that E[v vᵀ] is the curvature of the model's own loss."""
        self._positions += answer.shape[:-1].numel()
        self._energy += answer.double().square().sum().item()
        if not any(isinstance(t, Tensor) and not t.is_floating_point() for t in inputs):
            return torch.randn(answer.shape, generator=self.generator).to(answer)
        self.kind = "divergence"
        direction = answer.float().softmax(-1)
        rows = direction.flatten(0, -2)
        labels = torch.multinomial(rows.cpu(), 1, generator=self.generator).to(rows.device)
        rows.scatter_add_(1, labels, rows.new_full(labels.shape, -1.0))
        return direction.to(answer.dtype)


def _answer(output: Any) -> Tensor | None:
    """The floating-point tensor that a model's output is about: its logits, or the first one found."""
    logits = getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    parts = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((found for found in map(_answer, parts) if found is not None), None)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _exposed(blocks: Mapping[str, LatentMoE], outputs: dict[str, list[Tensor]]) -> Iterator[None]:
    """Collect the blocks' outputs as differentiable tensors."""

    def hook(name: str) -> Any:
        def expose(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            if not output.requires_grad:
                output = output.detach().requires_grad_()
            outputs[name].append(output)
            return output

        return expose

    handles = [block.experts.register_forward_hook(hook(name)) for name, block in blocks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
