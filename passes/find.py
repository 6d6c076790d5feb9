"""Find every MoE block of a model: scan, capture, detect, lift, place, verify; each step a room of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from latentize.blocks import Block
from latentize.passes import graph
from latentize.passes.capture import Call, Recording, Value, record
from latentize.passes.detect import Head, find_heads, regions
from latentize.passes.double import in_double
from latentize.passes.lift import Binding, lift
from latentize.passes.place import parts_site, whole_site
from latentize.passes.place_graph import capture_at, finish_prefix, graph_site
from latentize.passes.probes import Inputs, Prober
from latentize.passes.scan import Scan, scan, untouched
from latentize.passes.sites import GraphSite, Site
from latentize.passes.trace import CaptureError
from latentize.passes.verify import Candidate, verify
from latentize.spec import MoESpec

_log = logging.getLogger(__name__)

#: Levels above the module that selects in which the experts are looked for.
CLIMB = 4
#: Tokens of the run that a lift is made on.
TOKENS = 48
SEED = 0


@dataclass(frozen=True)
class Found:
    """One block, and where it sits when it was lifted."""

    block: Block
    site: Site | None = None
    template: fx.GraphModule | None = field(default=None, repr=False)  # the graph of a graph site's module


@dataclass(frozen=True)
class _Lift:
    """A lift made on a randomised fp64 copy of one module."""

    binding: Binding
    recording: Recording
    randomised: nn.Module
    inputs: Inputs


def find_blocks(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> list[Found]:
    """Every place of a model that is, or nearly is, a Mixture of Experts, in the order in which the model runs them.

    The model, its inputs and the random state are left as they were.

    Args:
        model: any module, or a `torch.fx.GraphModule`.
        args, kwargs: example inputs of its forward.
    """
    kwargs = kwargs or {}
    if any(t.is_meta for t in [*model.parameters(), *model.buffers()]):
        return [Found(_refused(".", "its weights are on the meta device, so that nothing can be proved; load them"))]
    try:
        seen = scan(model, args, kwargs)
    except Exception as error:
        return [Found(_refused(".", f"the model does not run on these inputs: {_line(error)}"))]
    found: dict[str, list[Found]] = {}
    done: set[tuple[str, int]] = set()
    with untouched(model):
        for chain in seen.chains:
            for item in _in_chain(seen, chain, done):
                found.setdefault(item.block.name, []).append(item)
    return [item for items in found.values() for item in _best(items)]


def _best(items: list[Found]) -> list[Found]:
    """The lifts of one module, or its refusal when there are none."""
    lifted = [i for i in items if i.block.status != "refused"]
    return lifted or items[:1]


def _refused(name: str, reason: str) -> Block:
    return Block(name, "refused", reason)


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def _in_chain(seen: Scan, chain: tuple[str, ...], done: set[tuple[str, int]]) -> Iterator[Found]:
    """The blocks around one selection, from the innermost module that holds one whole."""
    refused: Block | None = None
    for path in list(dict.fromkeys(chain))[:CLIMB]:
        module = seen.calls[path].module
        if (path, id(module)) in done:
            return
        inner = chain[0].removeprefix(path).lstrip(".") if path else chain[0]
        try:
            items = list(_in_module(module, path, Prober(seen.calls[path]), inner, done))
        except Exception as error:  # one module that cannot be run or read must not hide the others
            _log.debug("analysing %r failed", path, exc_info=True)
            items = [Found(_refused(path or ".", f"it could not be analysed: {_line(error)}"))]
        lifted = [item for item in items if item.block.status != "refused"]
        if lifted:
            done.add((path, id(module)))
            yield from lifted
            return
        if items and (refused is None or not refused.reason.startswith("a selection") or True):
            refused = items[0].block if refused is None or _is_vague(refused) else refused
    if refused is not None:
        yield Found(refused)


def _is_vague(block: Block) -> bool:
    """Whether a refusal only says that the experts are not in this module."""
    return block.reason.startswith("a selection by a router was found, but no experts")


def _in_module(module: nn.Module, path: str, prober: Prober, inner: str, done: set[tuple[str, int]]) -> Iterator[Found]:
    lifts, reasons = _lifts(module, prober, None if isinstance(module, fx.GraphModule) and not path else inner)
    del done
    names: dict[str, int] = {}
    for item in lifts:
        result = _prove(module, path, prober, item)
        count = names.get(result.block.name, 0)
        names[result.block.name] = count + 1
        if count:
            result = replace(result, block=replace(result.block, name=f"{result.block.name}#{count + 1}"))
        yield result
    for reason in dict.fromkeys(reasons):
        yield Found(_refused(path or ".", reason))


def _lifts(module: nn.Module, prober: Prober, innermost: str | None) -> tuple[list[_Lift], list[str]]:
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
                found.append(_Lift(binding, recording, double, inputs))
        if found or not reasons:
            return found, reasons
    return [], reasons


def _prove(module: nn.Module, path: str, prober: Prober, item: _Lift) -> Found:
    """Place a lift in its module and prove it there."""
    binding, recording = item.binding, item.recording
    name = path or "."

    def spec(of: nn.Module) -> MoESpec:
        dtype = next((p.dtype for p in of.parameters() if p.is_floating_point()), None)
        bound = binding.spec(recording, dict(_state(of)))
        return bound if dtype is None else bound.map_tensors(lambda t: t if t.dtype != torch.float64 else t.to(dtype))

    if binding.latent:
        bound = spec(module)
        projected = replace(bound, latent=None)
        return Found(Block(name, "latent", "it has latent projections already", projected))
    reasons: list[str] = []
    for site, template in _places(module, path, item, reasons):
        candidate = Candidate(module, site, spec, _share(binding), _outputs(binding), template)
        try:
            probes, reason = verify(candidate, item.randomised, prober)
        except CaptureError as error:
            reasons.append(f"its router could not be captured as a graph ({error})")
            continue
        if not reason:
            if isinstance(site, GraphSite) and site.path is None:
                name = site.output
            worst = max((p.error for p in probes), default=0.0)
            return Found(Block(name, "moe", "", spec(module), worst, probes), _at(site, path), template)
        reasons.append(reason)
    return Found(_refused(name, reasons[-1] if reasons else "what lies around the routed path could not be rewritten"))


def _places(
    module: nn.Module, path: str, item: _Lift, reasons: list[str]
) -> Iterator[tuple[Site, fx.GraphModule | None]]:
    """Where a lift may be put back, least intrusive first; why a way is closed goes to `reasons`."""
    state = dict(_state(item.randomised))
    parts = parts_site("", item.binding, state)
    if parts is not None:
        try:
            yield finish_prefix(parts, item.randomised, item.binding), None
        except CaptureError as error:
            reasons.append(f"its router could not be captured as a graph ({error})")
    whole = whole_site("", item.binding, state)
    if whole is not None:
        yield whole, None
    try:
        template = None if isinstance(module, fx.GraphModule) and not path else capture_at(module, item.inputs)
    except CaptureError as error:
        reasons.append(f"what lies around the routed path could not be captured as a graph ({error})")
        return
    nodes = graph_site(template, item.randomised, module, item.inputs, item.binding)
    if nodes is not None:
        yield nodes, template


def _at(site: Site, path: str) -> Site:
    """The site with its path from the model's root."""
    return site if site.path is None else replace(site, path=path)


