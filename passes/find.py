"""Find every MoE block of a model: scan, capture, detect, lift, place, verify; each step a room of its own."""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from latentize import ops
from latentize.blocks import Block
from latentize.errors import first_line
from latentize.memory import release
from latentize.passes import graph, together
from latentize.passes.cut import verify_cut
from latentize.passes.double import dtype_of, in_double
from latentize.passes.lift import Binding
from latentize.passes.lift_experts import NOT_A_SUM
from latentize.passes.lift_router import NO_SELECTION, NO_WEIGHTS
from latentize.passes.place import parts_site, whole_site
from latentize.passes.place_graph import capture_at, finish_prefix, graph_site
from latentize.passes.probes import MANY, Inputs, Prober
from latentize.passes.scan import CLIMB, Scan, scan, untouched
from latentize.passes.shaken import named_state
from latentize.passes.sites import GraphSite, PartsSite, Site
from latentize.passes.structure import find_structure, is_meta
from latentize.passes.trace import CaptureError, quiet
from latentize.passes.trial import Trial, lift_module, mixtures_in
from latentize.passes.unreadable import unreadable
from latentize.passes.verify import EMPTY, SEED, Candidate, run_double, verify
from latentize.spec import MoESpec

_log = logging.getLogger(__name__)

#: Relative difference above which outputs are taken to depend on the order of the tokens.
ORDER = 1e-5
#: Tokens that differ among equal ones where a block knows their places, and are alike where a capacity is not yet full.
FIRST = 16


@dataclass(frozen=True)
class Found:
    """One block, and where it sits when it was lifted."""

    block: Block
    site: Site | None = None
    template: fx.GraphModule | None = field(default=None, repr=False)  # the graph of a graph site's module


def find_blocks(model: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None) -> list[Found]:
    """Every place of a model that is, or nearly is, a Mixture of Experts, in the order in which the model runs them.

    The model, its inputs and the random state are left as they were.

    Args:
        model: any module, or a `torch.fx.GraphModule`.
        args, kwargs: example inputs of its forward.
    """
    kwargs = kwargs or {}
    if is_meta(model):
        return [Found(block) for block in find_structure(model, args, kwargs)]
    if isinstance(model, torch.jit.ScriptModule):
        return [Found(_refused(".", "it is TorchScript, whose code is not read: give the module it was made from"))]
    try:
        seen = scan(model, args, kwargs)
    except Exception as error:
        return [Found(_refused(".", f"the model does not run on these inputs: {first_line(error)}"))]
    found: dict[str, list[Found]] = {}
    done: set[tuple[object, ...]] = set()
    with untouched(model), _threads(model), _cheap_collections(), _device(model), ops.plain():
        for chain in seen.chains:
            for item in _in_chain(seen, chain, done):
                if item.site is None or all(item.site != other.site for items in found.values() for other in items):
                    found.setdefault(item.block.name, []).append(item)
        for holder, inner in seen.mixtures.items():
            for item in _mixtures(seen, holder, inner):
                found.setdefault(item.block.name, []).append(item)
        kept = [item for name, items in found.items() for item in _best(name, items)]
        kept = [item for item in kept if not any(_is_around(item, other) for other in kept)]
        return _hold_together(model, Inputs("", args, dict(kwargs)), kept)


def _hold_together(model: nn.Module, inputs: Inputs, found: list[Found]) -> list[Found]:
    """The blocks, refused if the whole model computes something else once all of them are in canonical form."""
    moes = [i for i in found if i.block.status == "moe" and i.site is not None and i.block.spec is not None]
    reason = together.disagreement(
        model,
        inputs,
        {i.block.name: i.site for i in moes if i.site is not None},
        {i.block.name: i.block.spec for i in moes if i.block.spec is not None},
        {i.block.name: i.template for i in moes if i.template is not None},
    )
    if not reason:
        return found
    return [Found(_refused(i.block.name, reason)) if i.block.status == "moe" else i for i in found]


