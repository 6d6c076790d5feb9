"""The text itself as a target: a small part of what healing aims at is the token that really follows.

A teacher is not the last word on its own training text: what follows a context was one token, whatever the teacher
thought likely. Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), section 2, mix both targets alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from latentize.compare import main_output
from latentize.heal_splice import reading
from latentize.inputs import Batch, Inputs

#: A model predicts text when the next token surprises it at most so much, relative to knowing frequencies alone.
_PREDICTS = 0.75


def next_token_loss(output: Any, ids: Tensor | None) -> Tensor | None:
    """Mean cross-entropy in nats of each next token of `ids` [B, T]; None where the output is not [B, T, V] logits."""
    logits = main_output(output)[0]
    if ids is None or logits.ndim != 3 or logits.shape[:2] != ids.shape or ids.shape[1] < 2:
        return None
    before = logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(before.to(torch.promote_types(before.dtype, torch.float32)), ids[:, 1:].flatten())


def predicts_next(model: nn.Module, embeddings: Sequence[nn.Embedding], batches: Iterable[Batch]) -> bool:
    """Whether `model` says at every position which token follows, judged by how much the real one surprises it."""
    surprise, read = [], []
    with torch.no_grad(), reading(embeddings) as text:
        for batch in batches:
            loss = next_token_loss(Inputs.of(batch).call(model), text.ids)
            if loss is None or text.ids is None:
                return False
            surprise.append(loss.item())
            read.append(text.ids.flatten())
    if not read:
        return False
    counts = torch.cat(read).unique(return_counts=True)[1]
    entropy = torch.distributions.Categorical(probs=counts.double()).entropy().item()
    return bool(sum(surprise) / len(surprise) <= _PREDICTS * entropy)
