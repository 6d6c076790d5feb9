"""Inputs to try a module on: other lengths and batch sizes, idle and overloaded experts, several magnitudes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentize.inputs import own
from latentize.passes.copying import deep_copy
from latentize.passes.scan import ModuleCall

#: Tokens of the example inputs that are used.
ENOUGH = 128
#: Size of numbers that stand for "never" in a mask.
HUGE = 1e4
#: Share of a mask that is set when it is drawn anew.
KEPT = 0.7
#: Tokens that are sent to one expert, past any capacity worth the name.
MANY = 400


@dataclass(frozen=True)
class Inputs:
    """Arguments for one call of a module."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    optional: bool = False  # whether the module may reject them

    def to(self, dtype: torch.dtype | None) -> Inputs:
        """The same with copies of floating tensors in `dtype`, None: their own; the call may write to its inputs."""
        args, kwargs = pytree.tree_map(lambda a: _copied(a, dtype), (self.args, self.kwargs))
        return Inputs(self.name, args, kwargs, self.optional)

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments."""
        return [a for a in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(a, Tensor)]


def _copied(item: Any, dtype: torch.dtype | None) -> Any:
    if not isinstance(item, Tensor):
        return own(item)
    return item.detach().to(dtype).clone() if item.is_floating_point() else item.detach().clone()


@dataclass(frozen=True)
class Prober:
    """Makes inputs for one module after the call that it was seen with."""

    call: ModuleCall
    flexible: bool = True  # whether the module takes other sizes for all that is known; graphs may hold for some only

    @classmethod
    def of(cls, module: nn.Module, inputs: Inputs) -> Prober:
        """Makes inputs like the given ones."""
        return cls(ModuleCall("", module, inputs.args, inputs.kwargs))

    @property
    def hidden(self) -> Tensor | None:
        """The only floating tensor among the arguments, if there is just one and no other tensor."""
        tensors = self._given.tensors()
        if len(tensors) == 1 and tensors[0].is_floating_point() and tensors[0].dim() >= 2:
            return tensors[0]
        return None

    @property
    def _given(self) -> Inputs:
        return Inputs("example inputs", self.call.args, self.call.kwargs)

    @functools.cached_property
    def channels(self) -> int:
        """The axis of the hidden states that is their width: the last, or 1 in convolutional code.

        Where the sizes of weights leave it open, it is the axis without which the module still runs when halved.
        """
        like = self.hidden
        if like is None or like.dim() not in (3, 4):
            return -1
        sizes = {size for p in self.call.module.parameters() for size in p.shape}
        order = (-1, 1) if like.dim() == 3 else (1, -1)
        known = [axis for axis in order if like.shape[axis] in sizes]
        if len(known) == 1 or like.shape[order[0]] == like.shape[order[1]]:
            return (known or order)[0]
        return next((axis for axis in order if self._runs_without(1 if axis == -1 else -1)), order[0])

    def _runs_without(self, axis: int) -> bool:
        """Whether the module runs when all but one place of an axis are taken away."""
        assert self.hidden is not None
        cut = self.with_hidden("", self.hidden.narrow(axis, 0, 1))
        try:
            with torch.no_grad():
                deep_copy(self.call.module)(*cut.args, **cut.kwargs)
        except Exception:  # then it is the width
            return False
        return True

    def _last(self, hidden: Tensor) -> Tensor:
        """Hidden states with their width as the last axis."""
        return hidden.movedim(self.channels, -1)

    def _laid(self, name: str, values: Tensor) -> Inputs:
        """The call with hidden states whose width is the last axis here."""
        assert self.hidden is not None
        return self.with_hidden(name, values.movedim(-1, self.channels).to(self.hidden).contiguous())

    def seen(self) -> Inputs:
        """The call as it was seen; of long hidden states the first tokens."""
        hidden = self.hidden
        if hidden is None or hidden.dim() > 3 or hidden.numel() <= ENOUGH * hidden.shape[self.channels]:
            return self._given
        last = self._last(hidden)
        return self._laid("example inputs", last[:2, : ENOUGH // 2] if hidden.dim() == 3 else last[:ENOUGH])

    def reversed(self, inputs: Inputs) -> Inputs:
        """The same tokens in reverse order, for a module whose only tensor is its hidden states."""

        (tensor,) = inputs.tensors()
        last = self._last(tensor)
        return self._laid(f"{inputs.name}, reversed", last.flip(tuple(range(last.dim() - 1))))

    def with_hidden(self, name: str, hidden: Tensor) -> Inputs:
        """The call with its hidden states replaced."""
        args, kwargs = pytree.tree_map(
            lambda a: hidden if isinstance(a, Tensor) else a, (self.call.args, self.call.kwargs)
        )
        return Inputs(name, args, kwargs, optional=not self.flexible)

    def random(
        self, name: str, batch: int, tokens: int, seed: int, spread: float = 0.0, loudness: float = 1.0
    ) -> Inputs | None:
        """Random hidden states of the module's rank, magnitudes spread by exp(±spread); None when it takes more."""
        like = self.hidden
        if like is None:
            return None
        generator = torch.Generator().manual_seed(seed)
        shape = _shape(self._last(like), batch, tokens)
        size = loudness * (float(like.double().square().mean().sqrt()) or 1.0)
        values = _normal(shape, generator) * size
        if spread:
            drawn = torch.rand((*shape[:-1], 1), generator=generator, dtype=torch.float64, device="cpu")
            values = values * torch.exp(spread * (2 * drawn - 0.7))
        return self._laid(name, values)

    def directed(self, name: str, directions: Tensor, seed: int) -> Inputs | None:
        """Tokens along each of `directions` [N, d], so that every expert is selected; None where that is impossible."""
        like = self.hidden
        if like is None or like.dim() > 3 or like.shape[self.channels] != directions.shape[1]:
            return None
        generator = torch.Generator().manual_seed(seed)
        size = float(like.double().square().mean().sqrt()) or 1.0
        unit = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12) * directions.shape[1] ** 0.5
        rows = torch.cat([unit.cpu() + 0.3 * _normal(unit.shape, generator) for _ in range(4)])
        rows = rows * size
        shape = (1, *rows.shape) if like.dim() == 3 else rows.shape
        return self._laid(name, rows.reshape(shape))

    def extremes(self, seed: int) -> list[Inputs]:
        """Quiet, loud and one-signed tokens, which show what happens on one side of a threshold only.

        Not so loud that a sigmoid rounds to one: scores would tie.
        """
        quiet = [self.random("quiet tokens", 1, 24, seed, spread=1.0, loudness=size) for size in (0.02, 0.1, 0.3)]
        loud = [self.random("loud tokens", 1, 24, seed + 1, spread=0.5, loudness=size) for size in (3.0, 5.0)]
        found = [p for p in (*quiet, *loud) if p is not None]
        if found:
            (tensor,) = found[-1].tensors()
            signs = (("negative tokens", -0.3), ("positive tokens", 0.3))
            found += [self.with_hidden(name, sign * tensor.abs()) for name, sign in signs]
        return found

    #: Tokens of the inputs with gaps.
    GAPPED = 12

    def with_gaps(self, name: str, seed: int) -> tuple[Inputs, list[int]] | None:
        """Random tokens with some of all zeros among them, as padding leaves them, and which those are."""
        like = self.hidden
        if like is None or like.dim() > 3:
            return None
        empty = [3, 7, 8]
        found = self.random(name, 1, self.GAPPED, seed)
        assert found is not None
        (tensor,) = found.tensors()
        filled = self._last(tensor).clone(memory_format=torch.contiguous_format)
        filled.view(self.GAPPED, -1)[empty] = 0
        return self._laid(name, filled), empty

    @property
    def masked(self) -> bool:
        """Whether masks are among the arguments, beside hidden states or ids."""
        return len(self._given.tensors()) > 1 and any(t.dim() > 0 and _is_mask(t) for t in self._given.tensors())

    def unmasked(self) -> Iterator[Inputs]:
        """The call with every mask that leaves some tokens out set throughout, and with none of it set."""
        mixed = [t for t in self._given.tensors() if _is_mask(t) and bool((t == 0).any()) and bool((t != 0).any())]
        if not mixed or len(mixed) == len(self._given.tensors()):
            return
        for name, filled in (("set", torch.ones_like), ("empty", torch.zeros_like)):
            change = functools.partial(_replaced, old=mixed, new=filled)
            args, kwargs = pytree.tree_map(change, (self.call.args, self.call.kwargs))
            yield Inputs(f"example inputs, masks {name}", args, kwargs, optional=True)

    def others(self) -> list[Inputs]:
        """Inputs of other lengths that the module may or may not take."""
        found = [self.random("one token", 1, 1, MANY), self.random("batch of 3 × 11", 3, 11, MANY)]
        return [inputs for inputs in found if inputs is not None] or list(self._resized(((1, 1), (3, 11))))

    def longer(self, tokens: int) -> list[Inputs]:
        """The call with more tokens than it was seen with, shaken; empty where its arguments have no axis of them."""
        found = list(self._resized(((2, tokens // 2), (1, tokens))))
        return [shaken for item in found for shaken in itertools.islice(Prober(self._as(item))._shaken(tokens), 1)]

    def _as(self, inputs: Inputs) -> ModuleCall:
        return ModuleCall(self.call.path, self.call.module, inputs.args, inputs.kwargs)

    def _resized(self, sizes: Sequence[tuple[int, int]] = ((1, 1), (1, 7), (3, 11))) -> Iterator[Inputs]:
        """The call with other numbers of sequences and tokens, wherever its arguments have an axis of them."""
        main = max(self._given.tensors(), key=lambda t: (t.dim() in (2, 3), t.numel()), default=None)
        if main is None or main.dim() < 2:
            return
        width = main.shape[-1] if main.is_floating_point() else 0
        batch, tokens = (main.shape[0], main.shape[1]) if main.dim() > 2 or _is_ids(main) else (0, main.shape[0])
        for few, many in sizes:
            places = {tokens: torch.arange(many) * 7 % max(1, tokens), batch: torch.arange(few) % max(1, batch)}
            gather = functools.partial(_gathered, places=places, width=width)
            args, kwargs = pytree.tree_map(gather, (self.call.args, self.call.kwargs))
            yield Inputs(f"batch of {few} × {many}", args, kwargs, optional=True)

    def _shaken(self, seed: int) -> Iterator[Inputs]:
        """The call with its floating arguments shaken, quiet, loud and turned round, its ids exchanged, other masks."""
        generator = torch.Generator().manual_seed(seed)
        for name, noise, factor in (
            ("shaken", 0.5, 1.0), ("shaken anew", 1.0, 1.0), ("quiet", 0.2, 0.1), ("loud", 0.2, 4.0),
            ("negated", 0.2, -1.0),
        ):  # fmt: skip
            change = functools.partial(_shake, noise=noise, factor=factor, generator=generator)
            args, kwargs = pytree.tree_map(change, (self.call.args, self.call.kwargs))
            yield Inputs(f"example inputs {name}", args, kwargs, optional=True)

    def proofs(self, seed: int) -> list[Inputs]:
        """Inputs that a lift must survive: the example, one token, odd lengths, a batch, all tokens alike."""
        found = [self.seen()]
        like = self.hidden
        if like is None:
            return [*found, *self._shaken(seed), *self._resized()]
        if not self.flexible:
            found += [*self._shaken(seed), self._all_alike(seed)]
        wanted = [("one token", 1, 1), ("7 tokens", 1, 7), ("batch of 3 × 11", 3, 11), ("64 tokens", 2, 32)]
        wanted += [("batch of 9 × 2", 9, 2)]
        found += [p for n, b, t in wanted if (p := self.random(n, b, t, seed + b + t, spread=0.5)) is not None]
        alike = self.alike(seed)
        return found if alike is None else [*found, alike]

    def _all_alike(self, seed: int) -> Inputs:
        """As many tokens as in the example, all equal."""
        assert self.hidden is not None
        last = self._last(self.hidden)
        values = _normal((last.shape[-1],), torch.Generator().manual_seed(seed))
        size = float(last.double().square().mean().sqrt()) or 1.0
        return self._laid("equal tokens, most experts idle", (size * values).expand(last.shape))

    def alike(self, seed: int) -> Inputs | None:
        """Many equal tokens, all for the same experts; None where the module takes more than hidden states."""
        one = self.random("one token", 1, 1, seed + 1)
        if one is None or self.hidden is None or self.hidden.dim() > 3:
            return None
        (tensor,) = one.tensors()
        last = self._last(tensor)
        repeat = [MANY if axis == last.dim() - 2 else 1 for axis in range(last.dim())]
        return self._laid(f"{MANY} equal tokens, most experts idle", last.repeat(repeat))


def in_proportion(inputs: Inputs, outputs: Sequence[Tensor], other: Inputs, others: Sequence[Tensor]) -> bool:
    """Whether a module's outputs are as large for its first input as others are for another: one for each token.

    Where they are not, sizes that are written into a graph were stretched over tokens that they are not meant for.
    """
    ones, twos = (next((t.numel() for t in given.tensors() if t.dim() > 1), 0) for given in (inputs, other))
    return all(a.numel() * twos == b.numel() * ones for a, b in zip(outputs, others, strict=True))


def _shape(like: Tensor, batch: int, tokens: int) -> tuple[int, ...]:
    """Shape of hidden states like those given, with their width as the last axis."""
    if like.dim() == 2:
        return (batch * tokens, like.shape[1])
    if like.dim() == 3:
        return (batch, tokens, like.shape[2])
    if like.dim() == 4:
        return (batch, tokens, 2 if tokens > 1 else 1, like.shape[3])
    return tuple(like.shape)


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Normal numbers in fp64, drawn on the CPU whatever the default device."""
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _is_ids(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.int64, torch.int32)


def _is_mask(tensor: Tensor) -> bool:
    """Whether a tensor holds truth values, or zeros and ones alone; one floating number by itself is no mask."""
    if tensor.dtype == torch.bool:
        return True
    numbers = _is_ids(tensor) or (tensor.is_floating_point() and tensor.numel() > 1)
    return numbers and bool(((tensor == 0) | (tensor == 1)).all())


def _gathered(item: Any, places: dict[int, Tensor], width: int) -> Any:
    """A tensor with the places given for an axis of some length taken from every such axis but that of the width."""
    if not isinstance(item, Tensor):
        return item
    for axis in range(item.dim() - int(item.shape[-1:] == (width,))):
        chosen = places.get(item.shape[axis])
        if chosen is not None:
            item = item.index_select(axis, chosen.to(item.device))
    return item


def _replaced(item: Any, old: Sequence[Tensor], new: Callable[[Tensor], Tensor]) -> Any:
    return new(item) if any(item is one for one in old) else item


def _shake(item: Any, noise: float, factor: float, generator: torch.Generator) -> Any:
    """A floating tensor scaled, with noise relative to its size; the huge numbers of a mask stay.

    Ids trade places; masks, of truth values, zeros and ones or one number throughout, are drawn anew.
    """
    if not isinstance(item, Tensor) or not item.numel():
        return item
    if _is_mask(item):
        return (torch.rand(item.shape, generator=generator, device="cpu") < KEPT).to(item)
    if _is_ids(item):
        first = int(item.flatten()[0])
        if bool((item == first).all()):
            return torch.randint(min(0, first), max(1, first + 1), item.shape, generator=generator).to(item)
        order = torch.randperm(item.numel(), generator=generator, device="cpu")
        return item.reshape(-1)[order.to(item.device)].view(item.shape)
    if not item.is_floating_point():
        return item
    plain = item.detach().double().abs() < HUGE
    size = float(item.detach().double()[plain].square().mean().sqrt()) if bool(plain.any()) else 0.0
    drawn = _normal(item.shape, generator).to(item.device)
    return torch.where(plain, factor * item.detach().double() + noise * size * drawn, item).to(item.dtype)