def _device(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """New tensors come to the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return contextlib.nullcontext() if device.type == "cpu" else device


@contextlib.contextmanager
def _threads(model: nn.Module) -> Iterator[None]:
    """One thread for small models: their products are shorter than the wait for a second one."""
    before = torch.get_num_threads()
    if together.is_small(model):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _cheap_collections() -> Iterator[None]:
    """Garbage collections inside look at new objects only; imported libraries have millions of old ones."""
    alone = gc.get_freeze_count() == 0
    if alone:
        gc.freeze()
    try:
        yield
    finally:
        if alone:
            gc.unfreeze()


def _best(name: str, items: list[Found]) -> list[Found]:
    """The lifts of one module, each under a name of its own, or its refusal when there are none."""
    lifted: list[Found] = []
    for item in items:
        if item.block.status != "refused" and not any(_same(item, other) for other in lifted):
            lifted.append(item)
    named = [replace(i, block=replace(i.block, name=f"{name}#{n}")) for n, i in enumerate(lifted[1:], start=2)]
    return [*lifted[:1], *named] or items[:1]


def _same(one: Found, other: Found) -> bool:
    """Whether two lifts, found from two selections, are one block."""
    a, b = one.block.spec, other.block.spec
    return one.site == other.site and (a is None or b is None or torch.equal(a.router.weight, b.router.weight))


def _is_around(item: Found, other: Found) -> bool:
    """Whether a block was found in a module around another, because code there uses the other's router again."""
    if item.site is None or other.site is None or item.site.path is None or other.site.path is None:
        return False
    outer, inner, a, b = item.site.path, other.site.path, item.block.spec, other.block.spec
    if a is None or b is None or outer == inner or not f"{inner}.".startswith(f"{outer}." if outer else ""):
        return False
    one, two = a.router.weight, b.router.weight
    return torch.equal(one, two) and (one.data_ptr() == two.data_ptr() or bool(one.any()))  # routers may all be zero


def _refused(name: str, reason: str) -> Block:
    return Block(name, "refused", reason)


def _in_chain(seen: Scan, chain: tuple[str, ...], done: set[tuple[object, ...]]) -> Iterator[Found]:
    """The blocks around one selection, from the innermost module that holds one whole."""
    refused: Block | None = None
    for path in list(dict.fromkeys(chain))[:CLIMB]:
        module = seen.calls[path].module
        inner: str | None = chain[0].removeprefix(path).lstrip(".") if path else chain[0]
        if isinstance(module, fx.GraphModule) and not path:
            inner = None
        if (path, id(module), inner) in done:
            return
        settled = False
        try:
            prober = Prober(seen.calls[path], flexible=not isinstance(module, fx.GraphModule))
            items, settled = _in_module(module, path, prober, inner)
        except Exception as error:  # one module that cannot be run or read must not hide the others
            _log.debug("analysing %r failed", path, exc_info=True)
            items = [Found(_refused(path or ".", f"it could not be analysed: {first_line(error)}"))]
        release()  # recordings are large, and their calls and values refer to each other
        reason = unreadable(module, path) if items and all(i.block.status == "refused" for i in items) else ""
        if reason:
            items = [Found(_refused(path or ".", reason))]
        lifted = [item for item in items if item.block.status != "refused"]
        if lifted:
            done.add((path, id(module), inner))
            yield from lifted
            return
        if items and (refused is None or _is_vague(refused)):
            refused = items[0].block
        if settled and not items:
            return
    if refused is not None:
        yield Found(refused)


def _mixtures(seen: Scan, holder: str, inner: list[str]) -> Iterator[Found]:
    """What weighs experts without selecting any, as refused blocks: in the module that holds them, or around it."""
    for path in dict.fromkeys((holder, holder.rpartition(".")[0])):
        relative = [i.removeprefix(path).lstrip(".") if path else i for i in inner]
        try:
            reasons = mixtures_in(seen.calls[path].module, Prober(seen.calls[path]), relative)
        except Exception:  # a module that cannot be read
            _log.debug("analysing %r failed", path, exc_info=True)
            reasons = []
        release()
        yield from (Found(_refused(path or ".", reason)) for reason in dict.fromkeys(reasons))
        if reasons:
            return


def _is_vague(block: Block) -> bool:
    """Whether a refusal only says that the experts are not in this module."""
    return block.reason.startswith("a selection by a router was found, but no experts")


def _in_module(module: nn.Module, path: str, prober: Prober, inner: str | None) -> tuple[list[Found], bool]:
    """The blocks of one module whose selection happens in its submodule `inner` (None: anywhere).

    Also whether no module around it need be looked at.
    """
    lifts = lift_module(module, prober, inner)
    found = [_prove(module, path, prober, item) for item in lifts.found]
    reasons = list(dict.fromkeys(lifts.reasons))
    if any(reason.startswith((NO_SELECTION, NO_WEIGHTS, NOT_A_SUM)) for reason in reasons):
        reasons = [_overflow(in_double(module), prober) or reasons[0], *reasons[1:]]
    found += [Found(_refused(path or ".", reason)) for reason in reasons]
    return found, lifts.settled


def _prove(module: nn.Module, path: str, prober: Prober, item: Trial) -> Found:
    """Place a lift in its module and prove it there."""
    binding, recording = item.binding, item.recording
    name = path or "."

    def spec(of: nn.Module) -> MoESpec:
        dtype = dtype_of(of)
        bound = binding.spec(recording, dict(named_state(of)))
        return bound.map_tensors(lambda t: t if t.dtype != torch.float64 else t.to(dtype))

    if binding.latent:
        bound = spec(module)
        projected = replace(bound, latent=None)
        return Found(Block(name, "latent", "it has latent projections already", projected))
    if binding.separate_router_input and not _is_tokenwise(item.randomised, prober):
        return Found(_refused(name, "its router reads other tokens than the one it routes"))
    reasons: list[str] = []
    for site, template in _places(module, path, item, reasons):
        candidate = Candidate(module, site, spec, _share(binding), _outputs(binding), template)
        try:
            with quiet():
                probes, reason = verify(candidate, item.shaken, prober)
                if not reason and isinstance(site, GraphSite) and (prober.hidden is None or not prober.flexible):
                    more, reason = verify_cut(candidate, item.shaken, binding, prober.seen())
                    probes += more
        except CaptureError as error:
            reasons.append(f"its router could not be captured as a graph ({error})")
            continue
        except Exception as error:  # a graph may hold for some shapes only
            _log.debug("proving %r failed", name, exc_info=True)
            reasons.append(f"it does not run on all inputs once it is rewritten: {first_line(error)}")
            continue
        if not reason:
            if isinstance(site, GraphSite) and site.path is None:
                name = site.output
            elif isinstance(site, PartsSite):
                name = _join(path, _common(site.router.path, site.experts.path)) or "."
            worst = max((p.error for p in probes), default=0.0)
            return Found(Block(name, "moe", "", spec(module), worst, probes), _at(site, path), template)
        reasons.append(reason)
        if reason == EMPTY:
            break
    reason = reasons[-1] if reasons else "what lies around the routed path could not be rewritten"
    reason = _overflow(item.randomised, prober) or reason
    return Found(_refused(name, reason + _MASKED if prober.masked and reason != EMPTY else reason))


#: What may explain that a block which is given a mask is not what it was read as.
_MASKED = (
    "; it is given a mask: what a mask does between a router and its experts is kept only where both are modules"
)


def _join(*paths: str) -> str:
    return ".".join(p for p in paths if p)


def _common(one: str, other: str) -> str:
    """Path of the innermost module that holds the submodules at two paths."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one.split("."), other.split("."), strict=False))
    return _join(*(part for part, _ in pairs))


def _is_tokenwise(module: nn.Module, prober: Prober) -> bool:
    """Whether a module gives the same outputs when its tokens are reversed; true when that cannot be tried."""
    inputs = prober.random("order", 2, 9, seed=77) if prober.flexible else prober.seen()
    if inputs is None or prober.hidden is None or prober.hidden.dim() > 3:
        return True
    ahead, back = (run_double(module, i) for i in (inputs, prober.reversed(inputs)))
    pairs = [(a, b.flip(tuple(range(b.dim() - 1)))) for a, b in zip(ahead, back, strict=True) if a.dim() > 1]
    return all(float((a - b).norm()) <= ORDER * float(a.norm()) for a, b in pairs if a.is_floating_point())


def _overflow(module: nn.Module, prober: Prober) -> str:
    """Says so when tokens past a capacity are dropped: many equal tokens do not all get the same; "" otherwise."""
    inputs = prober.alike(SEED)
    if inputs is None:
        return ""
    try:
        dropped = any(
            _tells_equal_tokens_apart(output.reshape(MANY, -1), module, prober)
            for output in run_double(module, inputs)
            if output.is_floating_point() and output.shape[-2:-1] == (MANY,)
        )
    except Exception:  # so many tokens are more than it takes
        return ""
    reason = f"tokens past an expert's capacity are dropped: of {MANY} equal tokens not all get the same output"
    return reason if dropped else ""


def _tells_equal_tokens_apart(rows: Tensor, module: nn.Module, prober: Prober) -> bool:
    """Whether the outputs [T, d] of equal tokens differ, and not because the module knows their places."""
    apart = (rows - rows[0]).norm(dim=1) > ORDER * rows[0].norm()
    return bool(apart.any()) and (not bool(apart[:FIRST].any()) or _is_tokenwise(module, prober))


def _places(
    module: nn.Module, path: str, item: Trial, reasons: list[str]
) -> Iterator[tuple[Site, fx.GraphModule | None]]:
    """Where a lift may be put back, least intrusive first; why a way is closed goes to `reasons`."""
    state = dict(named_state(item.randomised))
    is_graph = isinstance(module, fx.GraphModule) and not path  # it stays one
    parts = None if is_graph else parts_site("", item.binding, state)
    if parts is not None:
        try:
            yield finish_prefix(parts, item.randomised, item.binding), None
        except CaptureError as error:
            reasons.append(f"its router could not be captured as a graph ({error})")
    whole = None if is_graph else whole_site("", item.binding, state)
    if whole is not None:
        yield whole, None
    for experts in (0,) if is_graph else (0, item.binding.region.head.num_experts):
        try:
            template = None if is_graph else capture_at(module, item.inputs, experts)
        except CaptureError as error:
            reasons.append(f"what lies around the routed path could not be captured as a graph ({error})")
            continue
        nodes = graph_site(template, item.randomised, item.inputs, item.binding, experts)
        if nodes is not None:
            yield nodes, template
            return


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
