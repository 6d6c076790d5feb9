"""A router's selection computed again for other logits, by the calls that were recorded.

Few tokens may select alike by several rules: groups that leave none of their experts out look like no groups at all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from latentize.passes import graph
from latentize.passes.capture import Value
from latentize.passes.double import in_fp64
from latentize.passes.head import Head

#: Sizes of the other logits relative to the recorded ones; where they are small, scores hardly differ.
SIZES = (1.0, 0.3, 0.1, 0.03)
SEED = 1


@torch.no_grad()
def replays(head: Head, chosen: Value) -> Iterator[tuple[Tensor, Tensor]]:
    """Other logits [T, N] like those of the recorded run, and what the tensor of `chosen` is for them.

    Nothing where the calls between cannot be run again by themselves.
    """
    behind = graph.ancestors([chosen], stop=lambda v: v is head.logits) & graph.forward_cone([head.logits])
    calls = sorted({v.call for v in behind if v.call is not None and v is not head.logits}, key=lambda c: c.index)
    if any(call.name == "_read_after_write" for call in calls):  # the write went through another view
        return
    rows = head.logit_rows().double()
    generator = torch.Generator().manual_seed(SEED)
    given = [rows]
    for size, centre in itertools.product(SIZES, (rows.mean(0), rows.mean())):
        noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64, device="cpu").to(rows)
        given.append(size * (centre + rows.std(0) * noise))
    moved = head.logits.tensor.movedim(head.axis, -1).shape
    for number, logits in enumerate(given):
        known = {head.logits: logits.reshape(moved).movedim(-1, head.axis).to(head.logits.tensor.dtype)}
        try:
            with in_fp64():
                for call in calls:
                    known.update(graph.rerun(call, known))
        except (RuntimeError, IndexError):  # a size that depended on the tokens
            return
        found = known.get(chosen)
        if found is None or (number == 0 and not torch.equal(found, chosen.tensor)):
            return
        if number:
            yield logits, found
