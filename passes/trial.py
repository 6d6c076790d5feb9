"""Lift the MoEs of one module: record a randomised fp64 copy of it, find its routers, read what they lead to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentize.passes import graph
from latentize.passes.capture import Call, Recording, Value, record
from latentize.passes.detect import regions
from latentize.passes.double import in_double, in_fp64
from latentize.passes.head import Head
from latentize.passes.heads import Note, deepened, find_heads, selections
from latentize.passes.leaves import MOST_ROLES
from latentize.passes.lift import Binding, Lifted, lift
from latentize.passes.lift_router import has_idle_experts, uses_several_experts
from latentize.passes.mixtures import find_mixtures
from latentize.passes.probes import Inputs, Prober
from latentize.passes.roll import roll
from latentize.passes.scan import holds_experts
from latentize.passes.shaken import Shaken, named_state
from latentize.passes.verify import run_double

#: Tokens of the run that a lift is made on.
TOKENS = 48
#: Matrices of one expert: gate, up and down.
MOST_MATRICES = 3
#: Uses of one router in a run above which its tokens come to it in pieces.
MANY = 4
SEED = 0


@dataclass(frozen=True)
class Trial:
    """A lift made on a randomised fp64 copy of one module."""

    binding: Binding
    recording: Recording
    shaken: Shaken
    inputs: Inputs

    @property
    def randomised(self) -> nn.Module:
        """The copy that the lift was made on."""
        return self.shaken.module


@dataclass(frozen=True)
class Lifts:
    """What became of the selections of one module."""

    found: list[Trial]
    reasons: list[str]  # why what a person might take for an MoE is none
    settled: bool = False  # whether no module around this one can make an MoE of them either


def lift_module(module: nn.Module, prober: Prober, innermost: str | None) -> Lifts:
    """Lift the MoEs of one module whose selection happens in the submodule `innermost` (None: anywhere)."""
    shaken = Shaken.of(module)
    first = _record(shaken.module, prober.seen())
    heads, notes = _heads(first, innermost)
    if not heads:
        asked = [c for c in selections(first) if innermost is None or _path(first, c) == innermost]
        settled = len(asked) == len(notes) > 0 and all(note.final for note in notes)
        return Lifts([], _near_misses(module, notes), settled)
    noise = [c for c in first.random_calls() if not _without_dropout(c)]
    if noise:
        return Lifts([], [f"it draws random numbers in evaluation ({noise[0].name})"])
    shaken.randomise(_names(heads), SEED)
    attempts = list(_attempts(prober, heads[0], shaken.module))
    biases = _biases(heads)
    del first, heads  # what was recorded
    found, reasons, idle = _lift(shaken, attempts, innermost)
    if not found and idle:
        shaken.shrink(biases, 0.1)  # so that every expert is selected by some token
        found, reasons, _ = _lift(shaken, attempts[-1:], innermost)
    for inputs in () if found else prober.unmasked():  # a mask may weigh the experts of tokens that it leaves out
        lifted = _lift(shaken, [inputs], innermost)[0] if _runs(shaken.module, inputs) else []
        found = [trial for trial in lifted if bool(trial.binding.region.routed_rows().any())]  # not all left out
        if found:
            break
    return Lifts(found, [] if found else reasons)


def _near_misses(module: nn.Module, notes: list[Note]) -> list[str]:
    """Why what a person might take for an MoE is none."""
    return [
        note.reason for note in notes
        if note.near == "yes"
        or (note.near == "beside experts" and any(holds_experts(module, n) for n in note.call.inputs[0].shape))
    ]  # fmt: skip


def mixtures_in(module: nn.Module, prober: Prober, inner: Collection[str]) -> list[str]:
    """Why what the submodules `inner` weigh without selecting any is no MoE; empty where no experts are near."""
    recording = _record(in_double(module), prober.seen())
    return find_mixtures(recording, lambda c: _path(recording, c) in inner, lambda n: holds_experts(module, n))


def _lift(shaken: Shaken, attempts: list[Inputs], innermost: str | None) -> tuple[list[Trial], list[str], bool]:
    """What the first inputs that allow it lift, or the reasons that the last ones gave; whether experts were idle."""
    module = shaken.module
    reasons: list[str] = []
    idle = False
    for number, given in enumerate(attempts, start=1):
        inputs, recording = given, _record(module, given)
        found, reasons, idle = [], [], False
        heads = _heads(recording, innermost)[0]
        single = _as_one_sequence(inputs) if _most_uses(heads) > 1 else None
        if single is not None:  # a batch may be worked through sequence by sequence
            inputs, recording = single, _record(module, single)
            heads = _heads(recording, innermost)[0]
        if _most_uses(heads) > MANY:
            order = {name: place for place, (name, _) in enumerate(named_state(module))}
            rolled = roll(recording, heads, order)
            if rolled is None:
                return [], [_IN_PIECES], False
            recording, heads = rolled, _heads(rolled, innermost)[0]
        partial = number < len(attempts) and bool(heads) and all(has_idle_experts(head) for head in heads)
        if partial and not any(_is_stacked(head) for head in heads):
            continue
        open_heads = False  # whether more tokens may help
        for head in heads:
            lifted = _lift_head(head)
            if lifted.binding is None:
                reasons.append(lifted.reason)
                if lifted.experts_read or not _shows_all_weights(head):
                    open_heads = True
                    idle = idle or has_idle_experts(head)
            else:
                found.append(Trial(lifted.binding, recording, shaken, inputs))
        if partial:  # experts that no token selected are known where one tensor holds them all
            found = [t for t in found if t.binding.experts.num_experts == t.binding.region.head.num_experts]
        if found or not (idle or (partial and open_heads)):
            return found, reasons, idle
    return [], reasons, idle


def _is_stacked(head: Head) -> bool:
    """Whether what a router leads to has few tensors, each for all experts, and not some for each."""
    first = next(regions(head), None)
    return first is not None and len(first.leaves) <= MOST_ROLES


def _shows_all_weights(head: Head) -> bool:
    """Whether the weights that a router leads to are used whichever experts are selected: too few to be one's own."""
    first = next(regions(head), None)  # all the experts' outputs come together there
    matrices = 0 if first is None else sum(len(leaf.shape) >= 2 for leaf in first.leaves)
    return 0 < matrices <= MOST_MATRICES and uses_several_experts(head)


