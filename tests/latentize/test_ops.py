from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from expert_calls import CLAMPED, SILU, Call, call, reference, to
from torch import Tensor
from torch.testing import assert_close

from latentize import kernels_native, kernels_torch, ops
from latentize.activations import FUNCTIONS, Activation
from latentize.kernels_torch import Experts

#: Largest relative error: a few roundings in the inputs' dtype (plain torch rounds after every step).
TOLERANCE = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 1.5e-2}


def run(c: Call, activation: Activation = SILU, on_input: bool = False) -> Tensor:
    return ops.compute(c.hidden, c.indices, c.weights, *c.experts, activation, on_input)


def tensors(c: Call) -> list[Tensor]:
    return [t for t in (c.hidden, c.weights, *c.experts) if t is not None]


def error(actual: Tensor, expected: Tensor) -> float:
    difference = (actual.double() - expected.double()).norm()
    return float(difference / expected.double().norm()) if expected.norm() > 0 else float(difference)


@pytest.fixture(params=["compiled", "torch"])
def kernels(request, monkeypatch):
    """Every test that asks for it runs on both kernels."""
    if request.param == "torch":
        monkeypatch.setattr(kernels_native, "serves", lambda *_: False)
        return kernels_torch
    if kernels_native.load() is None:
        pytest.skip("no C++ compiler here")
    monkeypatch.setattr(kernels_native, "pays", lambda *_: True)
    return kernels_native


VARIANTS = list(itertools.product([True, False], [True, False], [True, False]))


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("options", [{}, CLAMPED], ids=["plain", "clamped"])
def test_forward_and_gradients_are_the_references(kernels, name, options):
    activation = Activation(name, **options)
    for gated, biases, on_input in VARIANTS:
        c = call(9, gated=gated, biases=biases)
        leaves = [t.requires_grad_() for t in tensors(c)]
        actual, expected = run(c, activation, on_input), reference(c, activation, on_input)
        assert_close(actual, expected, rtol=1e-12, atol=1e-13)
        grad = torch.randn(actual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        pairs = zip(torch.autograd.grad(actual, leaves, grad), torch.autograd.grad(expected, leaves, grad), strict=True)
        for ours, theirs in pairs:
            assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("gated, biases, on_input", VARIANTS)
def test_gradcheck(kernels, gated, biases, on_input):
    c = call(3, 3, 2, m=2, width=2, gated=gated, biases=biases)
    leaves = [t.requires_grad_() for t in tensors(c)]

    def function(*_):
        return run(c, Activation("silu"), on_input)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_random_shapes_and_routings(kernels, dtype):
    rng = random.Random(3)
    for seed in range(25):
        experts = rng.choice([1, 2, 5, 16])
        exact = call(
            rng.choice([1, 2, 3, 17, 64, 150]), experts, rng.randint(1, experts), rng.choice([1, 3, 16, 33]),
            rng.choice([1, 2, 7, 16, 50]), gated=rng.random() < 0.6, biases=rng.random() < 0.5, seed=seed,
            absent=rng.choice([0, 2]),
        )  # fmt: skip
        c = to(exact, dtype)
        on_input = rng.random() < 0.3
        # The error of adding the terms of one element is relative to the terms, not to a sum in which they cancel.
        expected = reference(to(c, torch.float64), Activation("silu"), on_input)
        actual = run(c, Activation("silu"), on_input)
        assert actual.dtype == dtype
        scale = max(float(expected.norm()), 0.1 * expected.numel() ** 0.5)
        assert float((actual.double() - expected).norm()) <= TOLERANCE[dtype] * scale, (seed, c.hidden.shape)


@pytest.mark.parametrize("tokens", [1, 4, 300])
def test_large_numbers_of_experts(kernels, tokens):
    c = call(tokens, 1024, 32, m=4, width=8, dtype=torch.float32)
    assert error(run(c), reference(to(c, torch.float64))) < TOLERANCE[torch.float32]


def test_all_tokens_to_one_expert_and_none_to_the_others(kernels):
    c = call(200, 8, 1, m=16, width=16)._replace(indices=torch.full((200, 1), 3))
    leaves = [t.requires_grad_() for t in tensors(c)]
    actual, expected = run(c), reference(c)
    assert_close(actual, expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
    ):
        assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("on_input", [False, True])
def test_many_tokens_are_computed_in_parts(monkeypatch, on_input):
    c = call(50, absent=2)
    leaves = [c.hidden.requires_grad_(), c.weights.requires_grad_()]  # no gradients of the experts

    def found():
        output = run(c, Activation("silu"), on_input)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]

    monkeypatch.setattr(kernels_native, "serves", lambda *_: False)
    monkeypatch.setattr(kernels_native, "serves_backward", lambda *_: False)
    whole, sizes, of = found(), [], kernels_torch.Dispatch.of
    monkeypatch.setattr(kernels_torch.Dispatch, "of", lambda indices, n: sizes.append(len(indices)) or of(indices, n))
    monkeypatch.setattr(kernels_torch, "AT_ONCE", 1 << 14)
    for ours, theirs in zip(found(), whole, strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-13)
    assert max(sizes) < 50
    assert sum(sizes) == 100  # forward and backward


