"""How far a student's output is from its teacher's: KL divergence for logits, relative squared error for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentize.compare import main_output
from latentize.inputs import Batch, Inputs


@dataclass(frozen=True)
class OutputLoss:
    """The distance between two models' main outputs; `kind` "kl" (nats per position) or "mse" (relative)."""

    kind: Literal["kl", "mse"]

    @classmethod
    def of(cls, model: nn.Module, batch: Batch) -> OutputLoss:
        """The distance that suits `model`, which is run once on `batch`.

        The output is logits when the model calls it so, or when the model reads integers through an embedding with as
        many rows as the output has columns. A padding mask named `attention_mask` [B, T] leaves positions out.
        """
        inputs = Inputs.of(batch)
        with torch.no_grad():
            output, named = main_output(inputs.call(model))
        reads_ids = any(not t.is_floating_point() for t in inputs.tensors())
        rows = {m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)}
        return cls("kl" if named or (reads_ids and output.shape[-1] in rows) else "mse")

    def sums(self, student: Any, teacher: Any, batch: Batch) -> tuple[Tensor, Tensor]:
        """Numerator and denominator of the distance over one batch; add those of several batches before dividing.

        Args:
            student, teacher: what the models returned for `batch`.
            batch: looked at for a padding mask only.
        """
        a, b = main_output(student)[0], main_output(teacher)[0].detach()
        keep = _kept_positions(batch, a)
        if keep is not None:
            a, b = a[keep], b[keep]
        a, b = _wide(a), _wide(b)
        if self.kind == "mse":
            return (a - b).square().sum(), b.square().sum()
        a, b = a.flatten(0, -2), b.flatten(0, -2)
        divergence = F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="sum", log_target=True)
        return divergence, divergence.new_tensor(float(max(1, a.shape[0])))

    @staticmethod
    def usable(teacher: Any) -> bool:
        """Whether a teacher's output can be learned from: all of it is finite."""
        return bool(main_output(teacher)[0].isfinite().all())

    def over(self, student: nn.Module, teacher: nn.Module, batches: Iterable[Batch]) -> float:
        """The distance over whole batches, without gradients."""
        wrong = whole = 0.0
        with torch.no_grad():
            for batch in batches:
                inputs = Inputs.of(batch)
                sums = self.sums(inputs.call(student), inputs.call(teacher), batch)
                wrong += sums[0].item()
                whole += sums[1].item()
        return wrong / whole if whole else wrong


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _kept_positions(batch: Batch, output: Tensor) -> Tensor | None:
    mask = Inputs.of(batch).kwargs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape != output.shape[:2] or output.ndim < 3:
        return None
    keep = mask.to(output.device).bool()
    return None if bool(keep.all()) else keep
