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
    model, untouched = make(), make()
    blocks = latentize.inspect(model, args=example[0], kwargs=example[1])
    assert not model.training
    before, after = untouched.state_dict(), model.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items() if isinstance(t, Tensor)), "inspect changed a tensor"
    return blocks


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
    found = inspect(make, copy.deepcopy(example))
    lifted = [b for b in found if b.status == "moe"]
    refused = [(b.name, b.reason) for b in found if b.status == "refused"]
    assert len(lifted) == blocks, f"lifted {[b.name for b in lifted]}, refused {refused}"
    assert all(b.spec is not None and b.max_error is not None for b in lifted)
    recipe = latentize.Recipe(
        latent_dim=lifted[0].spec.hidden_size, variant="acc", experts_factor=2, topk_factor=2, heal_steps=0
    )
    model, args = make(), copy.deepcopy(example)
    result = latentize.convert(model, args=args[0], kwargs=args[1], recipe=recipe)
    assert sum(b.status == "moe" for b in result.blocks) == blocks
    for inputs in fresh:
        error = relative(run(result.model, copy.deepcopy(inputs)), run(make(), copy.deepcopy(inputs)))
        assert error <= tolerance, f"WRONG REWRITE: relative error {error:.1e}"
    return lifted


@torch.no_grad()
def assert_refused(make: Callable[[], nn.Module], example: Inputs, fresh: Sequence[Inputs], run: Run) -> None:
    """Nothing is lifted, every refusal has a reason, and convert leaves the model as it was."""
    found = inspect(make, copy.deepcopy(example))
    assert not [b.name for b in found if b.status == "moe"], "lifted, and it is not a standard MoE"
    assert all(b.reason for b in found if b.status == "refused")
    for inputs in fresh:
        args, outputs = copy.deepcopy(example), []
        model = latentize.convert(make(), args=args[0], kwargs=args[1], recipe=latentize.Recipe(compression=2)).model
        for one in (model, make()):
            torch.manual_seed(0)
            outputs.append(run(one, copy.deepcopy(inputs)))
        assert torch.equal(*outputs), "a model that should be left alone changed"