def test_every_expert_selected(kernels):
    c = call(6, 5, 5, absent=0)
    assert_close(run(c), reference(c))


def test_no_tokens(kernels):
    c = call(0)
    leaves = [t.requires_grad_() for t in tensors(c)]
    output = run(c)
    assert output.shape == (0, 3)
    assert all((g == 0).all() for g in torch.autograd.grad(output.sum(), leaves))


def test_numbers_past_the_experts_contribute_nothing(kernels):
    c = call()
    nobody = c._replace(indices=torch.full_like(c.indices, 4))
    leaves = [t.requires_grad_() for t in tensors(nobody)]
    output = run(nobody)
    assert (output == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(output.sum(), leaves))
    far = c._replace(indices=c.indices.masked_fill(c.indices == 4, 2**40))
    assert_close(run(far), run(c), rtol=0, atol=0)


def test_negative_numbers_are_refused(kernels):
    c = call()
    c.indices[2, 1] = -3
    with pytest.raises(ValueError, match=r"indices \[5, 2\].*>= 0.*-3"):
        run(c)
    with pytest.raises(ValueError, match="-3"):
        kernels.backward(c.hidden, *c, SILU, False, True)


def test_checked_mode_refuses_numbers_that_name_no_expert():
    indices = torch.tensor([[0, 5]])
    ops.check_indices(indices, 4)
    with ops.checked(), pytest.raises(ValueError, match=r"\[0, 4\).*0 … 5"):
        ops.check_indices(indices, 4)
    with ops.checked():
        ops.check_indices(indices, 6)
        ops.check_indices(indices[:0], 1)
    ops.check_indices(indices, 4)


def test_nan_in_a_token_stays_with_that_token(kernels):
    for tokens in (5, 100):
        c = call(tokens, absent=0)
        c.hidden[1] = float("nan")
        output = run(c)
        assert output[1].isnan().all()
        assert not output[[0, *range(2, tokens)]].isnan().any()


def test_nan_in_an_expert_reaches_those_who_select_it(kernels):
    for tokens in (5, 100):
        c = call(tokens, absent=0)
        c.experts.down[2, 0, 0] = float("nan")
        assert torch.equal(run(c).isnan().any(1), (c.indices == 2).any(1))


def test_strided_inputs(kernels):
    c = call(7, 4, 2, m=6, width=5)
    strided = Call(
        c.hidden.T.contiguous().T,
        c.indices.T.contiguous().T,
        c.weights.repeat_interleave(2, 1)[:, ::2],
        Experts(*(t.transpose(-1, -2).contiguous().transpose(-1, -2) for t in c.experts)),
    )
    assert not any(t.is_contiguous() for t in (strided.hidden, strided.indices, strided.weights, strided.experts.up))
    assert_close(run(strided), run(c))
    leaves = [t.requires_grad_() for t in tensors(strided)]
    others = [t.requires_grad_() for t in tensors(c)]
    grad = torch.randn(5, 7, dtype=torch.float64).T
    ours, theirs = torch.autograd.grad(run(strided), leaves, grad), torch.autograd.grad(run(c), others, grad)
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b)


def test_misaligned_inputs(kernels):
    def shifted(t):
        if t is None:
            return None
        held = torch.empty(t.numel() + 1, dtype=t.dtype)
        held[1:] = t.flatten()
        return held[1:].view(t.shape)

    for dtype in (torch.float32, torch.bfloat16):
        c = call(30, m=33, width=17, dtype=dtype)
        moved = Call(*map(shifted, c[:3]), Experts(*map(shifted, c.experts)))
        assert_close(run(moved), run(c), rtol=0, atol=0)


def test_gradients_of_expanded_sums(kernels):
    c = call()
    c.hidden.requires_grad_()
    (grad,) = torch.autograd.grad(run(c).sum(), c.hidden)
    (expected,) = torch.autograd.grad(reference(c).sum(), c.hidden)
    assert_close(grad, expected)


def test_only_the_gradients_asked_for(kernels):
    c = call()
    c.hidden.requires_grad_()
    c.experts.down.requires_grad_()
    run(c).sum().backward()
    assert c.hidden.grad is not None
    assert c.experts.down.grad is not None
    assert c.experts.up.grad is None
    with torch.no_grad():
        full = kernels.backward(torch.ones_like(c.hidden), *c, SILU, False, True)
        few = kernels.backward(torch.ones_like(c.hidden), *c, SILU, False, False)
    assert_close(few.hidden, full.hidden, rtol=0, atol=0)
    assert all(g.numel() == 0 for g in few[2:])


def test_low_precision_gradients():
    c = call(40, m=16, width=16, dtype=torch.bfloat16)
    exact = to(c, torch.float64)
    leaves, others = ([t.requires_grad_() for t in tensors(each)] for each in (c, exact))
    ours, theirs = torch.autograd.grad(run(c).sum(), leaves), torch.autograd.grad(reference(exact).sum(), others)
    # Four roundings to bf16 in a row on the way back.
    assert max(error(a, b) for a, b in zip(ours, theirs, strict=True)) < 2e-2


