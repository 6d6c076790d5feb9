"""The optimiser: Adam where there is no matrix, unmoved by a rotation where there is one."""

from __future__ import annotations

import pytest
import torch

from latentize import soap
from latentize.soap import Soap


def train(optimizer: torch.optim.Optimizer, parameter: torch.Tensor, gradients: list[torch.Tensor]) -> torch.Tensor:
    for gradient in gradients:
        parameter.grad = gradient
        optimizer.step()
    return parameter


def gradients(*shape: int, steps: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def test_vectors_follow_adam():
    ours, theirs = torch.zeros(5, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    steps = gradients(5)
    a = train(Soap([ours], lr=0.1, betas=(0.9, 0.99), eps=1e-10), ours, steps)
    b = train(torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.99), eps=1e-10), theirs, steps)
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_matrices_with_both_sides_too_long_follow_adam(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(soap, "MAX_SIDE", 2)
    ours, theirs = torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, 4, dtype=torch.float64)
    a = train(Soap([ours], lr=0.1, betas=(0.9, 0.99), eps=1e-10), ours, gradients(3, 4))
    b = train(torch.optim.Adam([theirs], lr=0.1, betas=(0.9, 0.99), eps=1e-10), theirs, gradients(3, 4))
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_rotating_the_problem_rotates_the_solution():
    left = torch.linalg.qr(gradients(4, 4, steps=1)[0]).Q
    right = torch.linalg.qr(gradients(4, 4, steps=2)[1]).Q
    steps = gradients(4, 4)
    plain, turned = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(4, 4, dtype=torch.float64)
    a = train(Soap([plain], lr=0.1), plain, steps)
    b = train(Soap([turned], lr=0.1), turned, [left @ g @ right.T for g in steps])
    # the bases agree up to signs, which cancel; fp64 eigh and qr of factors with condition numbers around 1e4
    torch.testing.assert_close(left @ a @ right.T, b, rtol=0, atol=1e-8)


def test_a_stack_of_matrices_is_optimised_one_by_one():
    steps = gradients(3, 4, 4)
    stack = torch.zeros(3, 4, 4, dtype=torch.float64)
    together = train(Soap([stack], lr=0.1), stack, steps)
    for i in range(3):
        one = torch.zeros(4, 4, dtype=torch.float64)
        alone = train(Soap([one], lr=0.1), one, [g[i] for g in steps])
        torch.testing.assert_close(alone, together[i], atol=1e-8, rtol=0)


def test_an_ill_conditioned_rotated_quadratic_is_solved_faster_than_by_adam():
    scales = torch.logspace(0, -3, 8, dtype=torch.float64)
    turn = torch.linalg.qr(gradients(8, 8, steps=1)[0]).Q
    curvature = turn * scales @ turn.T
    goal = gradients(6, 8, steps=2)[1]

    def distance(kind: type[torch.optim.Optimizer]) -> float:
        w = torch.zeros(6, 8, dtype=torch.float64)
        optimizer = kind([w], lr=0.05, betas=(0.9, 0.99))  # type: ignore[call-arg]
        for _ in range(200):
            w.grad = (w - goal) @ curvature
            optimizer.step()
        return float((((w - goal) @ curvature) * (w - goal)).sum())

    assert distance(Soap) < 0.5 * distance(torch.optim.Adam)


def test_its_state_survives_saving():
    first, second = (torch.zeros(4, 6, dtype=torch.float64) for _ in range(2))
    steps = gradients(4, 6)
    whole, half = Soap([first], lr=0.1), Soap([second], lr=0.1)
    train(whole, first, steps)
    train(half, second, steps[:7])
    rest = Soap([second], lr=0.1)
    rest.load_state_dict(half.state_dict())
    train(rest, second, steps[7:])
    assert torch.equal(first, second)


def test_an_expert_without_gradient_stays_where_it_is():
    stack = torch.ones(2, 3, 3)
    gradient = torch.zeros(2, 3, 3)
    gradient[0] = torch.eye(3)
    train(Soap([stack], lr=0.1), stack, [gradient] * 6)
    assert torch.equal(stack[1], torch.ones(3, 3))
    assert not torch.equal(stack[0], torch.ones(3, 3))


@pytest.mark.parametrize(("keep", "moves"), [(True, False), (False, True)])
def test_rows_that_are_never_looked_up_stay_where_they_are_when_asked(keep: bool, moves: bool):
    idle = [2, 5, 9]
    table = torch.ones(12, 3)
    steps = [gradient.float() for gradient in gradients(12, 3)]
    for gradient in steps:
        gradient[idle] = 0
    train(Soap([{"params": [table], "keep_idle": keep}], lr=0.1), table, steps)
    assert (not torch.equal(table[idle], torch.ones(3, 3))) == moves
    assert not (table[[0, 1, 3]] == 1).any()
