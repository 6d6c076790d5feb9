"""Every coding of the zoo is found, lifted with the right sizes and rewritten exactly."""

from __future__ import annotations

import codings
import contract
import pytest
import torch
from codings_base import Coding, example
from torch import Tensor, nn

from latentize.spec import MoESpec

#: Batch, tokens and seed of inputs that the analysis has not seen.
FRESH = ((1, 1, 7), (3, 11, 8), (2, 33, 9))
SLOW_EVERY = 4  # one coding in four runs in the ordinary suite
NAMES = list(codings.MOES)


def run(case: type[Coding]) -> contract.Run:
    def call(model: nn.Module, inputs: contract.Inputs) -> Tensor:
        return case.hidden_first(model(*inputs[0], **inputs[1]))

    return call


def lift(name: str) -> None:
    case = {**codings.MOES, **codings.EITHER}[name]
    fresh = [case.arguments(example(*f) * case.loud) for f in FRESH]
    blocks = contract.assert_lifted(
        lambda: codings.build(case), case.arguments(example()), fresh, run(case), case.blocks, case.tolerance
    )
    if case.blocks == 1 and name in codings.MOES and case.truth is not Coding.truth:
        assert_sizes(blocks[0].spec, codings.build(case).truth())


def assert_sizes(actual: MoESpec, truth: MoESpec) -> None:
    sizes = ("hidden_size", "intermediate_size", "num_experts", "top_k")
    assert {s: getattr(actual, s) for s in sizes} == {s: getattr(truth, s) for s in sizes}


@pytest.mark.parametrize("name", NAMES[::SLOW_EVERY])
def test_lifts_exactly(name: str) -> None:
    lift(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for i, n in enumerate(NAMES) if i % SLOW_EVERY])
def test_lifts_exactly_in_full(name: str) -> None:
    lift(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", codings.EITHER)
def test_lifts_exactly_or_refuses(name: str) -> None:
    case = codings.EITHER[name]
    found = contract.inspect(lambda: codings.build(case), case.arguments(example()))
    lifted = sum(b.status == "moe" for b in found)
    if lifted:
        fresh = [case.arguments(example(*f)) for f in FRESH]
        contract.assert_lifted(
            lambda: codings.build(case), case.arguments(example()), fresh, run(case), lifted, case.tolerance
        )
    else:
        fresh = [case.arguments(example(*f)) for f in FRESH[1:]]
        contract.assert_refused(lambda: codings.build(case), case.arguments(example()), fresh, run(case))


def test_lift_says_what_the_block_computes() -> None:
    """One case in detail: a sigmoid router with groups, a selection bias and a scale."""
    case = codings.MOES["GroupsTop2Inf"]
    model = codings.build(case)
    truth = model.truth()
    (block,) = contract.inspect(lambda: model, case.arguments(example()))
    router = block.spec.router
    assert (router.score, router.order, router.groups) == ("sigmoid", "score_first", truth.router.groups)
    assert router.scale == pytest.approx(2.5, rel=1e-5)
    torch.testing.assert_close(router.weight.detach(), model.r.weight.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(router.selection_bias, model.e_bias, rtol=1e-4, atol=1e-5)