def test_result_does_not_depend_on_the_number_of_threads(kernels):
    before = torch.get_num_threads()
    c = call(120, 8, 4, m=70, width=33, dtype=torch.float32)
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append((run(c), *kernels.backward(c.hidden, *c, SILU, False, True)))
    finally:
        torch.set_num_threads(before)
    exact = kernels is kernels_native
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            if exact:
                assert torch.equal(a, b)
            else:  # torch's own products may be split differently, and sums that cancel show it in single elements
                assert error(a, b) < TOLERANCE[torch.float32]


def test_few_experts_are_shared_out_among_threads():
    if kernels_native.load() is None:
        pytest.skip("no C++ compiler here")
    before = torch.get_num_threads()
    c = call(1, 2, 1, m=500, width=300, absent=0)
    try:
        torch.set_num_threads(4)
        assert_close(run(c), reference(c))
    finally:
        torch.set_num_threads(before)


def test_calls_from_threads(kernels):
    calls = [call(tokens, 8, 3, m=20, width=24, seed=tokens) for tokens in (1, 3, 40, 90)]
    expected = [reference(c) for c in calls]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: run(calls[i % 4]), range(40)))
    for i, result in enumerate(results):
        assert_close(result, expected[i % 4])


def test_weights_of_more_than_two_to_the_31_elements():
    experts, m, width = 1024, 2048, 1032
    up = torch.empty(experts, m, width, dtype=torch.bfloat16)  # pages that are never touched take no memory
    down = torch.empty(experts, width, m, dtype=torch.bfloat16)
    assert up.numel() > 2**31
    small = call(3, 2, 2, m, width, gated=False, biases=False, dtype=torch.bfloat16, absent=0)
    for to_expert, source in ((0, 0), (experts - 1, 1)):
        up[to_expert], down[to_expert] = small.experts.up[source] / 50, small.experts.down[source] / 50
    indices = torch.where(small.indices == 0, 0, experts - 1)
    scaled = Experts(None, small.experts.up / 50, small.experts.down / 50, None, None, None)
    far = Call(small.hidden, indices, small.weights, Experts(None, up, down, None, None, None))
    assert_close(run(far, Activation("relu")), run(small._replace(experts=scaled), Activation("relu")), rtol=0, atol=0)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weights": torch.zeros(5, 3, dtype=torch.float64)}, r"weights expected shape \[5, 2\], found \[5, 3\]"),
        ({"hidden": torch.zeros(5, 4, dtype=torch.float64)}, r"hidden expected shape \[5, 3\], found \[5, 4\]"),
        ({"hidden": torch.zeros(4, 3, dtype=torch.float64)}, r"indices expected shape \[4, 2\], found \[5, 2\]"),
        ({"hidden": torch.zeros(5, 3)}, r"hidden expected torch.float64 .*found torch.float32"),
        ({"indices": torch.zeros(5, 2, dtype=torch.int32)}, r"indices expected torch.int64.*found torch.int32"),
        ({"indices": torch.zeros(5, dtype=torch.int64)}, r"expected hidden \[T, l\], indices \[T, k\]"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        run(call()._replace(**change))


@pytest.mark.parametrize("name", ["gate", "down", "gate_bias", "up_bias", "down_bias"])
def test_expert_tensors_that_do_not_fit_are_named(name):
    c = call()
    wrong = c.experts._replace(**{name: getattr(c.experts, name)[:2]})
    with pytest.raises(ValueError, match=f"{name} expected shape"):
        run(c._replace(experts=wrong))


def arguments(c: Call) -> tuple:
    return (*c[:3], *c.experts, "silu", 1.7, None, 0.8, -0.7, 0.7, 1.0, False)


@pytest.mark.parametrize("tokens, gated, biases", [(5, True, True), (5, False, False), (0, True, False)])
def test_opcheck(tokens, gated, biases):
    c = call(tokens, gated=gated, biases=biases, dtype=torch.float32)
    backward = torch.ops.latentize.latent_experts_backward.default
    for experts_grad in (True, False):
        torch.library.opcheck(backward, (torch.randn_like(c.hidden), *arguments(c), experts_grad))
    for tensor in tensors(c):
        tensor.requires_grad_()
    torch.library.opcheck(ops.latent_experts, arguments(c))


def test_compile_without_graph_break_forward_and_backward():
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 9, 1):
        c = call(tokens)
        leaves = [t.requires_grad_() for t in tensors(c)]
        ours, eager = compiled(c, Activation("gelu"), True), run(c, Activation("gelu"), True)
        assert_close(ours, eager, rtol=0, atol=0)
        for a, b in zip(torch.autograd.grad(ours.sum(), leaves), torch.autograd.grad(eager.sum(), leaves), strict=True):
            assert_close(a, b, rtol=0, atol=0)
