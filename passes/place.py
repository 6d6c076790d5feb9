"""Find where a lifted region sits: two submodules, one whole module, or nodes of a graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from latentize.inputs import buffers_kept
from latentize.passes import graph
from latentize.passes.capture import Frame, Recording, Value
from latentize.passes.double import in_fp64
from latentize.passes.fixed import fixed_arguments
from latentize.passes.lift import Binding
from latentize.passes.sites import Argument, ExpertsCall, Output, PartsSite, RouterCall, Structure, WholeSite
from latentize.routing import Routing, route, score

#: Routers often compute in fp32 inside an fp64 copy.
CLOSE = 1e-5


@dataclass(frozen=True)
class _Known:
    """The quantities of one recorded block that a module's outputs may consist of."""

    tokens: int
    routing: Routing
    scores: Tensor
    routed: Tensor
    hidden: Value
    router_hidden: Value


def _known(binding: Binding, state: dict[str, Tensor]) -> _Known:
    region = binding.region
    spec = binding.spec(region.head.recording, state, torch.float64)
    logits = region.head.logit_rows().double()
    if spec.router.bias is not None:
        own = region.head.bias
        logits = logits + spec.router.bias
        logits = logits if own is None else logits - own.tensor(region.head.recording, state).double()
    routing = route(logits, spec.router)
    scores = score(logits, spec.router.score)
    return _Known(
        region.head.tokens,
        routing,
        scores,
        region.routed_rows().double(),
        region.hidden,
        region.head.projection.activation,
    )


def parts_site(path: str, binding: Binding, state: dict[str, Tensor]) -> PartsSite | None:
    """The site when a submodule computes the routing and another the routed output from it; else None."""
    recording = binding.region.head.recording
    known = _known(binding, state)
    if binding.region.rest:
        return None
    for number, frame in _frames(recording):
        call = _experts_call(number, frame, known, binding)
        if call is None:
            continue
        for other, candidate in _frames(recording):
            if other == number or other in _parents(recording, number):
                continue
            router = router_call(other, candidate, known, binding)
            if router is not None and {"weights", "indices"} <= _items(router.output):
                return PartsSite(path, router, call)
    return None


def whole_site(path: str, binding: Binding, state: dict[str, Tensor]) -> WholeSite | None:
    """The site when the module's output holds nothing but the routed output and its routing; None otherwise."""
    recording = binding.region.head.recording
    region = binding.region
    if region.rest or binding.separate_router_input or region.hidden_channels_first:
        return None
    known = _known(binding, state)
    root = recording.frames[0]
    hidden = _argument(root, lambda v: graph.base(v) is graph.base(region.hidden))
    if hidden is None or _value(root, hidden).shape[-1] != region.width:
        return None
    structure = _structure(recording.output_tree, known, _value(root, hidden))
    if structure is None or "routed" not in _items(structure):
        return None
    structure = _of_sequences(structure, root, hidden)
    routers = (router_call(n, f, known, binding) for n, f in _frames(recording))
    router = next((r for r in routers if r is not None and not r.prefix), None)
    return WholeSite(path, hidden, structure, router, fixed_arguments(root))


def _frames(recording: Recording) -> Iterator[tuple[int, Frame]]:
    """Submodules' calls, outermost first; a submodule that is called twice is left out."""
    paths = [frame.path for frame in recording.frames]
    order = sorted(range(1, len(recording.frames)), key=lambda n: recording.frames[n].depth)
    yield from ((n, recording.frames[n]) for n in order if paths.count(paths[n]) == 1)


def _parents(recording: Recording, number: int) -> set[int]:
    for call in recording.calls:
        if number in call.frames:
            return set(call.frames[: call.frames.index(number)])
    return set()


def _experts_call(number: int, frame: Frame, known: _Known, binding: Binding) -> ExpertsCall | None:
    output = frame.output
    if not isinstance(output, Value) or graph.base(output) is not graph.base(binding.region.output):
        return None
    if any(number in c.frames for c in [binding.region.head.projection.call]):
        return None
    hidden = _argument(frame, lambda v: graph.base(v) is graph.base(known.hidden))
    indices = _argument(frame, lambda v: _same_sets(v.tensor, known))
    weights = _argument(frame, lambda v: _same_weights(v.tensor, known) == 1.0)
    if hidden is None or indices is None or weights is None:
        return None
    given = _value(frame, hidden)
    if given.shape[-1] != binding.region.width:
        return None
    like = output.shape == given.shape
    if not like and tuple(output.shape) != (known.tokens, binding.region.width):
        return None
    return ExpertsCall(frame.path, hidden, indices, weights, like, fixed_arguments(frame))


def router_call(number: int, frame: Frame, known: _Known, binding: Binding) -> RouterCall | None:
    """The frame as a router of the binding, if its output consists of the routing's quantities."""
    if number not in binding.region.head.projection.call.frames:
        return None
    tensors = [v for v in pytree.tree_leaves(frame.inputs) if isinstance(v, Value) and v.tensor.is_floating_point()]
    if len(tensors) != 1:
        return None
    hidden = _argument(frame, lambda v: v is tensors[0])
    assert hidden is not None
    prefix: tuple[str, ...] = ()
    if graph.base(tensors[0]) is not graph.base(known.router_hidden):
        prefix = ("",)  # the caller names the node once the module is captured
    structure = _structure(frame.output, known, tensors[0])
    if structure is None or not {"weights", "indices", "logits"} & _items(structure):
        return None
    return RouterCall(frame.path, hidden, _of_sequences(structure, frame, hidden), prefix, fixed_arguments(frame))


