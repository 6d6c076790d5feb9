"""A block at few tokens in one call of the compiled kernels, against the reference in fp64."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from itertools import product

import pytest
import torch
from random_blocks import random_block
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from latentize import block_native, kernels_native, ops
from latentize.moe import LatentMoE
from latentize.reference import moe_forward
from latentize.routing import route
from latentize.spec import Groups

pytestmark = pytest.mark.skipif(kernels_native.load() is None, reason="no C++ compiler here")

SIGMOID = {"score": "sigmoid", "normalize": "sum", "eps": 1e-20, "scale": 2.5}
ROUTERS = {
    "softmax": {},
    "divided": {"normalize": "sum"},
    "top-k first": {"order": "topk_first"},
    "sigmoid, biased": {**SIGMOID, "selection_bias": True},
    "bias on the logit": {"selection_bias": True, "selection_bias_on": "logit"},
    "softplus": {"score": "sqrt_softplus", "normalize": "clamp", "eps": 2.0, "per_expert_scale": True},
    "capped": {"softcap": 1.5, "normalize": "sum"},
    "top-k first, biased, capped": {"order": "topk_first", "selection_bias": True, "softcap": 2.0},
    "input": {"applies_to": "input", **SIGMOID},
}
BLOCKS = {
    "latent": {},
    "standard": {"latent": False},
    "ungated": {"gated": False},
    "biases": {"biases": True},
    "identity": {"identity": 3},
    "bypass": {"bypass": 4, "factor": 0.5},
    "scaled": {"factor": 0.5},
    "narrow": {"d": 5, "width": 3, "m": 2},
    "wide": {"d": 130, "width": 70, "m": 300, "n": 5},
}


def block(d=24, width=9, m=20, n=6, k=3, *, identity=0, biases=False, factor=1.0, **options):
    """A spec in fp64 with random weights of moderate size."""
    draw = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64) * shape[-1] ** -0.5

    for name in ("selection_bias", "per_expert_scale"):
        if options.get(name) is True:
            options[name] = normal(n + identity)
    spec = random_block(normal, d, width, m, n, k, identity=identity, biases=biases, **options)
    router = replace(spec.router, weight=4 * spec.router.weight)
    return replace(spec, router=router, output_scale=factor, output_bias=normal(d) if biases else None)


def tokens(count, d=24, seed=1):
    return torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def calls(monkeypatch):
    """The calls of the kernel: (with a router, with experts) of each."""
    seen, call = [], block_native._call

    def counted(hidden, read, router, experts, out, others):
        seen.append((router is not None, experts is not None))
        return call(hidden, read, router, experts, out, others)

    monkeypatch.setattr(block_native, "_call", counted)
    return seen


@pytest.fixture(params=[1, 2, 5])
def threads(request, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: request.param)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-13), (torch.float32, 2e-6)])
@pytest.mark.parametrize("options", [*BLOCKS.values(), *ROUTERS.values()], ids=[*BLOCKS, *ROUTERS])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_a_block_is_the_reference(calls, options, count, dtype, tolerance):
    exact = block(**options)
    spec, x = exact.to(dtype), tokens(count, exact.hidden_size).to(dtype)
    expected = moe_forward(spec.to(torch.float64), x.double())
    with torch.no_grad():
        found = LatentMoE(spec)(x)
    assert calls == [(True, True)]
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


def test_threads_change_nothing(threads):
    spec = block(d=256, width=128, m=256, n=6).to(torch.float32)
    for count in (1, 4):
        x = tokens(count, 256).float()
        with torch.no_grad():
            found = LatentMoE(spec)(x)
        expected = moe_forward(spec.to(torch.float64), x.double())
        assert (found.double() - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("dtype, router", product([torch.bfloat16, torch.float16], [None, torch.float32]))
def test_16_bits_are_rounded_where_the_operations_round(calls, dtype, router):
    exact = block(biases=True, d=64, width=32, m=48, **SIGMOID)
    spec = exact.to(dtype)
    if router is not None:
        spec = replace(spec, router=exact.to(router).router)
    x, module = tokens(4, 64).to(dtype), LatentMoE(spec)
    with torch.no_grad():
        found = module(x)
        with ops.plain():
            expected = module(x)
    assert calls == [(True, True)]
    assert found.dtype == dtype
    assert (found - expected).double().norm() <= 4 * torch.finfo(dtype).eps * expected.double().norm()


@pytest.mark.parametrize("rule", ROUTERS.values(), ids=ROUTERS)
@pytest.mark.parametrize("count, n, k", [(6, 8, 3), (3, 37, 8), (2, 5, 5), (1, 1, 1), (1, 300, 22)])
def test_routing_is_the_definition(calls, rule, count, n, k):
    router, x = block(n=n, k=k, **rule).to(torch.float32).router, tokens(count).float()
    with torch.no_grad():
        found = LatentMoE(replace(block(n=n).to(torch.float32), router=router)).router(x)
    logits = x.double() @ router.weight.double().T
    expected = route(logits, router)
    assert calls == [(True, False)]
    assert torch.equal(found.indices, expected.indices)
    assert_close(found.weights.double(), expected.weights, rtol=3e-6, atol=1e-7)
    assert_close(found.logits.double(), logits, rtol=2e-6, atol=1e-5)


def test_experts_alone_with_routing_from_elsewhere(calls):
    spec = block(identity=2).to(torch.float32)
    module, x = LatentMoE(spec), tokens(4).float()
    indices = torch.tensor([[0, 0, 0], [5, 7, 6], [1, 2, 3], [4, 4, 5]])
    weights = torch.rand(4, 3, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = module.experts(x, indices, weights)
        strided = module.experts(x.T.contiguous().T, indices.T.contiguous().T, weights.T.contiguous().T)
        with ops.plain():
            expected = module.experts(x, indices, weights)
    assert calls == [(False, True)] * 2
    assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(strided, found)


def test_more_pairs_of_one_expert_than_tokens():
    module, x = LatentMoE(block().to(torch.float32)), tokens(8).float()
    indices, weights = torch.full((8, 5), 3), torch.linspace(0, 1, 40).view(8, 5)
    with torch.no_grad():
        found = module.experts(x, indices, weights)
        with ops.plain():
            expected = module.experts(x, indices, weights)
    assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_stray_expert_numbers():
    module, x = LatentMoE(block().to(torch.float32)), tokens(1).float()
    weights = torch.ones(1, 3)
    with torch.no_grad():
        with pytest.raises(ValueError, match="found -2"):
            module.experts(x, torch.tensor([[0, -2, 1]]), weights)
        past = module.experts(x, torch.tensor([[0, 6, 1]]), weights)
        assert_close(past, module.experts(x, torch.tensor([[0, 1]]), weights[:, :2]))
        with ops.checked(), pytest.raises(ValueError, match=r"found 0 … 6"):
            module.experts(x, torch.tensor([[0, 6, 1]]), weights)


def test_nan_stays_with_its_token_and_is_chosen_first():
    module, x = LatentMoE(block(score="sigmoid").to(torch.float32)), tokens(4).float()
    with torch.no_grad():
        expected = module(x)
        x[2, 5] = torch.nan
        found, routing = module(x), module.router(x)
        assert found[2].isnan().all()
        assert_close(found[[0, 1, 3]], expected[[0, 1, 3]], rtol=1e-5, atol=1e-6)
        assert routing.indices[2].tolist() == [0, 1, 2]
        module.router.weight[4] = torch.nan
        assert module.router(tokens(1).float()).indices[0, 0] == 4


def test_equal_choices_take_each_expert_once():
    spec = block(n=6, k=4).to(torch.float32)
    spec = replace(spec, router=replace(spec.router, weight=spec.router.weight[:1].repeat(6, 1)))
    with torch.no_grad():
        found = LatentMoE(spec).router(tokens(3).float())
    assert found.indices.tolist() == [[0, 1, 2, 3]] * 3
    assert (found.logits == found.logits[:, :1]).all()


def test_any_leading_shape_and_strides(calls):
    module, x = LatentMoE(block().to(torch.float32)), tokens(6).float()
    with torch.no_grad():
        expected = module(x)
        assert torch.equal(module(x.view(2, 3, 24)), expected.view(2, 3, 24))
        assert torch.equal(module(x[0]), module(x[:1])[0])
        assert torch.equal(module(x.T.contiguous().T), expected)
        other = tokens(6, seed=2).float()
        assert not torch.equal(module(x, other), expected)
        assert_close(module(x, other), moe_forward(module.spec, x, other), rtol=1e-5, atol=1e-6)
    assert set(calls) == {(True, True)}


def test_changed_weights_are_seen(calls):
    spec, x = block().to(torch.float32), tokens(2).float()
    module, doubled = LatentMoE(spec.map_tensors(torch.clone)), LatentMoE(spec)
    with torch.no_grad():
        before = module(x)
        module.experts.latent_up.mul_(2)
        assert_close(module(x), 2 * before)
        module.experts.latent_up = nn.Parameter(4 * doubled.experts.latent_up)
        assert_close(module(x), 4 * before)
        module.experts.output_scale = 0.5
        assert_close(module(x), 2 * before)
        module.router.rule = replace(module.router.rule, scale=3.0)
        assert_close(module(x), 6 * before)
        assert calls == [(True, True)] * 5
        turned = module.experts.down.data = module.experts.down.data.transpose(1, 2).contiguous().transpose(1, 2)
        assert not turned.is_contiguous()
        assert_close(module(x), 6 * before)
        assert calls[5:] == [(True, False)]  # its experts are not where the kernel can read them
        module.experts.down.data = turned.contiguous()
        module.double()
        assert_close(module(x.double()).float(), 6 * before)
        assert calls[6:] == [(True, True)]


def test_tensors_made_at_each_look_are_left_to_the_operations(calls):
    module, x = LatentMoE(block().to(torch.float32)), tokens(1).float()
    with torch.no_grad():
        expected = module(x)
        twin = copy.deepcopy(module)
        torch.nn.utils.parametrize.register_parametrization(twin.experts, "gate", nn.Identity())
        assert_close(twin(x), expected)
        gate = module.experts.gate.detach()
        del module.experts.gate
        module.experts.gate = gate
        assert_close(module(x), expected)
        module.experts.gate_bias = torch.ones(6, 20)
        assert not torch.allclose(module(x), expected)
    assert calls == [(True, True)] + [(True, False)] * 3


def test_an_absent_tensor_that_appears_is_seen():
    module, x = LatentMoE(block().to(torch.float32)), tokens(1).float()
    with torch.no_grad():
        before = module(x)
        module.experts.output_bias = nn.Parameter(torch.ones(24))
        assert_close(module(x), before + 1)
        module.experts.bypass_down = nn.Parameter(torch.eye(24))
        module.experts.bypass_up = nn.Parameter(3 * torch.eye(24))
        assert_close(module(x), before + 1 + 3 * x)
        module.router.selection_bias = torch.tensor([9.0, 9.0, 9.0, 0.0, 0.0, 0.0])
        assert sorted(module.router(x).indices[0].tolist()) == [0, 1, 2]


def test_copies_compute_with_their_own_weights():
    module, x = LatentMoE(block().to(torch.float32)), tokens(1).float()
    with torch.no_grad():
        expected = module(x)
        for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            twin.experts.latent_up.zero_()
            assert twin(x).abs().max() == 0
        assert torch.equal(module(x), expected)


def test_hooks_on_the_parts_are_called(calls):
    module, x, seen = LatentMoE(block().to(torch.float32)), tokens(2).float(), []
    with torch.no_grad():
        expected = module(x)
        handle = module.router.register_forward_hook(lambda *a: seen.append("router"))
        assert_close(module(x), expected)
        handle.remove()
        handle = module.experts.register_forward_pre_hook(lambda *a: seen.append("experts"))
        assert_close(module(x), expected)
        handle.remove()
        handle = nn.modules.module.register_module_forward_hook(lambda m, *a: seen.append(type(m).__name__))
        assert_close(module(x), expected)
        handle.remove()
    assert seen == ["router", "experts", "Router", "LatentExperts", "LatentMoE"]
    assert calls == [(True, True), *[(True, False), (False, True)] * 3]


class Watching(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_whoever_watches_sees_the_operations(calls):
    module, x = LatentMoE(block().to(torch.float32)), tokens(2).float()
    module(x).sum().backward()
    assert module.router.weight.grad is not None
    with torch.no_grad():
        with Watching() as mode:
            module(x)
        assert ops.latent_experts in mode.seen
        with FakeTensorMode(allow_non_fake_inputs=True):
            module(x)
        with torch.autocast("cpu", torch.bfloat16):
            module(x)
        with ops.plain():
            module(x)
        traced = torch.jit.trace(module, (x,), check_trace=False)
        exported = torch.export.export(module, (x,))
        graph = torch.fx.experimental.proxy_tensor.make_fx(module)(x)
    assert not calls
    assert any(node.target is ops.latent_experts for node in exported.graph.nodes)
    assert any(node.target is ops.latent_experts for node in graph.graph.nodes)
    other = tokens(2, seed=3).float()
    with torch.no_grad():
        assert_close(traced(other), module(other), rtol=1e-5, atol=1e-6)


def test_compiles_without_a_break(calls):
    module, x = LatentMoE(block().to(torch.float32)), tokens(2).float()
    with torch.no_grad():
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        found = compiled(x)
        assert not calls
        assert_close(found, module(x), rtol=1e-5, atol=1e-6)


def test_what_the_kernel_does_not_do_is_left_to_the_operations(calls):
    x = tokens(2).float()
    specs = [
        block(groups=Groups(3, 2), score="sigmoid"),
        block(normalize="norm", p=2.0),
    ]
    with torch.no_grad():
        for spec in specs:
            expected = moe_forward(spec, x.double())
            assert_close(LatentMoE(spec.to(torch.float32))(x).double(), expected, rtol=1e-5, atol=1e-5)
        assert calls == [(False, True)] * 2
        module = LatentMoE(block().to(torch.float32))
        assert module(tokens(9).float()).shape == (9, 24)
        assert module(tokens(0).float()).shape == (0, 24)
        assert calls[2:] == []
        assert module(x.to(torch.bfloat16)).dtype == torch.bfloat16
        assert calls[2:] == [(True, False), (False, True)]  # tokens are widened for the experts alone


def test_without_compiled_kernels_the_operations_serve(calls, monkeypatch):
    module, x = LatentMoE(block().to(torch.float32)), tokens(2).float()
    with torch.no_grad():
        expected = module(x)
        monkeypatch.setattr(block_native, "block_of", lambda _dtype: None)
        assert_close(copy.deepcopy(module)(x), expected, rtol=1e-5, atol=1e-6)
    assert calls == [(True, True)]
