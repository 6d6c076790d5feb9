"""The Triton kernels run by Triton's interpreter, against the fp64 reference: fp32 and fp16, its bf16 being wrong.

Interpretation is decided when Triton is first imported: `test_kernels_triton.py` runs this file in its own process.
"""

from __future__ import annotations

import itertools
import os
import random

import expert_calls
import pytest
import torch
from expert_calls import CLAMPED, SILU, Call, reference, to
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("runs inside test_kernels_triton.py, under TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl

import latentize
from latentize import kernels_triton, ops, route_triton
from latentize.activations import FUNCTIONS, Activation
from latentize.kernels_torch import Experts
from latentize.kernels_triton_math import activate
from latentize.kernels_triton_steps import FORMS, Cut, Problem, block_count, steps, workspaces
from latentize.moe import LatentMoE, Router
from latentize.routing import route
from latentize.spec import ExpertsSpec, Groups, MoESpec, RouterSpec

#: Largest relative error: fp32 sums in another order; fp16 rounds hidden activations, pairs' outputs and the result.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1.5e-3}


def call(tokens=5, experts=4, k=2, m=24, width=19, **options) -> Call:
    """Random fp64 arguments, of sizes that fill more than one tile of a kernel."""
    return expert_calls.call(tokens, experts, k, m, width, **options)


def run(c: Call, form=None, activation: Activation = SILU, on_input: bool = False) -> Tensor:
    assert kernels_triton.serves(c.hidden, c.experts)
    return kernels_triton.forward(*c, activation, on_input, form)


def assert_reference(c: Call, form=None, activation: Activation = SILU, on_input: bool = False) -> None:
    actual, expected = run(c, form, activation, on_input), reference(to(c, torch.float64), activation, on_input)
    assert actual.dtype == c.hidden.dtype
    scale = expected.norm() if expected.norm() > 0 else 1.0
    assert float((actual.double() - expected).norm() / scale) < TOLERANCE[c.hidden.dtype]


@triton.jit
def activations(
    gate, up, out, GATED: tl.constexpr, ACTIVATION: tl.constexpr, ALPHA: tl.constexpr, GATE_MIN: tl.constexpr,
    GATE_MAX: tl.constexpr, UP_MIN: tl.constexpr, UP_MAX: tl.constexpr, UP_OFFSET: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    at = tl.arange(0, SIZE)
    g, u = tl.load(gate + at), tl.load(up + at)
    h = activate(g, u, GATED, ACTIVATION, ALPHA, GATE_MIN, GATE_MAX, UP_MIN, UP_MAX, UP_OFFSET)
    tl.store(out + at, h)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("options", [{}, CLAMPED], ids=["plain", "clamped"])
def test_every_activation_elementwise(name, gated, options):
    """From the smallest arguments to saturation, each to a few roundings of its own value."""
    magnitudes = torch.logspace(-6, 1.9, 511)
    gate = torch.cat([magnitudes, -magnitudes, torch.tensor([0.0, float("nan")])])
    up = gate.flip(0) if gated else gate
    out = torch.empty_like(gate)
    a = Activation(name, **options)
    scalars = (a.alpha, a.gate_min, a.gate_max, a.up_min, a.up_max, a.up_offset)
    activations[(1,)](gate, up, out, gated, name, *scalars, len(gate))
    expected = a(gate.double() if gated else None, up.double())
    # erf and 1 + tanh cancel for large negative arguments: there the error is relative to the argument.
    absolute = 4e-7 * gate.double().abs() * up.double().abs().clamp_min(1) if "gelu" in name else 1e-40
    error = (out.double() - expected).abs()
    assert torch.equal(out.isnan(), expected.isnan())
    assert bool((error <= 2e-6 * expected.abs() + absolute)[~expected.isnan()].all())


VARIANTS = list(itertools.product([True, False], [True, False], [True, False]))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gated, biases, on_input", VARIANTS)
def test_every_form_is_the_reference(form, gated, biases, on_input):
    assert_reference(to(call(gated=gated, biases=biases), torch.float32), form, Activation("gelu", **CLAMPED), on_input)


@pytest.mark.parametrize("form", FORMS)
def test_half_precision(form):
    assert_reference(to(call(6, width=32, m=32), torch.float16), form)


@pytest.mark.parametrize("form", FORMS)
def test_random_sizes_and_routings(form):
    rng = random.Random(5)
    for seed in range(5):
        experts = rng.choice([1, 2, 5])
        sizes = {"m": rng.choice([1, 3, 33, 70]), "width": rng.choice([1, 7, 16, 50])}
        tokens, k, absent = rng.choice([1, 2, 7]), rng.randint(1, experts), rng.choice([0, 2])
        c = call(tokens, experts, k, **sizes, gated=rng.random() < 0.6, absent=absent, seed=seed)
        assert_reference(to(c, torch.float32), form, on_input=rng.random() < 0.3)


@pytest.mark.parametrize("form", ["fused", "grouped"])
def test_all_tokens_to_one_expert_and_several_blocks_of_it(form):
    c = to(call(40, experts=3, k=1, absent=0), torch.float32)
    assert_reference(c._replace(indices=torch.full_like(c.indices, 2)), form)


def test_many_experts_and_a_large_top_k():
    assert_reference(to(call(1, experts=1024, k=32, m=4, width=5, gated=False), torch.float32), "fused")


def test_the_form_is_chosen_by_the_number_of_tokens(monkeypatch):
    chosen = []
    real = kernels_triton.run
    monkeypatch.setattr(kernels_triton, "run", lambda p, cut, t: chosen.append(cut.form) or real(p, cut, t))
    for tokens in (1, 9):
        assert_reference(to(call(tokens), torch.float32))
    assert chosen == ["decode", "fused"]


def test_the_probe_of_a_device_passes_where_kernels_run():
    assert kernels_triton._passes_values_through(torch.device("cpu"))


def test_no_tokens():
    c = to(call(0), torch.float32)
    assert run(c).shape == (0, 19)


@pytest.mark.parametrize("form", FORMS)
def test_numbers_that_name_no_expert(form):
    """Past the experts: nothing. Negative: NaN for that token, and nothing is read."""
    c = to(call(4, absent=0), torch.float32)
    c.indices[0] = 99
    c.indices[1, 0] = 2**32 + 1
    assert_reference(c, form)
    c.indices[2, 1] = -1
    output = run(c, form)
    assert output[2].isnan().all()
    assert not output[[0, 1, 3]].isnan().any()
    assert not output[0].any()


@pytest.mark.parametrize("form", FORMS)
def test_nan_passes_through_to_those_it_concerns(form):
    c = to(call(6, absent=0, biases=False), torch.float32)
    c.hidden[1] = float("nan")
    c.experts.down[2, 3, 0] = float("nan")
    output = run(c, form, Activation("relu"))
    assert output[1].isnan().all()
    assert torch.equal(output[:, 3].isnan(), (c.indices == 2).any(1) | (torch.arange(6) == 1))
    assert not output[[0, 2, 3, 4, 5]][:, :3].isnan().any()


@pytest.mark.parametrize("form", FORMS)
def test_halves_of_a_stack_strided_tokens_and_misaligned_weights(form):
    c = to(call(4, m=16, width=16), torch.float32)
    e = c.experts
    stacked = torch.cat([e.gate, e.up], 1)
    shifted = torch.empty(e.down.numel() + 1)
    shifted[1:] = e.down.flatten()
    experts = e._replace(gate=stacked[:, :16], up=stacked[:, 16:], down=shifted[1:].view(e.down.shape))
    strided = Call(c.hidden.T.contiguous().T, c.indices.T.contiguous().T, c.weights.T.contiguous().T, experts)
    assert not strided.hidden.is_contiguous()
    assert not experts.up.is_contiguous()
    assert_close(run(strided, form), run(c, form), rtol=0, atol=0)


@pytest.mark.parametrize("form", FORMS)
def test_weights_past_two_to_the_31_elements(form):
    c = to(call(3, experts=2, k=2, m=8, width=16, gated=False, biases=False, absent=0), torch.float16)
    pages = torch.empty(2**31 + 1024, dtype=torch.float16)  # those never touched take no memory
    up, down = pages.as_strided((2, 8, 16), (2**31, 16, 1)), pages.as_strided((2, 16, 8), (2**31, 8, 1), 512)
    up.copy_(c.experts.up)
    down.copy_(c.experts.down)
    far = Experts(None, up, down, None, None, None)
    assert_close(run(c._replace(experts=far), form), run(c, form), rtol=0, atol=0)


def placed(indices: torch.Tensor, experts: int, block: int, chunk: int) -> dict[str, torch.Tensor]:
    """What the sorting kernels write for indices [T, k], over memory that held other values."""
    tokens, k = indices.shape
    problem = Problem.contiguous(experts, k, 16, 16, torch.float32, SILU, gated=False, biases=False)
    cut = Cut("grouped", block, 1, chunk)
    held = {name: torch.full(s, -7, dtype=dtype) for name, (s, dtype) in workspaces(problem, tokens, cut).items()}
    counts = {"pairs": indices.numel(), "blocks": block_count(problem, indices.numel(), block)}
    given = {"indices": indices, **counts, **held}
    for step in steps(problem, cut)[:2]:
        kernels_triton.launch(step, given, tokens)
    return held


@pytest.mark.parametrize(
    "tokens, experts, k, block, chunk",
    [(1, 1, 1, 16, 128), (50, 7, 3, 16, 128), (200, 3, 4, 32, 128), (9, 1000, 9, 16, 128), (300, 40, 4, 64, 256)],
)
@pytest.mark.parametrize("absent", [0, 2])
def test_blocks_of_sorted_pairs(tokens, experts, k, block, chunk, absent):
    """Every real pair stands once, in order, in a block of its expert; blocks past the last one have no rows."""
    generator = torch.Generator().manual_seed(tokens)
    indices = torch.randint(-absent, experts + absent, (tokens, k), generator=generator)
    of = placed(indices, experts, block, chunk)
    flat, seen = indices.reshape(-1), []
    for expert, start, rows in zip(of["block_expert"], of["block_start"], of["block_rows"], strict=True):
        pairs = of["order"][start : start + rows]
        assert 0 <= rows <= block
        assert (flat[pairs] == expert).all()
        assert pairs.tolist() == sorted(pairs.tolist())
        seen += pairs.tolist()
    assert seen == sorted(seen, key=lambda pair: (int(flat[pair]), pair))
    assert sorted(seen) == ((flat >= 0) & (flat < experts)).nonzero().flatten().tolist()


def test_the_bound_on_blocks_is_tight():
    """One expert with a full block and one pair more, every other with one pair."""
    indices = torch.cat([torch.zeros(17, dtype=torch.int64), torch.arange(1, 9)])[:, None]
    rows = placed(indices, 9, 16, 128)["block_rows"]
    assert len(rows) - 1 <= rows.count_nonzero() <= len(rows)
    assert rows.sum() == 25


def test_the_operator_uses_them_with_gradients_and_passes_opcheck():
    c = to(call(3), torch.float32)
    leaves = [t.requires_grad_() for t in (c.hidden, c.weights, *c.experts)]
    output = ops.compute(*c[:3], *c.experts, SILU, False)
    assert_close(output, run(c), rtol=0, atol=0)
    exact = to(c, torch.float64)
    others = [t.detach().requires_grad_() for t in (exact.hidden, exact.weights, *exact.experts)]
    expected = reference(to(Call(others[0], c.indices, others[1], Experts(*others[2:])), torch.float64))
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    ours, theirs = torch.autograd.grad(output, leaves, grad), torch.autograd.grad(expected, others, grad.double())
    for a, b in zip(ours, theirs, strict=True):
        assert float((a - b).norm() / b.norm()) < 3e-6
    torch.library.opcheck(ops.latent_experts, (*c[:3], *c.experts, "silu", 1.0, None, None, None, None, 0.0, False))


def test_compiled_graphs_hold_the_operator():
    compiled = torch.compile(run_operator, fullgraph=True, backend="aot_eager")
    c = to(call(3), torch.float32)
    assert_close(compiled(*c[:3], *c.experts), run_operator(*c[:3], *c.experts), rtol=0, atol=0)


def run_operator(hidden, indices, weights, *experts):
    return ops.compute(hidden, indices, weights, *experts, SILU, False)


ROUTERS = [
    {},
    {"normalize": "sum", "eps": 1e-20, "scale": 2.5},
    {"score": "sigmoid", "selection_bias": "score", "normalize": "sum"},
    {"score": "sigmoid", "normalize": "clamp", "eps": 0.9, "per_expert_scale": True},
    {"score": "sqrt_softplus", "selection_bias": "logit", "selection_bias_on": "logit"},
    {"order": "topk_first", "softcap": 3.0},
    {"order": "topk_first", "score": "sigmoid", "selection_bias": "logit", "selection_bias_on": "logit"},
]


def router_of(rule: dict, experts: int, k: int, generator: torch.Generator) -> RouterSpec:
    vectors = {name: torch.randn(experts, generator=generator) / 3 for name in ("selection_bias", "per_expert_scale")}
    return RouterSpec(torch.empty(0), k, **{name: vectors.get(name, value) for name, value in rule.items()})


@pytest.mark.parametrize("rule", ROUTERS, ids=str)
@pytest.mark.parametrize("tokens, experts, k", [(6, 8, 3), (3, 37, 8), (2, 5, 5), (1, 1, 1)])
def test_routing_in_one_launch_is_the_definition(rule, tokens, experts, k):
    generator = torch.Generator().manual_seed(experts)
    router, logits = router_of(rule, experts, k, generator), 4 * torch.randn(tokens, experts, generator=generator)
    assert route_triton.serves(logits, router)
    found, expected = route_triton.route(logits, router), route(logits.double(), router)
    assert torch.equal(found.indices, expected.indices)
    assert_close(found.weights.double(), expected.weights, rtol=2e-6, atol=1e-7)


def test_routing_takes_nan_first_and_passes_it_on_to_its_token_alone():
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    logits[1, 4] = float("nan")
    found = route_triton.route(logits, RouterSpec(torch.empty(0), 2, score="sigmoid", normalize="sum"))
    assert found.indices[1, 0] == 4
    assert found.weights.isnan().all(1).tolist() == [False, True, False]
    logits[1] = float("nan")
    found = route_triton.route(logits, RouterSpec(torch.empty(0), 2))
    assert sorted(found.indices[1].tolist()) == [0, 1]
    assert found.weights.isnan().all(1).tolist() == [False, True, False]


def test_equal_choices_take_each_expert_once():
    found = route_triton.route(torch.zeros(1, 4), RouterSpec(torch.empty(0), 3))
    assert found.indices.tolist() == [[0, 1, 2]]
    bias = torch.tensor([0.0, -torch.inf, -torch.inf, 0.0])
    found = route_triton.route(torch.zeros(1, 4), RouterSpec(torch.empty(0), 3, selection_bias=bias))
    assert found.indices.tolist() == [[0, 3, 1]]


def test_routing_leaves_gradients_and_groups_to_the_definition():
    logits = torch.randn(2, 8)
    assert not route_triton.serves(logits.clone().requires_grad_(), RouterSpec(torch.empty(0), 2))
    assert not route_triton.serves(logits, RouterSpec(torch.empty(0), 2, groups=Groups(2, 1)))
    assert not route_triton.serves(logits, RouterSpec(torch.empty(0), 2, normalize="norm"))
    assert not route_triton.serves(logits.double(), RouterSpec(torch.empty(0), 2))


def test_nan_is_taken_before_infinity():
    logits = torch.tensor([[torch.inf, torch.nan, 0.0]])
    found = route_triton.route(logits, RouterSpec(torch.empty(0), 1, score="sqrt_softplus"))
    assert found.indices.tolist() == [[1]]
    assert found.weights.isnan().all()


@pytest.mark.parametrize("experts", [1025, 2048])
def test_routing_among_many_experts(experts):
    logits = torch.randn(2, experts, generator=torch.Generator().manual_seed(1))
    router = RouterSpec(torch.empty(0), 5, normalize="sum")
    assert route_triton.serves(logits, router)
    found, expected = route_triton.route(logits, router), route(logits.double(), router)
    assert torch.equal(found.indices, expected.indices)
    assert_close(found.weights.double(), expected.weights, rtol=2e-6, atol=1e-7)


def test_what_one_launch_does_not_do_is_left_to_the_definition():
    router = RouterSpec(torch.empty(0), 3)
    assert not route_triton.serves(torch.randn(2, 2049), router)
    assert not route_triton.serves(torch.randn(2, 2), router)
    assert not route_triton.serves(torch.randn(2, 3, 4), router)
    assert not route_triton.serves(torch.randn(0, 8), router)
    assert route_triton.routed(torch.randn(0, 8), router).indices.shape == (0, 3)
    scales = torch.ones(8, requires_grad=True)
    scaled = RouterSpec(torch.empty(0), 3, per_expert_scale=scales)
    route_triton.routed(torch.randn(2, 8), scaled).weights.sum().backward()
    assert scales.grad is not None
    weight = torch.randn(6, 10, requires_grad=True)
    module = Router(RouterSpec(weight, 2))
    module(torch.randn(4, 10)).weights.sum().backward()
    assert module.weight.grad is not None
    with FakeTensorMode():
        assert not route_triton.serves(torch.randn(2, 8), router)
    with ops.plain():
        assert not route_triton.serves(torch.randn(2, 8), router)


def test_blocks_of_our_own_are_still_seen_where_routing_is_one_launch():
    generator = torch.Generator().manual_seed(0)
    experts = ExpertsSpec(torch.randn(4, 6, 8, generator=generator), torch.randn(4, 8, 6, generator=generator))
    block = LatentMoE(MoESpec(RouterSpec(torch.randn(4, 8, generator=generator), 2), experts)).eval()
    (found,) = latentize.inspect(torch.nn.Sequential(block), (torch.randn(12, 8, generator=generator),))
    assert found.status == "moe", found.reason


def test_many_chunks_are_placed_in_order():
    indices = torch.randint(0, 3, (40 * 128, 1), generator=torch.Generator().manual_seed(0))
    of = placed(indices, 600, 128, 128)  # counts of 8 chunks at a time
    flat = indices.flatten()
    assert flat[of["order"].long()].tolist() == sorted(flat.tolist())
    assert torch.equal(of["order"].long(), flat.argsort(stable=True))


def test_the_module_routes_in_one_launch_and_passes_opcheck(monkeypatch):
    generator = torch.Generator().manual_seed(3)
    spec = RouterSpec(torch.randn(6, 10, generator=generator), 2, normalize="sum")
    x = torch.randn(4, 10, generator=generator)
    router = Router(spec).requires_grad_(False)
    found = router(x)
    monkeypatch.setenv("LATENTIZE_TRITON", "0")
    expected = router(x)
    assert torch.equal(found.indices, expected.indices)
    assert_close(found.weights, expected.weights)
    arguments = (torch.randn(3, 6), None, None, 2, None, "softmax", False, False, "sum", 0.0, 1.0)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.latentize.select_experts.default, arguments, test_utils=checks)