def _of_sequences(structure: Structure, frame: Frame, hidden: Argument) -> Structure:
    """The structure with outputs shaped like the hidden states where the module, called with tokens [T, d], would shape
    them like sequences [1, T, d]: other code may call it with those.
    """
    given = _value(frame, hidden).tensor
    if given.dim() != 2:
        return structure
    args, kwargs = pytree.tree_map(lambda a: a.unsqueeze(0) if a is given else a, (frame.args, frame.kwargs))
    try:
        with torch.no_grad(), buffers_kept(frame.module), in_fp64():
            output = frame.module(*args, **kwargs)
    except Exception:  # it takes tokens only
        return structure
    values = [output] if isinstance(output, Tensor) else list(output.values() if isinstance(output, dict) else output)
    if len(values) != len(structure.items):
        return structure
    items = tuple(
        replace(item, like_hidden=value.dim() == 3 and value.shape[:2] == (1, len(given)))
        if isinstance(item, Output) and isinstance(value, Tensor) else item
        for item, value in zip(structure.items, values, strict=True)
    )  # fmt: skip
    return replace(structure, items=items)


def _items(structure: Structure) -> set[str]:
    return {item.item for item in structure.items if isinstance(item, Output)}


def _argument(frame: Frame, matches: Any) -> Argument | None:
    args, kwargs = frame.inputs
    for position, item in enumerate(args):
        if isinstance(item, Value) and matches(item):
            return Argument(position=position, keyword=_parameter_name(frame, position))
    for name, item in kwargs.items():
        if isinstance(item, Value) and matches(item):
            return Argument(keyword=name, position=_parameter_position(frame, name))
    return None


def _parameters(frame: Frame) -> list[str]:
    code = getattr(type(frame.module).forward, "__wrapped__", type(frame.module).forward)
    names = getattr(getattr(code, "__code__", None), "co_varnames", ())
    count = getattr(getattr(code, "__code__", None), "co_argcount", 0)
    return list(names[1:count])


def _parameter_name(frame: Frame, position: int) -> str | None:
    names = _parameters(frame)
    return names[position] if position < len(names) else None


def _parameter_position(frame: Frame, name: str) -> int | None:
    names = _parameters(frame)
    return names.index(name) if name in names else None


def _value(frame: Frame, argument: Argument) -> Value:
    args, kwargs = frame.inputs
    found: Value = argument.pick(args, kwargs)
    return found


def _structure(tree: Any, known: _Known, hidden: Value) -> Structure | None:
    if isinstance(tree, Value):
        items, kind, keys = [tree], "tensor", ()
    elif isinstance(tree, dict):
        items, kind, keys = list(tree.values()), "dict", tuple(tree)
        if type(tree) is not dict:
            return None
    elif type(tree) in (tuple, list):
        items, kind, keys = list(tree), "tuple" if isinstance(tree, tuple) else "list", ()
    else:
        return None
    found: list[Any] = []
    for item in items:
        if isinstance(item, Value):
            output = _identify(item, known, hidden)
            if output is None:
                return None
            found.append(output)
        elif item is None or isinstance(item, (bool, int, float, str)):
            found.append(item)
        else:
            return None
    return Structure(kind, tuple(found), keys)  # type: ignore[arg-type]


def _identify(value: Value, known: _Known, hidden: Value) -> Output | None:
    tensor = value.tensor
    if tensor.dim() == 0 or tensor.numel() % known.tokens:
        return None
    width = tensor.numel() // known.tokens
    rows = (known.tokens, width)
    nested = (*hidden.shape[:-1], width)
    if tuple(tensor.shape) not in (rows, nested):
        return None
    like = tuple(tensor.shape) == nested and nested != rows
    flat = tensor.reshape(rows)
    if not tensor.is_floating_point():
        return Output("indices", like) if _same_sets(tensor, known) else None
    routing = known.routing
    dense = torch.zeros_like(routing.logits).scatter(1, routing.indices, routing.weights)
    options: list[tuple[Any, Tensor]] = [
        ("routed", known.routed), ("logits", routing.logits), ("scores", known.scores), ("dense", dense)
    ]  # fmt: skip
    for item, wanted in options:
        if wanted.shape == flat.shape and _close(flat, wanted):
            return Output(item, like)
    factor = _same_weights(tensor, known)
    return None if factor is None else Output("weights", like, factor)


def _close(a: Tensor, b: Tensor) -> bool:
    a, b = a.double(), b.double()
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite):
        return False
    return float((a[finite] - b[finite]).norm()) <= CLOSE * max(float(b[finite].norm()), 1e-30)


def _same_sets(tensor: Tensor, known: _Known) -> bool:
    if tensor.is_floating_point() or tensor.dtype == torch.bool or tensor.numel() != known.routing.indices.numel():
        return False
    rows = tensor.reshape(known.tokens, -1).long().sort(-1).values
    agree = (rows == known.routing.indices.sort(-1).values).all(-1)
    return float(agree.double().mean()) > 0.9


def _same_weights(tensor: Tensor, known: _Known) -> float | None:
    """The factor by which a tensor is the routing weights, up to order within a token; None when it is not."""
    if not tensor.is_floating_point() or tensor.numel() != known.routing.weights.numel():
        return None
    found = tensor.reshape(known.tokens, -1).double().sort(-1).values
    wanted = known.routing.weights.double().sort(-1).values
    factor = float((found * wanted).sum() / wanted.square().sum().clamp_min(1e-300))
    if abs(factor - 1.0) < CLOSE:
        factor = 1.0
    error = (found - factor * wanted).norm(dim=1) / wanted.norm(dim=1).clamp_min(1e-300)
    agree = float((error <= CLOSE * max(1.0, abs(factor))).double().mean())
    return factor if factor > 0 and agree > 0.9 else None
