"""The zoo itself: every MoE coding computes what it says it does, and every look-alike really is none."""

from __future__ import annotations

from collections.abc import Callable

import codings
import codings_refused as refused
import pytest
import torch
from codings_base import HIDDEN, Coding, example
from torch import Tensor

from latentize.reference import moe_forward

MIXED = {"Bfloat16Experts": (torch.float32, 2e-2), "GroupedMm": (torch.float32, 1e-5)}  # kernels without fp64


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@torch.no_grad()
def output(case: type[Coding], model: Coding, x: Tensor) -> Tensor:
    return codings.call(case, model, x)


@pytest.mark.parametrize("name", codings.MOES)
@pytest.mark.parametrize("tokens", [1, 17])
def test_coding_computes_what_it_says(name: str, tokens: int) -> None:
    case = codings.MOES[name]
    dtype, tolerance = MIXED.get(name, (torch.float64, 1e-13))
    model = codings.build(case)
    x = (example(1, tokens, seed=tokens) * case.loud).to(dtype)
    actual = output(case, model.to(dtype) if dtype is torch.float64 else model, x)[0]
    with torch.no_grad():
        if name == "DecoderModel":
            expected = model.expected_from(case.arguments(x)[1]["ids"])[0]
        else:
            expected = model.double().expected(x[0].double())
    assert relative(actual, expected) <= tolerance


@pytest.mark.parametrize("name", [n for n, c in codings.MOES.items() if c.truth is not Coding.truth])
def test_package_reference_agrees_with_ours(name: str) -> None:
    """The reference that defines a spec and the per-token one of the zoo are written apart."""
    from codings_base import reference

    spec = codings.build(codings.MOES[name]).truth().to(torch.float64)
    x = example(1, 9, seed=3)[0].double()
    with torch.no_grad():
        assert relative(moe_forward(spec, x), reference(spec, x)) <= 1e-13


def _mixes(case: type[Coding]) -> bool:
    x = example(2, 33, seed=1)
    other = x.clone()
    other[:, 16] = example(2, 33, seed=2)[:, 16]
    others = torch.arange(33) != 16
    a, b = (output(case, codings.build(case), v)[:, others] for v in (x, other))
    tail = [output(case, codings.build(case), example(3, 60, seed=s))[:, 0] for s in (1, 1)]
    assert torch.equal(*tail), "compare runs of a deterministic module"
    longer = torch.cat([example(3, 60, seed=1)[:, :30], example(3, 60, seed=2)[:, :30]], 1)
    first = output(case, codings.build(case), example(3, 60, seed=1))[:, :30]
    return relative(a, b) > 1e-4 or relative(first, output(case, codings.build(case), longer)[:, :30]) > 1e-4


def _random(case: type[Coding]) -> bool:
    model, x = codings.build(case), example()
    return relative(output(case, model, x), output(case, model, x)) > 1e-5


def _stateful(case: type[Coding]) -> bool:
    model, x = codings.build(case), example()
    first = output(case, model, x)
    state = torch.get_rng_state()
    torch.set_rng_state(state)
    return relative(output(case, model, x), first) > 1e-3


def _unlike_nearest(case: type[Coding]) -> bool:
    model = codings.build(case).double()
    errors = []
    for batch, tokens in ((1, 1), (1, 60), (2, 30)):
        x = (example(batch, tokens, seed=5) * case.loud).double()
        x[0, 0] = 0 if tokens > 1 else x[0, 0]
        with torch.no_grad():
            expected = torch.stack([model.expected(row) for row in x])
        errors.append(relative(output(case, model, x), expected))
    return max(errors) > 1e-4


def _nothing_selected(case: type[Coding]) -> bool:
    """Either there is no spec that it could be, or all experts act on every token."""
    if case.truth is Coding.truth:
        return True
    model = codings.build(case)
    spec = model.truth()
    assert spec.experts.up.shape[-1] == HIDDEN
    x = example(1, 1).requires_grad_()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    codings.call(case, model, x).sum().backward()
    return bool((model.c.grad.flatten(1).norm(dim=1) > 0).all())


SHOWN_BY: dict[str, Callable[[type[Coding]], bool]] = {
    refused.MIXES: _mixes,
    refused.RANDOM: _random,
    refused.STATEFUL: _stateful,
    refused.NEAREST: _unlike_nearest,
    refused.NO_ROUTING: _nothing_selected,
}


@pytest.mark.parametrize("name", codings.NOT_MOES)
def test_look_alike_is_not_a_standard_moe(name: str) -> None:
    case = codings.NOT_MOES[name]
    assert SHOWN_BY[case.why](case)


@pytest.mark.parametrize("name", [*codings.MOES, *codings.NOT_MOES, *codings.EITHER])
def test_case_takes_any_shape(name: str) -> None:
    case = {**codings.MOES, **codings.NOT_MOES, **codings.EITHER}[name]
    model = codings.build(case)
    for batch, tokens in ((1, 1), (2, 24), (3, 11)):
        assert output(case, model, example(batch, tokens)).shape[:2] == (batch, tokens)
