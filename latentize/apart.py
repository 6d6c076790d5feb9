"""A rewritten model taken apart from its original: everything that it shared becomes its own, with the same values.

Only then can what is outside the blocks be trained and the original stay as it is. What shared memory within the model
goes on sharing it, tied embeddings for example.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from latentize.conversion import Rewritten
from latentize.errors import ResourceError
from latentize.passes.copying import deep_copy
from latentize.sources import out_of_memory


def apart(student: Rewritten) -> Rewritten:
    """A student that holds copies of all parameters and buffers outside its blocks; those of the blocks stay its own.

    Parameters that are the same memory become the same parameter. `copies` of the result says which stands for which.

    Raises:
        ResourceError: out of memory.
    """
    inside = {id(t): t for block in student.blocks.values() for t in _tensors(block)}
    outside = list({id(t): t for t in _tensors(student.model) if id(t) not in inside}.values())
    try:
        own = _copied(outside)
        model, blocks = deep_copy((student.model, dict(student.blocks)), {**inside, **own})
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise ResourceError(
            "heal_train all: out of memory while everything outside the blocks was copied, so that the original stays "
            "as it is; train the latent blocks alone (heal_train: latent), or use a machine with more memory"
        ) from error
    pairs = [(t, own[id(t)]) for t in outside if isinstance(t, nn.Parameter)]
    return replace(student, model=model, blocks=blocks, copies=tuple(pairs))


def write_back(copies: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Give every parameter that was copied the values of its copy."""
    for original, own in copies:
        if torch.equal(original, own):
            continue
        with torch.inference_mode(original.is_inference()), torch.no_grad():
            original.copy_(own)


def entangled(parameters: Mapping[str, Tensor]) -> set[str]:
    """The names of parameters some of whose numbers are also other parameters', which cannot be trained one by one."""
    found = {name for name, parameter in parameters.items() if _repeats(parameter)}
    groups: dict[Any, list[str]] = defaultdict(list)
    for name in parameters.keys() - found:
        groups[parameters[name].device, parameters[name].untyped_storage().data_ptr()].append(name)
    for names in (group for group in groups.values() if len(group) > 1):
        if len({parameters[name].dtype for name in names}) > 1:
            found.update(names)
            continue
        first = parameters[names[0]]
        uses = torch.zeros(first.untyped_storage().nbytes() // first.element_size(), dtype=torch.int32)
        views = {
            name: uses.as_strided(p.shape, p.stride(), p.storage_offset())
            for name, p in ((name, parameters[name]) for name in names)
        }
        for view in views.values():
            view += 1
        found.update(name for name, view in views.items() if bool((view > 1).any()))
    return found


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _copied(tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """A copy of each tensor by its id; those in one piece of memory are again, in another one."""
    groups: dict[Any, list[Tensor]] = defaultdict(list)
    found: dict[int, Tensor] = {}
    for tensor in tensors:
        if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or not tensor.numel():
            found[id(tensor)] = copy.deepcopy(tensor)
        else:
            groups[tensor.device, tensor.untyped_storage().data_ptr()].append(tensor)
    for group in groups.values():
        places = {_place(tensor) for tensor in group}
        alone = len(places) == 1 and not _repeats(group[0])
        memory = None if alone else group[0].untyped_storage().clone()
        made: dict[Any, tuple[Tensor, nn.Parameter | None]] = {}
        for tensor in group:
            place = _place(tensor)
            if place not in made:
                made[place] = _again(tensor, memory), None
            data, parameter = made[place]
            if isinstance(tensor, nn.Parameter):
                if parameter is None:
                    trained = any(t.requires_grad for t in group if _place(t) == place)
                    parameter = nn.Parameter(data, requires_grad=trained)
                    made[place] = data, parameter
                found[id(tensor)] = parameter
            else:
                found[id(tensor)] = data
    return found


def _repeats(tensor: Tensor) -> bool:
    """Whether several places of a tensor are one in memory, as in an expanded one."""
    return any(size > 1 and not step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _place(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _again(tensor: Tensor, memory: torch.UntypedStorage | None) -> Tensor:
    """The tensor's values in new memory, or its place in `memory`, a copy of all that it is a part of."""
    if memory is None:
        return tensor.detach().clone()
    empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return empty.set_(memory, tensor.storage_offset(), tensor.shape, tensor.stride())
