"""What blocks learn from in the first stage of healing: what they read, and the original's routed output.

They read what the original's blocks read, or what reaches them in the student as it is then; the target is the
original's output at the same tokens either way, so that on the student's readings a block makes up for what earlier
ones lose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from latentize.inputs import Batch, Inputs
from latentize.moe import LatentMoE
from latentize.taps import BlockCall, tapped


@dataclass(frozen=True)
class Activations:
    """What went into one block and the original's routed output, over T tokens."""

    inputs: tuple[Tensor, ...]  # hidden [T, d], and what the router read [T, d] where that is another tensor
    output: Tensor  # [T, d]

    def __len__(self) -> int:
        return len(self.output)

    def at(self, rows: Tensor) -> Activations:
        """Some of the tokens."""
        return Activations(tuple(t[rows] for t in self.inputs), self.output[rows])


@dataclass(frozen=True)
class Student:
    """The model whose readings are learned from: the student, and its blocks by name."""

    model: nn.Module
    blocks: Mapping[str, LatentMoE]


@dataclass
class Readings:
    """Activations by block over `batches` batches; `unlike` are the blocks some of whose calls the student did not make
    alike, or where it read something not finite: there they have what the original read."""

    of: dict[str, Activations]
    batches: int = 0
    unlike: set[str] = field(default_factory=set)


def collect(
    teacher: nn.Module,
    blocks: Mapping[str, LatentMoE],
    batches: Iterable[Batch],
    enough: Callable[[int], bool],
    student: Student | None = None,
) -> Readings:
    """What every block reads over `batches`, until `enough(tokens)`; calls whose target is not finite are left out.

    Args:
        teacher, blocks: the original, and its blocks by name.
        batches: what the models are run on.
        enough: asked with the most tokens that a block has.
        student: reads in the original's place, where it is given.
    """
    kept: dict[str, list[Activations]] = {name: [] for name in blocks}
    found = Readings({})
    for batch in batches:
        targets = _calls(teacher, blocks, batch)
        own = targets if student is None else _calls(student.model, student.blocks, batch)
        for name, calls in targets.items():
            alike = _alike(calls, own[name])
            if not alike:
                found.unlike.add(name)
            for call, reading in zip(calls, own[name] if alike else calls, strict=True):
                if bool(call.output.isfinite().all()):
                    kept[name].append(Activations(reading.inputs, call.output))
        found.batches += 1
        if enough(max(sum(len(a) for a in parts) for parts in kept.values())):
            break
    found.of = {name: _joined(parts) for name, parts in kept.items() if parts}
    return found


@torch.no_grad()
def _calls(model: nn.Module, blocks: Mapping[str, LatentMoE], batch: Batch) -> dict[str, list[BlockCall]]:
    """Every call of each block in one run of a model."""
    calls: dict[str, list[BlockCall]] = {name: [] for name in blocks}

    def keep(name: str, call: BlockCall) -> None:
        calls[name].append(BlockCall(tuple(t.detach() for t in call.inputs), call.output.detach()))

    with tapped(blocks, keep):
        Inputs.of(batch).call(model)
    return calls


def _alike(theirs: list[BlockCall], own: list[BlockCall]) -> bool:
    """Whether two models called a block on as many tokens in each call, and the second read finite numbers."""
    if theirs is own:
        return True
    shapes = [[[t.shape for t in call.inputs] for call in calls] for calls in (theirs, own)]
    return shapes[0] == shapes[1] and all(bool(t.isfinite().all()) for call in own for t in call.inputs)


def _joined(parts: list[Activations]) -> Activations:
    inputs = tuple(torch.cat(column) for column in zip(*(p.inputs for p in parts), strict=True))
    return Activations(inputs, torch.cat([p.output for p in parts]))
