"""Several processes that heal one student, as torchrun or accelerate start them: each takes a part of every step.

Every process calls `heal` with the same models and the same calibration batches. Weights are those of rank 0 at the
start and move alike everywhere; what is measured is what rank 0 measures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from latentize.heal_parts import Part
from latentize.heal_pieces import pieces_of
from latentize.inputs import Batch


@dataclass(frozen=True)
class Ranks:
    """This process among those that heal together; alone where torch.distributed was not initialised."""

    rank: int = 0
    world: int = 1

    @classmethod
    def here(cls) -> Ranks:
        """As torch.distributed says."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def own(self, batch: Batch) -> Batch:
        """The sequences of a step that are this process's; all of them where there are too few for all processes."""
        parts = pieces_of(batch, self.world)
        return parts[self.rank] if len(parts) == self.world else batch

    def together(self, part: Part | None, like: Sequence[Tensor], experts: Mapping[str, int]) -> Part | None:
        """The parts of all processes put together, as `heal_parts.together` does; None where any process has none.

        Args:
            part: this process's.
            like: the tensors that gradients are of.
            experts: how many each block has.
        """
        if self.world == 1:
            return part
        # A process without a part takes part in the sums all the same, or the others would wait for it.
        own = Part(0.0, 0.0, [None] * len(like), {}) if part is None else part
        counts = [own.counts.get(name, torch.zeros(n)) for name, n in experts.items()]
        there = [float(g is not None) for g in own.gradients]
        numbers = [torch.tensor([float(part is not None), own.wrong, own.whole, *there]), *counts]
        found = self._summed(torch.cat([n.double() for n in numbers]).to(like[0].device)).cpu()
        rows = [
            (torch.zeros_like(t) if g is None else g * own.whole).flatten()
            for g, t in zip(own.gradients, like, strict=True)
        ]
        flat = self._summed(torch.cat(rows))
        usable, wrong, whole = found[:3].tolist()
        if usable < self.world:
            return None
        pieces = (flat / max(whole, 1e-30)).split([t.numel() for t in like])
        exist, selected = found[3 : 3 + len(like)] > 0, found[3 + len(like) :].split([*experts.values()])
        gradients = [p.view_as(t) if e else None for p, t, e in zip(pieces, like, exist.tolist(), strict=True)]
        return Part(wrong, whole, gradients, dict(zip(experts, (c.long() for c in selected), strict=True)))

    def agreed(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite `tensors` with those of rank 0."""
        for tensor in tensors if self.world > 1 else ():
            dist.broadcast(tensor, 0)

    def _summed(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(tensor)
        return tensor
