"""What blocks read at the tokens of their samples in a model whose earlier blocks are latent already."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from latentize.inputs import Batch, Inputs, observing
from latentize.moe import LatentMoE
from latentize.statistics import Sample
from latentize.taps import BlockCall, tapped


@dataclass(frozen=True)
class Reading:
    """What a block's experts and its router read, token by token as in its `Sample`."""

    hidden: Tensor  # [S, d]
    router_hidden: Tensor | None  # [S, d]; None where the router reads `hidden`


def reread(
    model: nn.Module, blocks: Mapping[str, LatentMoE], batches: Iterable[Batch], samples: Mapping[str, Sample]
) -> dict[str, Reading]:
    """Run `model` over the batches that `samples` were drawn from, and pick the same tokens.

    Args:
        model: contains the blocks; its modes and the random states are left as found.
        blocks: the blocks to listen to, by name.
        batches: those that `latentize.statistics.collect` was given.
        samples: what it kept of each block.

    Returns:
        The readings by name; without the blocks that were reached by another number of tokens than before, or that read
        something not finite.
    """
    pickers = {name: _Picker(samples[name]) for name in blocks}
    with observing(model), tapped(blocks, lambda name, call: pickers[name].add(call)):
        for batch in batches:
            Inputs.of(batch).call(model)
    found = {name: picker.result() for name, picker in pickers.items()}
    return {name: reading for name, reading in found.items() if reading is not None}


@dataclass
class _Picker:
    """Picks the rows of one block's stream that its sample holds."""

    sample: Sample
    seen: int = 0
    parts: list[tuple[Tensor, ...]] = field(default_factory=list)

    def add(self, call: BlockCall) -> None:
        count = len(call.inputs[0])
        places = self.sample.places
        if places is not None:
            rows = places[(places >= self.seen) & (places < self.seen + count)] - self.seen
            self.parts.append(tuple(tensor[rows.to(tensor.device)] for tensor in call.inputs))
        self.seen += count

    def result(self) -> Reading | None:
        if not self.parts or self.seen != self.sample.stream or len({len(part) for part in self.parts}) > 1:
            return None
        columns = [torch.cat(column) for column in zip(*self.parts, strict=True)]
        if len(columns[0]) != len(self.sample.hidden) or not all(bool(c.isfinite().all()) for c in columns):
            return None
        return Reading(columns[0], columns[1] if len(columns) > 1 else None)
