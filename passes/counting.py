"""Code around the blocks that counts on how many experts there are: with more, its numbers mean something else.

The model in canonical form is held against the same with N and k doubled, which computes the same function, but whose
first N experts are not the N that there were.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from latentize.errors import LatentizeError, first_line
from latentize.inputs import buffers_kept
from latentize.moe import LatentExperts, LatentMoE
from latentize.passes import hf_config
from latentize.passes.averaged import Averaged, storage
from latentize.passes.blocks import LatentBlock, RoutedExperts
from latentize.passes.boundaries import join
from latentize.passes.double import in_fp64
from latentize.passes.in_training import changed, state_of
from latentize.passes.probes import Inputs
from latentize.passes.rewrite import replace_at, sharing_copy
from latentize.passes.siblings import renumbered
from latentize.passes.sites import Site
from latentize.passes.together import TOGETHER, TOGETHER_DOUBLE, is_small
from latentize.passes.widened import Widened
from latentize.rescale import map_experts
from latentize.spec import MoESpec

_log = logging.getLogger(__name__)

#: How often every expert is there in the model that is held against the canonical one.
FACTOR = 2


@dataclass(frozen=True)
class Counting:
    """What counts on the number of experts: lines to be told, and the first output of the model's own that does."""

    lines: tuple[str, ...] = ()
    wrong: str = ""


@dataclass(frozen=True)
class _Seen:
    """Numbers that one run left by name: outputs, buffers, attributes; and what of them it set. Or why it failed."""

    values: dict[str, Tensor] = field(default_factory=dict)
    set_anew: frozenset[str] = frozenset()
    failure: str = ""


@dataclass(frozen=True)
class Surroundings:
    """A model and the blocks in it, to be asked what the code around them makes of the number of experts.

    `places`, `specs` and `templates` are where the blocks sit, what they compute and the graphs of graph sites, by
    name. The model is left as it was, its buffers aside, which the caller keeps.
    """

    model: nn.Module
    inputs: Inputs
    places: Mapping[str, Site]
    specs: Mapping[str, MoESpec]
    templates: Mapping[str, fx.GraphModule]

    def counting(self, *, grows: bool) -> Counting:
        """Which outputs, buffers and attributes outside the blocks are computed with the number of experts.

        Args:
            grows: whether a block will have more experts, or select more; what training mode is like is asked anyhow.
        """
        exact = is_small(self.model)
        one = _run(self._canonical(), self.inputs, exact=exact)
        if one.failure and exact:  # not a model that runs in fp64
            exact, one = False, _run(self._canonical(), self.inputs, exact=False)
        tolerance = self._tolerance(exact=exact)
        lines: dict[str, str] = {}
        wrong = ""
        if grows:
            apart = _apart(one, _run(self._doubled(), self.inputs, exact=exact), tolerance)
            lines = {_place(name): f"{_place(name)} {_COUNTS}" for name in apart}
            own = [name for name in apart if name.startswith(_OUTPUT) and _is_large(one.values[name])]
            if own:
                behind = _apart(one, _run(_quieter(self._canonical()), self.inputs, exact=exact), tolerance)
                wrong = next((name for name in own if name in behind), "")
        lines |= self._in_training(set(lines), tolerance, grows=grows, exact=exact)
        return Counting(tuple(lines.values()), wrong)

    def _in_training(self, known: set[str], tolerance: float, *, grows: bool, exact: bool) -> dict[str, str]:
        """Lines on what is so in training mode alone, where the original runs in it."""
        if _run(sharing_copy(self.model), self.inputs, exact=exact, training=True).failure:
            return {}
        one = _run(self._canonical(), self.inputs, exact=exact, training=True)
        if one.failure:
            return {"": f"in training mode the rewritten model does not run: {one.failure}"}
        if not grows:
            return {}
        two = _run(self._doubled(), self.inputs, exact=exact, training=True)
        if two.failure:
            return {
                "": f"in training mode the rewritten model does not run: {two.failure}; the code around a block seems "
                "to count on its number of experts (variant: fixed keeps it)"
            }
        apart = {_place(name) for name in _apart(one, two, tolerance)} - known
        return {name: f"in training mode {name} {_COUNTS}" for name in sorted(apart)}

    def _canonical(self) -> nn.Module:
        blocks = {name: LatentMoE(spec) for name, spec in self.specs.items()}
        return replace_at(self.model, self.places, blocks, templates=self.templates)

    def _doubled(self) -> nn.Module:
        blocks = {name: _doubled(spec) for name, spec in self.specs.items()}
        whole = replace_at(self.model, self.places, blocks, templates=self.templates)
        hf_config.update(whole, [_Sizes(block) for block in blocks.values()])
        return whole

    def _tolerance(self, *, exact: bool) -> float:
        if exact:
            return TOGETHER_DOUBLE
        half = any(p.dtype in (torch.bfloat16, torch.float16) for p in self.model.parameters())
        return TOGETHER * (10.0 if half else 1.0)


_OUTPUT = "the model's output"
_COUNTS = (
    "is computed by code that counts on the number of experts: it means something else in the rewritten model, which "
    "has more (variant: fixed keeps the number)"
)


