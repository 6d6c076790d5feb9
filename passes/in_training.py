"""What a module that is replaced does beside its output, or in training mode alone: its replacement does not do it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentize.inputs import buffers_kept, owned
from latentize.passes.averaged import Averaged, storage
from latentize.passes.boundaries import join
from latentize.passes.probes import Inputs
from latentize.passes.rewrite import sharing_copy
from latentize.passes.sites import GraphSite, PartsSite, Site

_log = logging.getLogger(__name__)

#: Relative difference above which an output in training mode is another one, by whether its dtype is exact.
APART, APART_HALF = 1e-4, 5e-2
#: Names that a line gives before it counts the others.
NAMED = 3


@dataclass(frozen=True)
class _Run:
    """One run of a module: its output, and which tensors of its own and attributes it read and wrote."""

    output: Any
    read: frozenset[str]
    written: frozenset[str]
    drawn: tuple[str, ...]


def lost_in_training(model: nn.Module, inputs: Inputs, places: Mapping[str, Site]) -> list[str]:
    """A line for each block of which something is lost when the modules at its place are replaced.

    Modules are replaced by what they compute in evaluation mode. Each is run on what the model gives it, in both modes,
    with random numbers at their mean; nothing is said of one that does not run in training mode.

    Args:
        model: the original; it is left as it was, its buffers aside, which the caller keeps.
        inputs: example inputs.
        places: where the blocks sit, by name.
    """
    copy = sharing_copy(model)
    found: dict[str, dict[str, None]] = {}
    handles = []
    asked: set[int] = set()
    for name, site in places.items():
        for path in replaced(site):
            module = copy.get_submodule(path)
            if id(module) not in asked:
                asked.add(id(module))
                handles.append(_listen(module, path, isinstance(site, GraphSite), found.setdefault(name, {})))
    if not handles:
        return []
    try:
        given = inputs.to(None)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            copy(*given.args, **given.kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [f"{name}: {line}" for name, lines in found.items() for line in lines]


def replaced(site: Site) -> tuple[str, ...]:
    """Paths of the modules that are gone once a block is rewritten."""
    if isinstance(site, PartsSite):
        return join(site.path, site.router.path), join(site.path, site.experts.path)
    return () if site.path is None else (site.path,)


def _listen(module: nn.Module, path: str, whole: bool, lines: dict[str, None]) -> Any:
    seen = False

    def ask(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal seen
        if seen:
            return
        seen = True
        try:
            calm = _run(module, args, kwargs, training=False)
            trained = _run(module, args, kwargs, training=True)
        except Exception:  # what does not run in training mode loses nothing
            _log.debug("%r does not run in training mode", path, exc_info=True)
            return
        lines.update(dict.fromkeys(_compared(calm, trained, path, whole)))

    return module.register_forward_pre_hook(ask, with_kwargs=True)


def _compared(calm: _Run, trained: _Run, path: str, whole: bool) -> Iterator[str]:
    """What is lost of a module at `path`; `whole`: of one that becomes a graph of its evaluation, as it stands."""
    written = sorted(join(path, name) for name in trained.written | calm.written)
    if written:
        when = "" if trained.written <= calm.written else "in training mode "
        yield f"{when}its forward changes {_list(written)}; rewritten, it does not"
    read = sorted(join(path, name) for name in trained.read - calm.read - trained.written)
    apart = _apart(calm.output, trained.output)
    if apart or read:
        what = f"reads {_list(read)}" if read else "computes something else"
        how = f" ({apart})" if apart else ""
        yield f"in training mode it {what}{how}; rewritten, it computes in both modes what it does in evaluation"
    drawn = [name for name in trained.drawn if name not in calm.drawn]
    if drawn:
        where = " around its routed path" if whole else ""
        names = ", ".join(drawn)
        yield f"in training mode it draws random numbers ({names}); rewritten, it has no dropout or noise{where}"


def _list(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _apart(calm: Any, trained: Any) -> str:
    """How an output differs from another; "" where it does not."""
    ones, one = pytree.tree_flatten(calm)
    others, other = pytree.tree_flatten(trained)
    if one != other or len(ones) != len(others):
        return "another structure of its output"
    for a, b in zip(ones, others, strict=True):
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if isinstance(a, Tensor) is not isinstance(b, Tensor):
                return "another structure of its output"
            continue
        if a.shape != b.shape:
            return f"its output is {list(b.shape)} where it was {list(a.shape)}"
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return "other whole numbers in its output"
            continue
        error = float((a.double() - b.double()).nan_to_num().norm() / b.double().nan_to_num().norm().clamp_min(1e-30))
        if error > (APART if a.dtype in (torch.float32, torch.float64) else APART_HALF):
            return f"its output differs by {error:.1e}, dropout and noise aside"
    return ""


def _run(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, training: bool) -> _Run:
    """Run a module as it is called inside its model, in a mode; afterwards it is as it was."""
    parts = {name: part for name, part in module.named_modules() if not isinstance(part, torch.jit.ScriptModule)}
    modes = {part: part.training for part in parts.values()}
    held = {part: dict(vars(part)) for part in parts.values()}
    known = {storage(t): name for name, t in [*module.named_parameters(), *module.named_buffers()] if not t.is_meta}
    before = {name: state_of(part) for name, part in parts.items()}
    given, named = owned(args, kwargs)
    watch = Averaged(known)
    try:
        for part in modes:
            part.training = training
        with buffers_kept(module), torch.random.fork_rng(devices=[]):
            with watch:
                output = module.forward(*given, **named)
            after = {name: state_of(part) for name, part in parts.items()}
            output = pytree.tree_map(lambda a: a.detach().clone() if isinstance(a, Tensor) else a, output)
    finally:
        for part, values in held.items():
            vars(part).clear()
            vars(part).update(values)
        for part, mode in modes.items():
            part.training = mode
    set_anew = {join(name, key) for name in parts for key in changed(before[name], after[name])}
    return _Run(output, frozenset(watch.read), frozenset(set_anew) | frozenset(watch.written), tuple(watch.drawn))


#: What every module has: none of it is what a forward counts in.
_OWN = frozenset(vars(nn.Module()))


def state_of(module: nn.Module) -> dict[str, tuple[object, ...]]:
    """What a module holds beside parameters and submodules, by name: numbers by value, all else by identity."""
    attributes = {name: value for name, value in vars(module).items() if name not in _OWN}
    held = {**attributes, **module._buffers}
    return {name: tuple(map(_mark, pytree.tree_leaves(value))) for name, value in held.items()}


def _mark(leaf: object) -> object:
    return leaf if isinstance(leaf, (bool, int, float, str)) else id(leaf)


def changed(before: Mapping[str, tuple[object, ...]], after: Mapping[str, tuple[object, ...]]) -> list[str]:
    """Names of what is there anew, or is another."""
    return [name for name, value in after.items() if before.get(name) != value]
