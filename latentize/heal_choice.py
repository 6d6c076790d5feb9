"""Which sequences healing reads: more of those that the teacher is unsure of.

Calibration data is full of text that follows from itself, tables and licences; the teacher and an early student agree
there, while what a student still has to learn is how the teacher behaves where much may follow. Every optimiser step
reads a batch of its own, and of it as many sequences as a piece of it has: as much work, on other text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentize.compare import main_output
from latentize.heal_crew import Crew, Worker
from latentize.heal_pieces import rows_of, sequences_of
from latentize.inputs import Batch, Inputs

#: A sequence is drawn in proportion to this power of the teacher's mean entropy on it.
POWER = 2.0


@dataclass(frozen=True)
class Choice:
    """How much each sequence of each batch weighs, [B] for a batch."""

    weights: Sequence[Tensor]

    def of(self, batch: Batch, number: int, count: int, generator: torch.Generator) -> Batch:
        """`count` sequences of `batch`, the `number`-th one, drawn without replacement, in their order.

        Drawn by the largest of log-weight plus Gumbel noise (Efraimidis and Spirakis, "Weighted random sampling with a
        reservoir", 2006, in logarithms).
        """
        weights = self.weights[number]
        noise = -torch.rand(len(weights), generator=generator, dtype=torch.float64).clamp_min(1e-300).log()
        rows = (weights.double().clamp_min(1e-30).log() - noise.log()).topk(min(count, len(weights))).indices
        return rows_of(batch, rows.sort().values)


def choose(crew: Crew, batches: Sequence[Batch]) -> Choice | None:
    """Weights from the teacher's predictions; None where a batch has no sequences of logits."""
    found = crew.each(_entropies, batches)
    weights = [entropy.pow(POWER) for entropy in found if entropy is not None]
    return Choice(weights) if len(weights) == len(batches) else None


@torch.no_grad()
def _entropies(worker: Worker, batch: Batch) -> Tensor | None:
    """Mean entropy [B] in nats of the teacher's predictions over each sequence, 0 where it is not finite."""
    logits = main_output(Inputs.of(batch).call(worker.teacher))[0]
    if logits.ndim != 3 or len(logits) != sequences_of(batch):
        return None
    found = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
    return -(found.exp() * found).sum(-1).mean(-1).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).cpu()
