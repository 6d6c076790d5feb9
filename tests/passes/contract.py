"""The two promises every case is held to: lifted exactly, or refused and left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import latentize
from latentize import Block

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
Run = Callable[[nn.Module, Inputs], Tensor]


def relative(a: Tensor, b: Tensor) -> float:
    """‖a − b‖ / ‖b‖ over the whole tensor, in fp64."""
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


def inspect(make: Callable[[], nn.Module], example: Inputs) -> list[Block]:
    """Blocks of a fresh model; inspecting must not change it."""
    model = make()
    before = tensors(model)
    blocks = latentize.inspect(model, args=example[0], kwargs=example[1])
    assert not model.training
    assert_unchanged(model, before)
    return blocks


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the tensors in a model's state."""
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, Tensor)}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    """A model's tensors are what they were."""
    after = tensors(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items()), "a tensor of the model changed"


#: Twice the experts and twice as many of them selected, at full width: the same function of the input.
DOUBLED = latentize.Recipe(compression=1, experts_factor=2, topk_factor=2, heal_steps=0)


def converted(make: Callable[[], nn.Module], example: Inputs, recipe: latentize.Recipe = DOUBLED) -> latentize.Result:
    """A fresh model converted; converting must not change it."""
    model, (args, kwargs) = make(), copy.deepcopy(example)
    before = tensors(model)
    result = latentize.convert(model, args=args, kwargs=kwargs, recipe=recipe)
    assert_unchanged(model, before)
    return result


@torch.no_grad()
def assert_same(
    result: latentize.Result, make: Callable[[], nn.Module], fresh: Sequence[Inputs], run: Run, tolerance: float = 1e-4
) -> None:
    """The outputs of a converted model on `fresh` inputs are those of the original."""
    original = make()
    for inputs in fresh:
        error = relative(run(result.model, copy.deepcopy(inputs)), run(original, copy.deepcopy(inputs)))
        assert error <= tolerance, f"WRONG REWRITE: relative error {error:.1e}"


@torch.no_grad()
def assert_lifted(
    make: Callable[[], nn.Module],
    example: Inputs,
    fresh: Sequence[Inputs],
    run: Run,
    blocks: int = 1,
    tolerance: float = 1e-4,
) -> list[Block]:
    """`blocks` MoEs are lifted, and doubling N and k at full width leaves the output on `fresh` inputs as it was."""
    result = converted(make, example)
    lifted = [b for b in result.blocks if b.status == "moe"]
    refused = [(b.name, b.reason) for b in result.blocks if b.status == "refused"]
    assert len(lifted) == blocks, f"lifted {[b.name for b in lifted]}, refused {refused}"
    assert all(b.spec is not None and b.max_error is not None for b in lifted)
    assert result.rewritten.keys() == {b.name for b in lifted}
    for block in lifted:
        assert block.spec is not None
        new = result.rewritten[block.name].spec
        assert (new.num_experts, new.top_k) == (2 * block.spec.num_experts, 2 * block.spec.top_k)
    assert_same(result, make, fresh, run, tolerance)
    return lifted


@torch.no_grad()
def assert_refused(make: Callable[[], nn.Module], example: Inputs, fresh: Sequence[Inputs], run: Run) -> None:
    """Nothing is lifted, every refusal has a reason, and convert leaves the model as it was."""
    result = converted(make, example, latentize.Recipe(compression=2))
    assert not [b.name for b in result.blocks if b.status == "moe"], "lifted, and it is not a standard MoE"
    assert all(b.reason for b in result.blocks if b.status == "refused")
    original = make()
    for inputs in fresh:
        outputs = []
        for one in (result.model, original):
            torch.manual_seed(0)
            outputs.append(run(one, copy.deepcopy(inputs)))
        assert torch.equal(*outputs), "a model that should be left alone changed"