def _doubled(spec: MoESpec) -> LatentMoE:
    try:
        return renumbered(spec, FACTOR)
    except LatentizeError:  # experts that cannot be multiplied
        return LatentMoE(spec)


class _Sizes(LatentMoE):
    """A block from `_doubled` with its whole spec, for its sizes: the experts' weights in it are not there twice."""

    @property
    def spec(self) -> MoESpec:
        """The block's sizes."""
        spec = super().spec
        factor = len(spec.router.weight) // (spec.num_experts + spec.experts.num_identity)
        many = map_experts(spec.experts, lambda t: t.new_empty((factor * len(t), *t.shape[1:]), device="meta"))
        return replace(spec, experts=many)

    def __init__(self, block: LatentMoE) -> None:
        nn.Module.__init__(self)
        self.router, self.experts = block.router, block.experts


def _quieter(model: nn.Module) -> nn.Module:
    """The model with the output of the experts that run last halved, to see what depends on it."""
    calls = 0
    experts = [module for module in model.modules() if isinstance(module, LatentExperts)]

    def halve(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return output / 2 if calls == len(experts) else output

    for module in experts:
        module.register_forward_hook(halve)
    return model


def _place(name: str) -> str:
    """What is told of the name of a number: of a buffer or attribute that holds several, not which one it is."""
    return name if name.startswith(_OUTPUT) else "'".join(name.split("'")[:2]) + "'"


def _is_large(value: Tensor) -> bool:
    """Whether a value may be what a model is for, and no count or loss."""
    return value.is_floating_point() and value.numel() > 1


def _run(model: nn.Module, inputs: Inputs, *, exact: bool, training: bool = False) -> _Seen:
    """What one run of a model leaves, with random numbers at their mean; `exact`: in fp64."""
    if exact:
        model = Widened().copy(model)
    for module in model.modules():
        module.training = training
    parts = dict(_outside(model))
    before = {path: state_of(part) for path, part in parts.items()}
    watch = Averaged({storage(t): path for path, t in _tensors(parts) if not t.is_meta})
    given = inputs.to(torch.float64 if exact else None)
    with buffers_kept(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        try:
            with in_fp64() if exact else contextlib.nullcontext(), watch:
                output = model(*given.args, **given.kwargs)
        except Exception as error:  # whatever the model's code raises
            _log.debug("a model does not run (training: %s)", training, exc_info=True)
            return _Seen(failure=first_line(error))
        values, set_anew = _leaves(_OUTPUT, output), set[str]()
        set_anew.update(values)
        for path, part in parts.items():
            written = (name for name in _stored(part) if join(path, name) in watch.written)
            news = {*changed(before[path], state_of(part)), *written}
            for name, value in {**_attributes(part), **_stored(part)}.items():
                if name not in news and isinstance(value, Tensor):
                    continue
                found = _leaves(f"{'buffer' if name in part._buffers else 'attribute'} {join(path, name)!r}", value)
                values |= found
                set_anew.update(found if name in news else ())
    return _Seen(values, frozenset(set_anew))


def _outside(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module of a model that is not part of a block, by its path."""
    stack = [("", model)]
    while stack:
        path, module = stack.pop()
        if isinstance(module, (LatentMoE, LatentBlock, RoutedExperts, torch.jit.ScriptModule)):
            continue
        if hasattr(module, "_latentize_call"):  # a router that hooks still find
            continue
        yield path, module
        stack += [(join(path, name), child) for name, child in module._modules.items() if child is not None]


def _stored(part: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in [*part._parameters.items(), *part._buffers.items()] if t is not None}


def _tensors(parts: Mapping[str, nn.Module]) -> Iterator[tuple[str, Tensor]]:
    for path, part in parts.items():
        yield from ((join(path, name), tensor) for name, tensor in _stored(part).items())


def _attributes(part: nn.Module) -> dict[str, Any]:
    return {name: vars(part)[name] for name in state_of(part) if name in vars(part)}


def _leaves(name: str, value: Any) -> dict[str, Tensor]:
    """Copies of the tensors and numbers in a value, by where they are."""
    if is_dataclass(value) and not isinstance(value, (type, dict)):
        names = [each.name for each in fields(value)]
        if not hasattr(value, "__dict__"):
            return _leaves(name, {each: getattr(value, each) for each in names})
        held = vars(value)  # as it is kept: reading a field may run code
        return _leaves(name, {each: held[each] for each in names if each in held})
    found = {}
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        if isinstance(leaf, Tensor) and not leaf.is_meta:
            found[name + pytree.keystr(path)] = leaf.detach().clone()
        elif isinstance(leaf, (bool, int, float)):
            found[name + pytree.keystr(path)] = torch.tensor(leaf)
    return found


def _apart(one: _Seen, two: _Seen, tolerance: float) -> list[str]:
    """Names of what a run set to the same kind of number in both models, and not to the same number."""
    names = [name for name in one.values if name in two.values and name in one.set_anew | two.set_anew]
    return [name for name in names if _differs(one.values[name], two.values[name], tolerance)]


def _differs(value: Tensor, other: Tensor, tolerance: float) -> bool:
    if value.shape != other.shape or value.is_complex():
        return False
    a, b = value.double().nan_to_num(), other.double().nan_to_num()
    return float((a - b).norm()) > tolerance * max(float(a.norm()), 1e-12)
