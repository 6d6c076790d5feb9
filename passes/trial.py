"""Lift the MoEs of one module: record a randomised fp64 copy of it, find its routers, read what they lead to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from latentize.passes import graph
from latentize.passes.capture import Call, Recording, Value, record
from latentize.passes.detect import Head, find_heads, regions
from latentize.passes.double import in_double
from latentize.passes.lift import Binding, lift
from latentize.passes.probes import Inputs, Prober

#: Tokens of the run that a lift is made on.
TOKENS = 48
SEED = 0


@dataclass(frozen=True)
class Trial:
    """A lift made on a randomised fp64 copy of one module."""

    binding: Binding
    recording: Recording
    randomised: nn.Module
    inputs: Inputs


def lift_module(module: nn.Module, prober: Prober, innermost: str | None) -> tuple[list[Trial], list[str]]:
    """Lift the MoEs of one module whose selection happens in the submodule `innermost` (None: anywhere)."""
    double = in_double(module)
    first = record(double, *_call(prober.seen()))
    heads = _heads(first, innermost)
    if not heads:
        return [], []
    noise = first.random_calls()
    if noise:
        return [], [f"it draws random numbers in evaluation ({noise[0].name})"]
    randomise(double, _names(heads), SEED)
    reasons: list[str] = []
    for inputs in _attempts(prober, heads[0], double):
        recording = record(double, *_call(inputs))
        found, reasons = [], []
        for head in _heads(recording, innermost):
            binding, reason = lift(head)
            if binding is None:
                reasons.append(reason)
            else:
                found.append(Trial(binding, recording, double, inputs))
        if found or not reasons:
            return found, reasons
    return [], reasons


def _call(inputs: Inputs) -> tuple[tuple[Any, ...], dict[str, Any]]:
    double = inputs.to(torch.float64)
    return double.args, double.kwargs


def _attempts(prober: Prober, head: Head, module: nn.Module) -> Iterator[Inputs]:
    """Inputs to lift on: a few tokens first, then enough for every expert to be selected."""
    few = prober.random("lift", 2, TOKENS // 2, SEED, spread=1.0)
    if few is None:
        yield prober.seen()
        return
    yield few
    weight = head.weight(head.recording.constant(head.projection.weight, dict(named_state(module)))).detach().double()
    directed = prober.directed("lift", weight, SEED)
    if directed is not None:
        yield directed
    many = prober.random("lift", 2, min(2048, 6 * head.num_experts), SEED, spread=1.0)
    if many is not None:
        yield many


def _heads(recording: Recording, innermost: str | None) -> list[Head]:
    heads, _ = find_heads(recording)
    if innermost is None:
        return heads
    return [h for h in heads if any(_path(recording, c) == innermost for c in h.selections)]


def _path(recording: Recording, call: Call) -> str:
    return recording.frames[call.frames[-1]].path if call.frames else ""


def _names(heads: list[Head]) -> set[str]:
    """State-dict names of every parameter and buffer that the routers and their candidate regions use."""
    found: set[str] = set()
    for head in heads:
        found |= _sources(head.projection.weight)
        if head.projection.bias is not None:
            found |= _sources(head.projection.bias)
        for region in regions(head):
            for leaf in [*region.leaves, *region.routing_leaves]:
                found |= _sources(leaf.value)
    return found


def _sources(value: Value) -> set[str]:
    return {v.source for v in graph.ancestors([value]) if v.source}


def named_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, tied ones under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


@torch.no_grad()
def randomise(module: nn.Module, which: set[str], seed: int) -> None:
    """Add noise to the named tensors, in place, so that terms that happen to vanish show."""
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for name, tensor in named_state(module):
        if name not in which or id(tensor) in done or not tensor.is_floating_point():
            continue
        done.add(id(tensor))
        size = float(tensor.double().square().mean().sqrt())
        floor = tensor.shape[-1] ** -0.5 if tensor.dim() >= 2 else 0.1
        scale = size if size > 1e-2 * floor else floor
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.add_((0.5 * scale * noise).to(tensor.dtype))
