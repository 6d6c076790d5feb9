"""Healing that trains everything: which parameters outside the blocks it may move, and how far at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from latentize.apart import entangled
from latentize.errors import LatentizeError
from latentize.moe import LatentMoE
from latentize.soap import matrix_step

#: Stands for a block's name where a parameter is in none.
OUTSIDE = ""
#: The rate of parameters outside the blocks, relative to that of the experts.
OUTSIDE_RATE = 0.5
#: How large a step of a vector is, relative to its size, for a relative rate of 1: gains and biases act on all tokens.
_VECTOR = 0.02


def outside(
    student: nn.Module, blocks: Mapping[str, LatentMoE], teacher: nn.Module
) -> tuple[dict[str, nn.Parameter], list[str]]:
    """The trainable parameters of `student` that are in none of its blocks, by name, and notes on those left alone.

    A parameter that needs no gradient stays frozen, and so does one that shares a part of its numbers with another.

    Raises:
        LatentizeError: one is also the teacher's, which must stay as it is.
    """
    inside = {id(p) for block in blocks.values() for p in block.parameters()}
    theirs = {p.untyped_storage().data_ptr() for p in teacher.parameters() if p.numel()}
    found = {
        name: p for name, p in student.named_parameters()
        if id(p) not in inside and p.is_floating_point() and p.numel()
    }  # fmt: skip
    for name, parameter in found.items():
        if parameter.untyped_storage().data_ptr() in theirs:
            raise LatentizeError(
                f"healing: {name} {list(parameter.shape)} is the original's own parameter, and training everything "
                "would change it there; take the rewritten model apart from its original first (latentize.apart)"
            )
    frozen = [name for name, p in found.items() if not p.requires_grad]
    mixed = sorted(entangled(found) - set(frozen))
    kept = {name: p for name, p in found.items() if name not in {*frozen, *mixed}}
    notes = []
    if frozen:
        notes.append(f"{_named(frozen)} outside the blocks require no gradient and were not trained")
    if mixed:
        notes.append(f"{_named(mixed)} outside the blocks share some of their memory, not all, and were not trained")
    return kept, notes


def step_sizes(names: Sequence[str], masters: Sequence[Tensor]) -> list[float]:
    """How large a step of each of these parameters is a relative change of about 1, for `OUTSIDE_RATE` of the rate.

    Of a matrix, as `latentize.soap.matrix_step` says; of a vector, a small part of its own size. What
    is zero moves as the others of its module do on average, or as all do.
    """
    sizes = [_size(master) for master in masters]
    modules = [name.rpartition(".")[0] for name in names]
    for i, size in enumerate(sizes):
        if not size:
            near = [s for s, module in zip(sizes, modules, strict=True) if s and module == modules[i]]
            known = near or [s for s in sizes if s]
            sizes[i] = sum(known) / len(known) if known else 1e-3
    return sizes


def _size(master: Tensor) -> float:
    own = float(master.square().mean().sqrt())
    if master.ndim < 2:
        return _VECTOR * own
    return matrix_step(own, master.shape)


def _named(names: Sequence[str]) -> str:
    return f"{len(names)} parameters ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
