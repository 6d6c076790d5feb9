"""The proof of a shared expert: it and the routed output may exchange anything, and its weights are its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentize.inputs import observing
from latentize.passes.double import in_fp64
from latentize.passes.hearing import Place, heard
from latentize.passes.probes import Inputs
from latentize.passes.shared_expert import ROUNDING, Ear, Heard, NotASumError, SharedExpert, ears_open

#: Sizes of what is exchanged between the two summands, relative to the routed output.
SIZES = (1.0, 30.0)
#: The smallest relative change of a model's outputs that shows that it minds the routed outputs at all.
FELT = 1e-6


@dataclass(frozen=True)
class Runs:
    """A `listening` copy of a model in fp64, and inputs to run it on."""

    model: nn.Module
    inputs: Sequence[Inputs]

    @contextmanager
    def running(self, inputs: Inputs) -> Iterator[Any]:
        """Something to call that runs the model, gradients being taken."""
        ready = inputs.to(torch.float64)
        with observing(self.model), torch.enable_grad(), torch.compiler.set_stance("force_eager"), in_fp64():
            yield lambda: self.model(*ready.args, **ready.kwargs)

    def outputs(self, inputs: Inputs) -> list[Tensor]:
        """Every tensor that the model returns."""
        with self.running(inputs) as call, torch.no_grad():
            leaves = pytree.tree_leaves(call())
        return [t.detach().double() for t in leaves if isinstance(t, Tensor) and not t.is_complex()]


def none_found(reason: str) -> str:
    """The reason in a sentence."""
    return f"no shared expert was found ({reason})"


def proved(runs: Runs, found: Mapping[str, SharedExpert | str]) -> dict[str, SharedExpert | str]:
    """What stands the exchange of the two summands, and of the weights."""
    judged = dict(found)
    for why, test in (
        ("what is added to its output and taken off the routed output changes the model's outputs", exchange),
        ("the model's outputs depend on its weights in another way than through its output", reweigh),
    ):
        now = {name: expert for name, expert in judged.items() if isinstance(expert, SharedExpert)}
        if not now or test(runs, now):
            continue
        for name, expert in now.items():
            if not test(runs, {name: expert}):
                judged[name] = none_found(f"{expert.weight}: {why}, so it is used elsewhere too")
    return judged


def exchange(runs: Runs, experts: Mapping[str, SharedExpert]) -> bool:
    """Whether the outputs stay when the summands of all blocks exchange something."""
    felt = False
    for number, inputs in enumerate(runs.inputs):
        try:
            with runs.running(inputs) as call:
                ears = {name: Ear(name, expert) for name, expert in experts.items()}
                with ears_open(runs.model, list(ears.values())):
                    call()
                found = {name: ear.result() for name, ear in ears.items()}
        except NotASumError:
            return False
        clean = runs.outputs(inputs)
        for size in SIZES:
            generator = torch.Generator().manual_seed(number)
            drawn = {
                name: size * h.routed.std() * torch.randn(h.routed.shape, generator=generator, dtype=torch.float64)
                for name, h in found.items()
            }
            moved = _outputs_with(runs, inputs, experts, found, drawn, both=True)
            if not furthest(moved, clean) <= ROUNDING * size:
                return False
            felt = felt or furthest(_outputs_with(runs, inputs, experts, found, drawn, both=False), clean) > FELT
    return felt


def _outputs_with(
    runs: Runs, inputs: Inputs, experts: Mapping[str, SharedExpert], found: Mapping[str, Heard],
    drawn: Mapping[str, Tensor], *, both: bool,
) -> list[Tensor]:  # fmt: skip
    """The outputs when each shared expert's output is moved, and, with `both`, the routed one back by as much."""
    moves: dict[Place, Tensor] = {}
    for name, expert in experts.items():
        scale = found[name].shared_scale / found[name].routed_scale
        moves[Place(expert.path, "out")] = drawn[name]
        if both:
            moves[Place(expert.experts, "out")] = -scale * drawn[name]

    def listen(place: Place, tensor: Tensor) -> Tensor | None:
        move = moves.get(place)
        return None if move is None else tensor + move.reshape(tensor.shape).to(tensor)

    with heard(runs.model, listen, {place.path for place in moves}):
        return runs.outputs(inputs)


def reweigh(runs: Runs, experts: Mapping[str, SharedExpert]) -> bool:
    """Whether the outputs stay when the weights are others and the layer's output is what it was."""
    inputs = runs.inputs[0]
    clean = runs.outputs(inputs)
    layers = {expert.path: runs.model.get_submodule(expert.path) for expert in experts.values()}
    before = {path: dict(layer._parameters.items()) for path, layer in layers.items()}
    weights = [parameter for held in before.values() for parameter in held.values() if parameter is not None]
    others = {id(parameter): _other(parameter, seed) for seed, parameter in enumerate(weights)}
    exchanged = []
    linear = True
    read: dict[str, Tensor] = {}

    def listen(place: Place, tensor: Tensor) -> Tensor | None:
        nonlocal linear
        if place.end == "in":
            read[place.path] = tensor
            return None
        now, was = layers[place.path]._parameters, before[place.path]
        expected = product(read[place.path], now["weight"], now.get("bias"))
        linear = linear and apart(tensor, expected) <= ROUNDING
        return product(read[place.path], was["weight"], was.get("bias"))

    try:
        for module in runs.model.modules():
            for key, parameter in list(module._parameters.items()):
                if id(parameter) in others:
                    exchanged.append((module, key, parameter))
                    module._parameters[key] = others[id(parameter)]
        with heard(runs.model, listen, layers):
            moved = runs.outputs(inputs)
    finally:
        for module, key, parameter in exchanged:
            module._parameters[key] = parameter
    return linear and furthest(moved, clean) <= ROUNDING


def _other(parameter: Tensor, seed: int) -> nn.Parameter:
    """A parameter of the same shape with other values of about the same size."""
    noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)).to(parameter)
    size = float(parameter.detach().abs().mean()) or 1.0
    return nn.Parameter(parameter.detach() + size * noise, requires_grad=False)


def product(x: Tensor, weight: Any, bias: Any) -> Tensor:
    """x [..., in] times weight [out, in], plus the bias if there is one, in the dtype of `x`."""
    return F.linear(x.detach(), weight.detach().to(x), None if bias is None else bias.detach().to(x))


def apart(a: Tensor, b: Tensor) -> float:
    """Relative difference where `b` is finite; infinite where `a` is another infinity, or nothing is to compare."""
    finite = b.isfinite()
    if a.shape != b.shape or not b.numel() or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    wrong, whole = float((a - b)[finite].norm()), float(b[finite].norm())
    return wrong / whole if whole else float("inf") if wrong else 0.0


def furthest(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Largest relative difference of pairs; infinite where there are none."""
    if not b or len(a) != len(b):
        return float("inf")
    return max(apart(one, other) for one, other in zip(a, b, strict=True))
