"""Run a model once and note where selections happen and what each submodule was called with."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from latentize.inputs import buffers_kept
from latentize.passes.double import evaluating, kernel
from latentize.passes.graph import CONTRACTIONS, SCORES, SELECTIONS

#: Levels above the module that selects in which the experts are looked for.
CLIMB = 4
#: Slots that an expert of a soft mixture may have.
SLOTS = range(1, 5)


@dataclass(frozen=True)
class ModuleCall:
    """The arguments a submodule was called with, tensors included."""

    path: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass
class Scan:
    """Where a model selects: the open module paths of each selection, innermost first, every module's first call.

    `mixtures` are scores that nothing selects by: the modules that compute them, by the module that holds experts.
    """

    chains: list[tuple[str, ...]] = field(default_factory=list)
    mixtures: dict[str, list[str]] = field(default_factory=dict)
    calls: dict[str, ModuleCall] = field(default_factory=dict)
    count: dict[str, int] = field(default_factory=dict)  # calls of each module in one run


class _Watcher(TorchDispatchMode):
    """Notes the open modules of every selection, and of every score that may weigh a mixture of experts."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.open: list[str] = []
        self.chains: dict[tuple[str, ...], None] = {}
        self.mixtures: dict[str, str] = {}  # the module that holds experts, by the module that scores
        self.modules = dict(model.named_modules())
        self.weights = {_storage(p) for p in model.parameters()}
        self.projected = WeakTensorKeyDictionary()
        self.holds: dict[tuple[str, int], bool] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        name = name if name.startswith("_") else name.rstrip("_")
        first = args[0] if args and isinstance(args[0], Tensor) and args[0].is_floating_point() else None
        if first is not None and name in SELECTIONS:
            self.chains[tuple(reversed(self.open))] = None
        if first is not None and name in SCORES and first in self.projected and self.open:
            holder = self._near_experts(first)
            if holder is not None:
                self.mixtures[self.open[-1]] = holder
        if name == "_local_scalar_dense" and args[0].is_meta:
            return _assumed(args[0].dtype)
        result = kernel(func, args)(*args, **(kwargs or {}))
        given = [a for a in pytree.tree_leaves(args) if isinstance(a, Tensor)]
        if name in CONTRACTIONS:
            projected = any(_storage(a) in self.weights for a in given)
        else:
            projected = any(a in self.projected for a in given)
        if projected:
            self.projected.update({r: True for r in pytree.tree_leaves(result) if isinstance(r, Tensor)})
        return result

    def _near_experts(self, logits: Tensor) -> str | None:
        """The nearest open module that holds weights for as many experts as there are logits, or for a part of them."""
        last = logits.shape[-2:] if logits.dim() >= 2 else ()
        sizes = {size // slots for size in last for slots in SLOTS if size % slots == 0}
        for path, size in itertools.product(reversed(self.open[-CLIMB:]), sizes):
            if (path, size) not in self.holds:
                self.holds[path, size] = holds_experts(self.modules[path], size)
            if self.holds[path, size]:
                return path
        return None


def holds_experts(module: nn.Module, count: int) -> bool:
    """Whether a module holds at least two matrices for each of `count` experts: stacked, or in equal submodules."""
    if count < 2:
        return False
    stacked = sum(p.dim() >= 3 and p.shape[0] == count for p in module.parameters())
    return stacked >= 2 or sum(_matrices_in_equal_children(m, count) for m in module.modules()) >= 2


def _matrices_in_equal_children(module: nn.Module, count: int) -> int:
    """Matrices in each of exactly `count` children, or parameters, of equal shapes."""
    children = Counter(tuple(p.shape for p in c.parameters() if p.dim() >= 2) for c in module.children())
    own = Counter((p.shape,) for p in module.parameters(recurse=False) if p.dim() >= 2)
    return sum(len(shapes) for found in (children, own) for shapes, times in found.items() if times == count)


def _storage(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return id(tensor)


def _assumed(dtype: torch.dtype) -> bool | int | float:
    """What a condition on a value that is not there is taken to be: that it holds."""
    return True if dtype == torch.bool else 1.0 if dtype.is_floating_point else 1


def scan(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Scan:
    """Run `model` once in eval mode without gradients, leaving it, its inputs and the random state as they were.

    Raises:
        Exception: whatever the model raises on these inputs.
    """
    result = Scan()
    watcher = _Watcher(model)
    paths: dict[int, str] = {}
    for name, module in model.named_modules():
        paths.setdefault(id(module), name)

    def enter(module: nn.Module, a: tuple[Any, ...], k: dict[str, Any]) -> None:
        path = paths[id(module)]
        watcher.open.append(path)
        result.calls.setdefault(path, ModuleCall(path, module, a, dict(k)))
        result.count[path] = result.count.get(path, 0) + 1

    def leave(module: nn.Module, *_: Any) -> None:  # noqa: ARG001
        watcher.open.pop()

    with untouched(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        handles = [m.register_forward_pre_hook(enter, with_kwargs=True, prepend=True) for m in _modules(model)]
        handles += [m.register_forward_hook(leave, with_kwargs=True, always_call=True) for m in _modules(model)]
        try:
            with watcher:
                model(*_cloned(args), **_cloned(dict(kwargs)))
        finally:
            for handle in handles:
                handle.remove()
    result.chains = list(watcher.chains)
    for path, holder in watcher.mixtures.items():
        if not any(_of_one_block(path, chain[0]) for chain in watcher.chains):
            result.mixtures.setdefault(holder, []).append(path)
    return result


def _of_one_block(one: str, other: str) -> bool:
    """Whether two modules are the same, parent and child, or children of one module that is not the model."""
    parents = one.rpartition(".")[0], other.rpartition(".")[0]
    return one == other or one == parents[1] or other == parents[0] or (parents[0] == parents[1] != "")


def _modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]


def _cloned(tree: Any) -> Any:
    return pytree.tree_map(lambda a: a.clone() if isinstance(a, Tensor) else a, tree)


#: Attributes of modules that a run may count in.
_PLAIN = (bool, int, float, str, type(None))


@contextlib.contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode inside; training modes, buffers, plain attributes and random states are put back on leaving."""
    modes = {m: m.training for m in model.modules()}
    plain = {m: {k: v for k, v in vars(m).items() if isinstance(v, _PLAIN)} for m in modes}
    held = pytree.tree_leaves([list(vars(m).values()) for m in modes])
    generators = [(v, v.get_state()) for v in held if isinstance(v, torch.Generator)]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with buffers_kept(model), torch.random.fork_rng(devices=devices):
        evaluating(model)
        try:
            yield
        finally:
            for module, values in plain.items():
                module.__dict__.update(values)
            for generator, state in generators:
                generator.set_state(state)
            for module, mode in modes.items():
                module.training = mode
