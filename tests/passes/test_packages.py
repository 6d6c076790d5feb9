"""MoE implementations from packages that others wrote."""

from __future__ import annotations

import contract
import packages
import pytest
from torch import Tensor, nn


def run(model: nn.Module, inputs: contract.Inputs) -> Tensor:
    out = model(*inputs[0], **inputs[1])
    return out if isinstance(out, Tensor) else out[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", packages.CASES)
def test_package_is_lifted_or_refused(name: str) -> None:
    make, inputs, expected, tolerance = packages.CASES[name]
    example = (inputs(2, 24, 0), {})
    fresh = [(inputs(b, t, s), {}) for b, t, s in ((1, 1, 7), (3, 11, 8), (2, 33, 9))]
    if expected is None:
        expected = sum(b.status == "moe" for b in contract.inspect(make, example))
    if expected:
        contract.assert_lifted(make, example, fresh, run, expected, tolerance)
    else:
        contract.assert_refused(make, example, fresh[1:], run)


@pytest.mark.slow
@pytest.mark.parametrize("name", packages.REASONS)
def test_package_is_refused_with_a_reason(name: str) -> None:
    make, inputs, _, _ = packages.CASES[name]
    reasons = [b.reason for b in contract.inspect(make, (inputs(2, 24, 0), {})) if b.status == "refused"]
    assert any(packages.REASONS[name] in reason for reason in reasons), reasons


@pytest.mark.slow
@pytest.mark.parametrize("name", packages.LATENT)
def test_latent_package_is_found_latent(name: str) -> None:
    blocks = contract.inspect(packages.LATENT[name], (packages.hidden_states(2, 24, 0), {}))
    assert [b.status for b in blocks] == ["latent"]
    assert blocks[0].spec is not None
    assert blocks[0].spec.hidden_size == packages.HIDDEN // 2