def _lift_head(head: Head) -> Lifted:
    """The router's MoE, with the router read from as far back as its logits are affine; else the first reason."""
    first = lifted = lift(head)
    while lifted.binding is None:
        deeper = deepened(head)
        if deeper is None:
            return first
        head = deeper
        lifted = lift(head)
    return lifted


_IN_PIECES = "it works through its tokens piece by piece, so that no one step of it is the whole block"


def _as_one_sequence(inputs: Inputs) -> Inputs | None:
    """The same tokens as one sequence, where hidden states [B, T, d] with B > 1 are the only tensor."""
    tensors = [a for a in pytree.tree_leaves((inputs.args, inputs.kwargs)) if isinstance(a, Tensor)]
    if len(tensors) != 1 or not tensors[0].is_floating_point() or tensors[0].dim() != 3 or tensors[0].shape[0] < 2:
        return None
    flat = tensors[0].reshape(1, -1, tensors[0].shape[-1])
    args, kwargs = pytree.tree_map(lambda a: flat if isinstance(a, Tensor) else a, (inputs.args, inputs.kwargs))
    return Inputs(inputs.name, args, kwargs)


def _most_uses(heads: list[Head]) -> int:
    """How often the router that is used most is used."""
    weights = [frozenset().union(*map(_sources, head.weight.values)) for head in heads]
    return max(Counter(weights).values(), default=0)


def _biases(heads: list[Head]) -> set[str]:
    """State-dict names of the biases of routers."""
    vectors = [head.projection.bias for head in heads]
    vectors += [leaf.value for head in heads for region in regions(head) for leaf in region.routing_leaves]
    return {name for vector in vectors for name in _sources(vector)}


def _record(module: nn.Module, inputs: Inputs) -> Recording:
    double = inputs.to(torch.float64)
    with in_fp64():
        return record(module, double.args, double.kwargs)


def _attempts(prober: Prober, head: Head, module: nn.Module) -> Iterator[Inputs]:
    """Inputs to lift on: a few tokens first, then enough for every expert to be selected."""
    few = prober.random("lift", 2, TOKENS // 2, SEED, spread=1.0)
    if few is None or (few.optional and not _runs(module, few)):
        yield prober.seen()
        if has_idle_experts(head):
            yield from (i for i in prober.longer(6 * head.num_experts) if _runs(module, i))
        return
    yield few
    weight = head.weight.tensor(head.recording, dict(named_state(module))).detach().double()
    directed = prober.directed("lift", weight, SEED)
    many = prober.random("lift", 2, min(2048, 6 * head.num_experts), SEED, spread=1.0)
    for inputs in (directed, many):
        if inputs is not None and (not inputs.optional or _runs(module, inputs)):
            yield inputs


def _runs(module: nn.Module, inputs: Inputs) -> bool:
    """Whether a module takes some inputs."""
    try:
        run_double(module, inputs)
    except Exception:  # sizes that it does not take
        return False
    return True


def _heads(recording: Recording, innermost: str | None) -> tuple[list[Head], list[Note]]:
    heads, notes = find_heads(recording)
    if innermost is None:
        return heads, notes
    return (
        [h for h in heads if any(_path(recording, c) == innermost for c in h.selections)],
        [n for n in notes if _path(recording, n.call) == innermost],
    )


def _without_dropout(call: Call) -> bool:
    """Whether a call that may draw random numbers draws none: attention with a dropout of zero."""
    names = [a.name for a in call.op._schema.arguments]
    if "dropout_p" not in names:
        return False
    position = names.index("dropout_p")
    given = call.args[position] if position < len(call.args) else call.kwargs.get("dropout_p", 0.0)
    return bool(given == 0.0)


def _path(recording: Recording, call: Call) -> str:
    return recording.frames[call.frames[-1]].path if call.frames else ""


def _names(heads: list[Head]) -> set[str]:
    """State-dict names of every parameter and buffer that the routers and their candidate regions use."""
    found: set[str] = set()
    for head in heads:
        for value in head.constants():
            found |= _sources(value)
        for region in regions(head):
            for leaf in [*region.leaves, *region.routing_leaves]:
                found |= _sources(leaf.value)
    return found


def _sources(value: Value | None) -> set[str]:
    return set() if value is None else {v.source for v in graph.ancestors([value]) if v.source}
