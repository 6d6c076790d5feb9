"""A shared expert beside a routed block: its last linear layer, and both summands heard while the model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from latentize.inputs import Batch, Inputs, observing
from latentize.passes.hearing import Place, heard

#: Relative difference in fp64 that is rounding.
ROUNDING = 1e-9


@dataclass(frozen=True)
class SharedExpert:
    """The last linear layer of a shared expert: what it is called, and where its sum with the routed output is seen.

    `weight` [d, f] and `bias` [d] are names of parameters of the model. Paths are those of a `listening` copy.
    """

    weight: str
    bias: str | None
    path: str  # of the linear layer
    experts: str  # of the routed experts
    total: Place  # where both have arrived
    gated: bool  # whether it is multiplied by another number for every token


@dataclass(frozen=True)
class Heard:
    """One run over T tokens of a block: the two summands, and what each is multiplied by on its way into the sum."""

    routed: Tensor  # [T, d]
    routed_scale: Tensor  # [T, 1]
    shared: Tensor  # [T, d]
    shared_scale: Tensor  # [T, 1]
    features: Tensor  # [T, f] what the shared expert's last layer reads

    @property
    def total(self) -> Tensor:
        """[T, d] what both are together."""
        return self.routed * self.routed_scale + self.shared * self.shared_scale


class NotASumError(Exception):
    """Somewhere the two outputs were not added up as the proof had it."""


def hear(model: nn.Module, experts: Mapping[str, SharedExpert], batch: Batch) -> dict[str, Heard]:
    """Run a `listening` copy, without gradients of its own, and hear both summands of each block.

    Raises:
        NotASumError: a block's summands do not arrive as they were proved to.
    """
    ears = {name: Ear(name, expert) for name, expert in experts.items()}
    with observing(model), torch.enable_grad(), ears_open(model, list(ears.values())):
        Inputs.of(batch).call(model)
    return {name: ear.result() for name, ear in ears.items()}


@contextmanager
def ears_open(model: nn.Module, ears: Sequence[Ear]) -> Iterator[None]:
    """While inside, the ears hear what runs in the model."""

    def listen(place: Place, tensor: Tensor) -> Tensor | None:
        given = (ear.listen(place, tensor) for ear in ears)
        return next((other for other in given if other is not None), None)

    paths = {path for ear in ears for path in (ear.expert.path, ear.expert.experts, ear.expert.total.path)}
    with heard(model, listen, paths):
        yield


class Ear:
    """Hears one block: gradients from the sum back to both summands are what they are multiplied by."""

    def __init__(self, name: str, expert: SharedExpert) -> None:
        self.name, self.expert = name, expert
        self.routed: Tensor | None = None
        self.shared: Tensor | None = None
        self.features: Tensor | None = None
        self.scales: list[Tensor] = []

    def listen(self, place: Place, tensor: Tensor) -> Tensor | None:
        """See `heard`."""
        expert = self.expert
        if place == Place(expert.experts, "out"):
            self.routed, passed = watched(tensor)
            return passed
        if place == Place(expert.path, "in"):
            self.features = tensor.detach()
        elif place == Place(expert.path, "out"):
            self.shared, passed = watched(tensor)
            return passed
        if place == expert.total and self.routed is not None and self.shared is not None and not self.scales:
            pull = torch.linspace(0.5, 1.5, tensor.shape[-1], dtype=tensor.dtype, device=tensor.device)
            found = torch.autograd.grad((tensor * pull).sum(), [self.routed, self.shared], allow_unused=True)
            self.scales = [self._scale(gradient, pull) for gradient in found]
            return tensor.detach()
        return None

    def _scale(self, gradient: Tensor | None, pull: Tensor) -> Tensor:
        if gradient is None:
            raise NotASumError(f"{self.name}: a summand does not reach the sum")
        rows = gradient.reshape(-1, gradient.shape[-1])
        wide, exact = rows.double(), pull.double()
        scale = (wide @ exact) / (exact @ exact)
        tolerance = max(ROUNDING, 8 * torch.finfo(gradient.dtype).eps)
        if not float((wide - scale[:, None] * exact).norm()) <= tolerance * max(float(wide.norm()), 1e-300):
            raise NotASumError(f"{self.name}: a summand does not arrive unchanged")
        return scale[:, None]

    def result(self) -> Heard:
        """What was heard.

        Raises:
            NotASumError: the sum was not reached.
        """
        if self.routed is None or self.shared is None or self.features is None or not self.scales:
            raise NotASumError(f"{self.name}: its sum was not reached")
        routed, shared, features = (
            t.detach().reshape(-1, t.shape[-1]) for t in (self.routed, self.shared, self.features)
        )
        return Heard(routed, self.scales[0], shared, self.scales[1], features)


def watched(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A leaf with the tensor's values, and what to pass on in its place: gradients towards the leaf can be taken."""
    leaf = tensor.detach().requires_grad_()
    return leaf, leaf.clone()