def _share(binding: Binding) -> float:
    """Size of the routed output relative to the module's output that contains it."""
    region = binding.region
    outputs = [v for v in region.head.recording.outputs if v in graph.forward_cone([region.output])]
    whole = max((float(v.tensor.double().norm()) for v in outputs), default=1.0)
    return float(region.routed_rows().double().norm()) / max(whole, 1e-300)


def _outputs(binding: Binding) -> tuple[int, ...]:
    region = binding.region
    cone = graph.forward_cone([region.output])
    return tuple(i for i, v in enumerate(region.head.recording.outputs) if v in cone)


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
    weight = head.weight(head.recording.constant(head.projection.weight, dict(_state(module)))).detach().double()
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


def _state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


@torch.no_grad()
def randomise(module: nn.Module, which: set[str], seed: int) -> None:
    """Add noise to the named tensors, in place, so that terms that happen to vanish show."""
    generator = torch.Generator().manual_seed(seed)
    done: set[int] = set()
    for name, tensor in _state(module):
        if name not in which or id(tensor) in done or not tensor.is_floating_point():
            continue
        done.add(id(tensor))
        size = float(tensor.double().square().mean().sqrt())
        floor = tensor.shape[-1] ** -0.5 if tensor.dim() >= 2 else 0.1
        scale = size if size > 1e-2 * floor else floor
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        tensor.add_((0.5 * scale * noise).to(tensor.dtype))
