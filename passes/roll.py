"""Roll up a run that goes through its tokens one by one: what it did for each token becomes one step for all of them.

The steps of two tokens are the same calls in the same order, if with other experts' weights. Put side by side they read
like the run of a module that takes all its tokens at once, each step using the weights of every expert that some token
met there.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from latentize.passes import graph
from latentize.passes.capture import Call, Recording, Value
from latentize.passes.head import Head

#: Owner of what depends on several tokens.
MIXED = -1


def roll(recording: Recording, heads: list[Head], order: Mapping[str, int]) -> Recording | None:
    """The recording with the steps of its tokens side by side; None where they are not alike.

    Args:
        recording: a run.
        heads: its routers: one router, used for one token at a time.
        order: place of every parameter and buffer in the module, in which its experts are numbered.
    """
    if len({h.projection.weight.source for h in heads}) > 1 or any(h.tokens != 1 for h in heads):
        return None
    owners = _owners(recording, [h.projection.activation for h in heads])
    steps: list[list[Call]] = [[] for _ in heads]
    before, after = [], []
    for call in recording.calls:
        own = {owners[v] for v in call.outputs if v in owners}
        if MIXED in own:
            after.append(call)
        elif len(own) == 1:
            steps[own.pop()].append(call)
        else:  # nothing of a token, or a call that deals out all of them
            before.append(call)
    aligned = list(zip(*steps, strict=False))
    if len({len(s) for s in steps}) > 1 or not all(_alike(calls) for calls in aligned):
        return None
    return _Roller(recording, owners, len(heads), order).build(before, aligned, after)


def _owners(recording: Recording, read: list[Value]) -> dict[Value, int]:
    """The token that each value belongs to, where it depends on one; `MIXED` where on several.

    What only one token's values are computed from is that token's too: a row that is cut out for the experts apart.
    """
    behind = [{v for v in graph.ancestors([value]) if not v.const} for value in read]
    times = Counter(v for found in behind for v in found)
    owners = {v: token for token, found in enumerate(behind) for v in found if times[v] == 1}
    for call in recording.calls:
        given = {owners[v] for v in call.inputs if v in owners}
        if given and call.name not in graph.FACTORIES:
            owner = given.pop() if len(given) == 1 else MIXED
            owners.update(dict.fromkeys(call.outputs, owner))
    for call in reversed(recording.calls):
        for value in call.outputs:
            if value in owners or value.const or not value.users:
                continue
            led = {owners.get(v, MIXED) for user in value.users for v in user.outputs}
            if len(led) == 1 and MIXED not in led:
                owners[value] = led.pop()
    return owners


def _alike(calls: tuple[Call, ...]) -> bool:
    """Whether calls do the same to tensors of the same shapes."""
    kinds = {(c.name, tuple(v.shape for v in c.inputs), tuple(v.shape for v in c.outputs)) for c in calls}
    return len(kinds) == 1


class _Roller:
    """Builds the rolled recording; every value of the old one has its counterpart in the new one."""

    def __init__(self, recording: Recording, owners: dict[Value, int], tokens: int, order: Mapping[str, int]) -> None:
        self.recording = recording
        self.owners = owners
        self.tokens = tokens
        self.order = order
        self.known: dict[Value, Value] = {}
        self.calls: list[Call] = []
        self.count = 0

    def build(self, before: list[Call], aligned: list[tuple[Call, ...]], after: list[Call]) -> Recording | None:
        for value in self.recording.inputs:
            self._copy(value, None)
        for call in before:
            dealt: dict[int, Value] = {self.owners[v]: v for v in call.outputs if v in self.owners}
            if dealt and len(dealt) != self.tokens:
                return None
            new = self._call(call, [self._of(v) for v in call.inputs])
            new.outputs += [self._copy(v, new) for v in call.outputs if v not in self.owners]
            if dealt:
                new.outputs.append(self._stacked([dealt[t] for t in range(self.tokens)], new))
        for calls, constants in zip(aligned, _united(aligned), strict=True):
            inputs = [self._of(v) for v in calls[0].inputs if not v.const]
            if len(constants) == sum(v.const for v in calls[0].inputs):  # the same for every token
                alike = {graph.derivation(v): v for v in constants}
                inputs = [self._of(alike[graph.derivation(v)] if v.const else v) for v in calls[0].inputs]
            else:
                inputs += [self._of(v) for v in sorted(constants, key=self._place)]
            new = self._call(calls[0], inputs)
            for values in zip(*(c.outputs for c in calls), strict=True):
                new.outputs.append(self._stacked(list(values), new))
        for call in after:
            new = self._call(call, list(dict.fromkeys(self._of(v) for v in call.inputs)))
            new.outputs += [self._copy(v, new) for v in call.outputs]
        frames = [replace(f, inputs=self._tree(f.inputs), output=self._tree(f.output)) for f in self.recording.frames]
        inputs, outputs = ([self._of(v) for v in values] for values in (self.recording.inputs, self.recording.outputs))
        return Recording(self.calls, frames, inputs, outputs, self._tree(self.recording.output_tree))

    def _place(self, constant: Value) -> tuple[int, int]:
        """Where a constant stands among its kind: in the order in which the module holds what it comes from."""
        sources = [self.order[v.source] for v in graph.ancestors([constant]) if v.source in self.order]
        return min(sources, default=-1), constant.index

    def _of(self, value: Value) -> Value:
        return self.known[value] if value in self.known else self._copy(value, None)

    def _tree(self, tree: Any) -> Any:
        return pytree.tree_map(lambda a: self._of(a) if isinstance(a, Value) else a, tree)

    def _call(self, call: Call, inputs: list[Value]) -> Call:
        args, kwargs = self._tree((call.args, call.kwargs))
        new = Call(len(self.calls), call.op, args, kwargs, inputs, [], call.frames)
        self.calls.append(new)
        for value in inputs:
            value.users.append(new)
        return new

    def _copy(self, value: Value, call: Call | None) -> Value:
        self.count += 1
        self.known[value] = Value(self.count, value.tensor, call, value.const, value.source)
        return self.known[value]

    def _stacked(self, values: list[Value], call: Call) -> Value:
        """One value for those of all tokens, with the tokens as its first axis."""
        self.count += 1
        new = Value(self.count, torch.stack([v.tensor for v in values]), call, const=False)
        self.known.update(dict.fromkeys(values, new))
        return new


def _united(aligned: list[tuple[Call, ...]]) -> list[list[Value]]:
    """The constants of each step, with those of steps of its kind that share some: the same part of every expert.

    Of constants that are computed alike there is one.
    """
    kept: dict[Hashable, Value] = {}
    used: list[set[Hashable]] = []
    for calls in aligned:
        origins = {v: graph.derivation(v) for c in calls for v in c.inputs if v.const}
        used.append(set(origins.values()))
        for value, origin in origins.items():
            kept.setdefault(origin, value)
    kinds = [(calls[0].name, tuple(v.shape for v in calls[0].outputs)) for calls in aligned]
    for one, other in itertools.permutations(range(len(aligned)), 2):
        several = len(used[one]) > 1 or len(used[other]) > 1
        if several and kinds[one] == kinds[other] and used[one] & used[other]:
            used[one] |= used[other]
    return [[kept[origin] for origin in found] for found in used]
