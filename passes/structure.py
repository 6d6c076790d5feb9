"""Look at a model's structure where its weights are not there: on the meta device.

Each distinct module that selects is filled with random weights of its shapes and lifted as usual, so that what is said
of it holds for its code. Nothing is proved for weights that nobody has seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentize.blocks import Block
from latentize.passes.copying import deep_copy
from latentize.passes.probes import Prober
from latentize.passes.scan import CLIMB, ModuleCall, Scan, scan
from latentize.passes.shaken import named_state
from latentize.passes.trial import SEED, lift_module, mixtures_in


def is_meta(model: nn.Module) -> bool:
    """Whether some of a model's weights are on the meta device."""
    return any(t.is_meta for t in [*model.parameters(), *model.buffers()])


def find_structure(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Block]:
    """The MoE blocks of a model on the meta device: sizes and rule, tensors on that device too, `max_error` None."""
    given = (args, dict(kwargs))
    args, kwargs = pytree.tree_map(lambda a: a.to("meta") if isinstance(a, Tensor) else a, given)
    try:
        with torch.device("meta"):
            seen = scan(model, args, kwargs)
    except Exception as error:
        return [Block(".", "refused", f"it does not run on the meta device ({type(error).__name__}); load its weights")]
    known: dict[tuple[object, ...], Block | None] = {}
    found: dict[str, Block] = {}
    for chain in seen.chains:
        for block in _in_chain(seen, chain, known):
            if block.status != "refused" or block.name not in found:
                found[block.name] = block
    for holder, inner in seen.mixtures.items():
        if holder not in found:
            found.update({block.name: block for block in _mixtures(seen.calls[holder], inner)})
    return list(found.values())


def _mixtures(call: ModuleCall, inner: list[str]) -> list[Block]:
    """What a module weighs without selecting any, as refused blocks."""
    filled = _filled(call)
    relative = [i.removeprefix(call.path).lstrip(".") if call.path else i for i in inner]
    try:
        reasons = mixtures_in(filled.module, Prober(filled), relative)
    except Exception:  # one module that cannot be read must not hide the others
        return []
    return [Block(call.path or ".", "refused", reason) for reason in reasons[:1]]


def _in_chain(seen: Scan, chain: tuple[str, ...], known: dict[tuple[object, ...], Block | None]) -> list[Block]:
    refused: Block | None = None
    for path in list(dict.fromkeys(chain))[:CLIMB]:
        call = seen.calls[path]
        inner = chain[0].removeprefix(path).lstrip(".") if path else chain[0]
        key = (inner, repr(call.module), *((n, tuple(t.shape), t.dtype) for n, t in named_state(call.module)))
        if key not in known:
            known[key] = _look(call, inner)
        block = known[key]
        if block is not None and block.status != "refused":
            return [replace(block, name=path or ".")]
        refused = refused or (None if block is None else replace(block, name=path or "."))
    return [] if refused is None else [refused]


def _look(call: ModuleCall, inner: str) -> Block | None:
    """The module as a block, lifted with random weights; None when it has no router."""
    filled = _filled(call)
    try:
        lifts = lift_module(filled.module, Prober(filled), inner)
    except Exception as error:  # one module that cannot be read must not hide the others
        return Block("", "refused", f"it could not be analysed: {type(error).__name__}: {str(error).strip()[:200]}")
    if not lifts.found:
        return Block("", "refused", lifts.reasons[0]) if lifts.reasons else None
    trial = lifts.found[0]
    spec = trial.binding.spec(trial.recording, dict(named_state(filled.module))).map_tensors(lambda t: t.to("meta"))
    return Block("", "latent" if trial.binding.latent else "moe", "", spec, None)


@torch.no_grad()
def _filled(call: ModuleCall) -> ModuleCall:
    """The call with its module and its arguments on the CPU, with random values."""
    generator = torch.Generator().manual_seed(SEED)
    module = deep_copy(call.module).to_empty(device="cpu")
    for _, tensor in named_state(module):
        _draw(tensor, generator)

    def fill(item: Any) -> Any:
        return _draw(torch.empty_like(item, device="cpu"), generator) if isinstance(item, Tensor) else item

    args, kwargs = pytree.tree_map(fill, (call.args, call.kwargs))
    return ModuleCall(call.path, module, args, kwargs)


def _draw(tensor: Tensor, generator: torch.Generator) -> Tensor:
    if not tensor.is_floating_point():
        return tensor.zero_()
    scale = tensor.shape[-1] ** -0.5 if tensor.dim() >= 2 else 0.3
    return tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
