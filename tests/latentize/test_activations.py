from __future__ import annotations

import itertools

import pytest
import torch

from latentize.activations import DERIVATIVES, FUNCTIONS, Activation

CLAMPED = {"gate_min": -0.8, "gate_max": 0.9, "up_min": -0.7, "up_max": 0.6, "up_offset": 1.0}


def points(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) * 3


def test_every_function_has_a_derivative():
    assert set(DERIVATIVES) == set(FUNCTIONS)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("options", [{}, {"alpha": 1.7}, CLAMPED], ids=["plain", "alpha", "clamped"])
def test_backward_is_autograds_gradient(name, gated, options):
    activation = Activation(name, **options)
    gate = points(200, seed=1).requires_grad_() if gated else None
    up, grad = points(200, seed=2).requires_grad_(), points(200, seed=3)
    inputs = [up] if gate is None else [gate, up]
    expected = torch.autograd.grad(activation(gate, up), inputs, grad)
    of_gate, of_up = activation.backward(None if gate is None else gate.detach(), up.detach(), grad)
    torch.testing.assert_close(of_up, expected[-1], rtol=1e-12, atol=1e-13)
    if gate is None:
        assert of_gate is None
    else:
        torch.testing.assert_close(of_gate, expected[0], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_kinks_take_autograds_subgradient(name):
    x = torch.tensor([-3.0, 0.0, 3.0, 6.0, 20.0], dtype=torch.float64).requires_grad_()
    (expected,) = torch.autograd.grad(FUNCTIONS[name](x).sum(), x)
    torch.testing.assert_close(DERIVATIVES[name](torch.ones_like(x), x.detach()), expected, rtol=1e-12, atol=0)


def test_glu_is_function_of_clamped_gate_times_clamped_shifted_up():
    gate, up = points(50, seed=1), points(50, seed=2)
    inner = gate.clamp(-0.8, 0.9)
    expected = inner * torch.sigmoid(1.7 * inner) * (up.clamp(-0.7, 0.6) + 1)
    torch.testing.assert_close(Activation("silu", alpha=1.7, **CLAMPED)(gate, up), expected)


def test_ungated_clamps_by_the_gates_bounds():
    up = points(50)
    torch.testing.assert_close(Activation("relu", gate_max=0.5)(None, up), up.clamp(max=0.5).relu())


def test_nan_passes_through_clamps():
    x = torch.tensor([float("nan")])
    for name, options in itertools.product(FUNCTIONS, ({}, CLAMPED)):
        assert Activation(name, **options)(x, torch.ones(1)).isnan().all(), name


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'swish'.*silu"):
        Activation("swish")


def test_describe_names_what_differs_from_the_default():
    assert Activation("gelu").describe(gated=False) == "gelu"
    described = Activation("silu", gate_max=7.0, up_offset=1.0).describe(gated=True)
    assert described == "silu GLU, gate_max 7, up_offset 1"
