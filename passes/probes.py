"""Inputs to try a module on: other lengths and batch sizes, idle and overloaded experts, several magnitudes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentize.inputs import own
from latentize.passes.scan import ModuleCall

#: Tokens of the example inputs that are used.
ENOUGH = 128
#: Tokens that are sent to one expert, past any capacity worth the name.
MANY = 400


@dataclass(frozen=True)
class Inputs:
    """Arguments for one call of a module."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same with copies of floating tensors in `dtype`; the call may write to its inputs."""
        args, kwargs = pytree.tree_map(lambda a: _copied(a, dtype), (self.args, self.kwargs))
        return Inputs(self.name, args, kwargs)


def _copied(item: Any, dtype: torch.dtype) -> Any:
    if not isinstance(item, Tensor):
        return own(item)
    return item.detach().to(dtype).clone() if item.is_floating_point() else item.detach().clone()


@dataclass(frozen=True)
class Prober:
    """Makes inputs for one module after the call that it was seen with."""

    call: ModuleCall

    @classmethod
    def of(cls, module: nn.Module, inputs: Inputs) -> Prober:
        """Makes inputs like the given ones."""
        return cls(ModuleCall("", module, inputs.args, inputs.kwargs))

    @property
    def hidden(self) -> Tensor | None:
        """The only floating tensor among the arguments, if there is just one and no other tensor."""
        tensors = [a for a in pytree.tree_leaves((self.call.args, self.call.kwargs)) if isinstance(a, Tensor)]
        if len(tensors) == 1 and tensors[0].is_floating_point() and tensors[0].dim() >= 2:
            return tensors[0]
        return None

    def seen(self) -> Inputs:
        """The call as it was seen; of long hidden states the first tokens."""
        hidden = self.hidden
        if hidden is None or hidden.dim() > 3 or hidden.numel() <= ENOUGH * hidden.shape[-1]:
            return Inputs("example inputs", self.call.args, self.call.kwargs)
        few = hidden[:2, : ENOUGH // 2] if hidden.dim() == 3 else hidden[:ENOUGH]
        return self.with_hidden("example inputs", few)

    def reversed(self, inputs: Inputs) -> Inputs:
        """The same tokens in reverse order, for a module whose only tensor is its hidden states."""

        def turn(item: Any) -> Any:
            return item.flip(tuple(range(item.dim() - 1))) if isinstance(item, Tensor) else item

        args, kwargs = pytree.tree_map(turn, (inputs.args, inputs.kwargs))
        return Inputs(f"{inputs.name}, reversed", args, kwargs)

    def with_hidden(self, name: str, hidden: Tensor) -> Inputs:
        """The call with its hidden states replaced."""
        args, kwargs = pytree.tree_map(
            lambda a: hidden if isinstance(a, Tensor) else a, (self.call.args, self.call.kwargs)
        )
        return Inputs(name, args, kwargs)

    def random(
        self, name: str, batch: int, tokens: int, seed: int, spread: float = 0.0, loudness: float = 1.0
    ) -> Inputs | None:
        """Random hidden states of the module's rank, magnitudes spread by exp(±spread); None when it takes more."""
        like = self.hidden
        if like is None:
            return None
        generator = torch.Generator().manual_seed(seed)
        shape = _shape(like, batch, tokens)
        size = loudness * (float(like.double().square().mean().sqrt()) or 1.0)
        values = torch.randn(shape, generator=generator, dtype=torch.float64) * size
        if spread:
            per_token = list(shape)
            per_token[1 if like.dim() == 4 else -1] = 1
            values = values * torch.exp(
                spread * (2 * torch.rand(per_token, generator=generator, dtype=torch.float64) - 0.7)
            )
        return self.with_hidden(name, values.to(like.dtype))

    def directed(self, name: str, directions: Tensor, seed: int) -> Inputs | None:
        """Tokens along each of `directions` [N, d], so that every expert is selected; None where that is impossible."""
        like = self.hidden
        if like is None or like.dim() > 3 or like.shape[-1] != directions.shape[1]:
            return None
        generator = torch.Generator().manual_seed(seed)
        size = float(like.double().square().mean().sqrt()) or 1.0
        unit = directions / directions.norm(dim=1, keepdim=True).clamp_min(1e-12) * directions.shape[1] ** 0.5
        rows = torch.cat(
            [unit + 0.3 * torch.randn(unit.shape, generator=generator, dtype=torch.float64) for _ in range(4)]
        )
        rows = rows * size
        shape = (1, *rows.shape) if like.dim() == 3 else rows.shape
        return self.with_hidden(name, rows.reshape(shape).to(like.dtype))

    def extremes(self, seed: int) -> list[Inputs]:
        """Quiet, loud and one-signed tokens, which show what happens on one side of a threshold only.

        Not so loud that a sigmoid rounds to one: scores would tie.
        """
        quiet = [self.random("quiet tokens", 1, 24, seed, spread=1.0, loudness=size) for size in (0.02, 0.1, 0.3)]
        loud = [self.random("loud tokens", 1, 24, seed + 1, spread=0.5, loudness=size) for size in (3.0, 5.0)]
        found = [p for p in (*quiet, *loud) if p is not None]
        if found:
            (tensor,) = [a for a in pytree.tree_leaves((found[-1].args, found[-1].kwargs)) if isinstance(a, Tensor)]
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
        (tensor,) = [a for a in pytree.tree_leaves((found.args, found.kwargs)) if isinstance(a, Tensor)]
        filled = tensor.clone()
        filled.view(self.GAPPED, -1)[empty] = 0
        return self.with_hidden(name, filled), empty

    def others(self) -> list[Inputs]:
        """Inputs of other lengths for a call with one tensor, of hidden states or of token ids; empty for others."""
        found = [self.random("one token", 1, 1, MANY), self.random("batch of 3 × 11", 3, 11, MANY)]
        tensors = [a for a in pytree.tree_leaves((self.call.args, self.call.kwargs)) if isinstance(a, Tensor)]
        if len(tensors) == 1 and tensors[0].dtype in (torch.int64, torch.int32) and tensors[0].dim() == 2:
            ids = tensors[0].reshape(-1)
            turned = [ids[torch.arange(b * t) * 7 % len(ids)].view(b, t) for b, t in ((1, 1), (3, 11))]
            found += [self.with_hidden("other tokens", t) for t in turned]
        return [inputs for inputs in found if inputs is not None]

    def proofs(self, seed: int) -> list[Inputs]:
        """Inputs that a lift must survive: the example, one token, odd lengths, a batch, all tokens alike."""
        found = [self.seen()]
        like = self.hidden
        if like is None:
            return found
        wanted = [("one token", 1, 1), ("7 tokens", 1, 7), ("batch of 3 × 11", 3, 11), ("64 tokens", 2, 32)]
        wanted += [("batch of 9 × 2", 9, 2)]
        found += [p for n, b, t in wanted if (p := self.random(n, b, t, seed + b + t, spread=0.5)) is not None]
        alike = self.random("one token", 1, 1, seed + 1)
        if alike is not None and like.dim() <= 3:
            (tensor,) = [a for a in pytree.tree_leaves((alike.args, alike.kwargs)) if isinstance(a, Tensor)]
            repeat = [MANY if axis == tensor.dim() - 2 else 1 for axis in range(tensor.dim())]
            found.append(self.with_hidden(f"{MANY} equal tokens, most experts idle", tensor.repeat(repeat)))
        return found


def _shape(like: Tensor, batch: int, tokens: int) -> tuple[int, ...]:
    if like.dim() == 2:
        return (batch * tokens, like.shape[1])
    if like.dim() == 3:
        return (batch, tokens, like.shape[2])
    if like.dim() == 4:
        return (batch, like.shape[1], tokens, 2 if tokens > 1 else 1)
    return tuple(like.shape)
