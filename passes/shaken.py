"""One fp64 copy of a module with randomised weights. Its memory holds the trained ones while they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from latentize.passes.double import in_double

#: Numbers of a tensor that noise is made for at a time.
_AT_ONCE = 2**20


@dataclass(frozen=True)
class Shaken:
    """`module` is a copy of `original` in fp64, whose weights are other ones as soon as `randomise` was called."""

    original: nn.Module
    module: nn.Module
    _pairs: dict[str, tuple[Tensor, Tensor]]  # tensors of both by name; those of a part too
    _changed: set[str] = field(default_factory=set)
    _changes: list[Callable[[], object]] = field(default_factory=list)

    @classmethod
    def of(cls, original: nn.Module) -> Shaken:
        """A copy that is still equal to the original."""
        module = in_double(original)
        copies = dict(named_state(module))
        return cls(original, module, {name: (t, copies[name]) for name, t in named_state(original) if name in copies})

    def part(self, original: nn.Module, module: nn.Module) -> Shaken:
        """The same for something made of the original's tensors, and its like made of the copy's."""
        return replace(self, original=original, module=module)

    def randomise(self, names: set[str], seed: int) -> None:
        """Add noise to the named tensors, so that terms that happen to vanish show."""
        self._change(names, lambda tensors: _randomise(tensors, seed))

    def shrink(self, names: set[str], factor: float) -> None:
        """Multiply the named tensors by a factor."""
        self._change(names, lambda tensors: [tensor.mul_(factor) for tensor in tensors])

    @torch.no_grad()
    def _change(self, names: set[str], change: Callable[[list[Tensor]], object]) -> None:
        """Change floating tensors in place, now and whenever the trained ones have been in their memory."""
        found = {n: pair for n, pair in self._pairs.items() if n in names and pair[1].is_floating_point()}
        tensors = list({id(other): other for _, other in found.values()}.values())
        self._changed.update(found)
        self._changes.append(lambda: change(tensors))
        change(tensors)

    @contextmanager
    def trained(self) -> Iterator[nn.Module]:
        """The original in fp64, in the memory of `module`, which is not to be used inside and is as before after it."""
        parameters = [
            (one, other) for one, other in self._pairs.values()
            if isinstance(one, nn.Parameter) and other.dtype == torch.float64
        ]  # fmt: skip
        changed = [self._pairs[name] for name in self._changed]
        with torch.no_grad():
            for one, other in changed:
                other.copy_(one)
        try:
            yield in_double(self.original, {id(one): other for one, other in [*parameters, *changed]})
        finally:
            with torch.no_grad():
                for change in self._changes:
                    change()


def named_state(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, tied ones under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _randomise(tensors: list[Tensor], seed: int) -> None:
    """Add noise to floating tensors, in place."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in tensors:
        size = float(torch.linalg.vector_norm(tensor, dtype=torch.float64)) / max(1, tensor.numel()) ** 0.5
        floor = tensor.shape[-1] ** -0.5 if tensor.dim() >= 2 else 0.1
        scale = size if size > 1e-2 * floor else floor
        for part in _slices(tensor):
            noise = torch.randn(part.shape, generator=generator, dtype=torch.float64, device="cpu")
            part.add_((0.5 * scale * noise).to(part))


def _slices(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor as views of at most `_AT_ONCE` numbers, or of as few as its first axis allows."""
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(_AT_ONCE)
    else:
        yield from tensor.split(max(1, _AT_ONCE * len(tensor) // tensor.numel()))
