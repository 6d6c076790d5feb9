"""Turn the constants of a region into candidates for stacked expert weights [N, out, in], whatever their storage."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from latentize.passes.bound import Bound
from latentize.passes.capture import Call, Value
from latentize.passes.detect import Leaf, Region
from latentize.passes.tables import meets

#: An expert has at most gate, up, down and a bias for each.
MOST_ROLES = 6


@dataclass(frozen=True)
class Role:
    """Leaves that play one part in every expert: one stacked tensor, or one tensor per expert in order of use."""

    kind: Literal["weight", "bias"]
    level: int  # weights that the activations it meets went through: 0 for the first weight, 1 for its bias, ...
    members: tuple[Leaf, ...]

    @property
    def stacked(self) -> bool:
        """Whether one tensor holds every expert."""
        return len(self.members) == 1


def groupings(region: Region) -> Iterator[list[Role]]:
    """Ways to group a region's leaves by the part they play: each part one stacked tensor, or one tensor per expert."""
    levels = _levels(region)
    classes: dict[tuple[Literal["weight", "bias"], int, torch.Size], list[Leaf]] = {}
    for leaf in sorted(region.leaves, key=lambda leaf: leaf.calls[0].index):
        meets = _meets(leaf, region)
        if not meets:
            continue
        kind: Literal["weight", "bias"] = "bias" if all(_adds(call, value) for call, value in meets) else "weight"
        level = max(levels.get(call, 0) + _fused_bias(call, value) for call, value in meets)
        classes.setdefault((kind, level, leaf.shape), []).append(leaf)
    sizes = {len(members) for members in classes.values()}
    whole = math.gcd(*sizes) if sizes else 1
    counts = [n for n in dict.fromkeys([region.head.num_experts, whole, 1]) if whole % n == 0]
    for count in counts:
        if sum(len(members) // count for members in classes.values()) <= MOST_ROLES:
            options = [list(_shares(kind, level, members, count)) for (kind, level, _), members in classes.items()]
            for combination in itertools.product(*options):
                yield [role for part in combination for role in part]


def _shares(kind: Literal["weight", "bias"], level: int, members: list[Leaf], count: int) -> Iterator[list[Role]]:
    """Deal leaves of one shape and level out to parts of `count` each: expert by expert, or part by part."""
    parts = len(members) // count
    yield [Role(kind, level, tuple(members[i::parts])) for i in range(parts)]
    if parts > 1 and count > 1:
        yield [Role(kind, level, tuple(members[i * count : (i + 1) * count])) for i in range(parts)]


def _meets(leaf: Leaf, region: Region) -> list[tuple[Call, Value]]:
    """Calls in which the leaf, or rows read from it, first meets activations; with the value that carries it there."""
    found = meets(leaf.values, set(region.calls), region.fed)
    return [meet for meet in found if not leaf.carriers or meet[1] in leaf.carriers]


def _adds(call: Call, value: Value) -> bool:
    if call.name in {"add", "sub"}:
        return True
    if call.name in {"addmm", "baddbmm", "addmv"}:
        return call.inputs[0] is value
    return call.name in {"linear", "convolution"} and len(call.inputs) > 2 and call.inputs[2] is value


def _fused_bias(call: Call, value: Value) -> int:
    """1 for a bias that is added by the call that multiplies by the weight, else 0."""
    return int(_adds(call, value) and call.name not in {"add", "sub"})


def _levels(region: Region) -> dict[Call, int]:
    """For each call, how many weights the activations that enter it have been multiplied by."""
    depth: dict[Value, int] = {}
    level: dict[Call, int] = {}
    carried = {call for leaf in region.leaves for call, value in _meets(leaf, region) if not _adds(call, value)}
    for call in region.calls:
        level[call] = max((depth.get(v, 0) for v in call.inputs if v in region.fed), default=0)
        for output in call.outputs:
            depth[output] = level[call] + (call in carried)
    return level


def stack(role: Role) -> Bound:
    """The role's leaves as one tensor, experts first; one stacked leaf is returned as it is stored."""
    if role.stacked:
        leaf = role.members[0]
        return Bound((leaf.value,), lambda tensors: leaf.of(tensors[0]))
    members = role.members
    return Bound(
        tuple(leaf.value for leaf in members),
        lambda tensors: _stack([leaf.of(t) for leaf, t in zip(members, tensors, strict=True)]),
    )


def _stack(tensors: list[Tensor]) -> Tensor:
    first = tensors[0]
    step = first.numel()
    whole = first._base
    if whole is not None and whole.numel() == step * len(tensors) and whole.is_contiguous():
        laid = whole.view(len(tensors), *first.shape) if first.is_contiguous() else None
        if laid is not None and all(
            t._base is whole and t.data_ptr() == laid[i].data_ptr() for i, t in enumerate(tensors)
        ):
            return laid
    return torch.stack(tensors)


def readings(bound: Bound, shape: torch.Size, wanted: tuple[int, ...]) -> Iterator[Bound]:
    """Readings of a leaf of `shape` with axes of the `wanted` lengths, in every order they can have in memory."""
    sizes = tuple(s for s in shape if s != 1) or (1,)
    if math.prod(sizes) != math.prod(wanted):
        return
    stored = set(itertools.accumulate(sizes, operator.mul))
    for order in itertools.permutations(range(len(wanted))):
        lengths = [wanted[axis] for axis in order]
        inner = set(itertools.accumulate(lengths, operator.mul))
        if stored <= inner or inner <= stored:
            yield bound.then(_reader(lengths, [order.index(axis) for axis in range(len(wanted))]))


def sharded_readings(
    bound: Bound, shape: torch.Size, wanted: tuple[int, ...], axis: int, shards: int
) -> Iterator[Bound]:
    """The same, of a leaf that holds `shards` pieces of each expert, cut along an axis of `wanted`."""
    if shards == 1:
        yield from readings(bound, shape, wanted)
        return
    if wanted[axis] % shards:
        return
    cut = (*wanted[:axis], shards, wanted[axis] // shards, *wanted[axis + 1 :])
    for reading in readings(bound, shape, cut):
        yield reading.then(lambda tensor: tensor.flatten(axis, axis + 1))


def _reader(lengths: list[int], back: list[int]) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.reshape(lengths).permute(back)
