"""Models that are called, kept or stored in unusual ways: each is lifted exactly, or refused with its reason."""

import copy
import re
import warnings

import pytest
import small_moe
import torch
import torch.nn.functional as F
from small_moe import Moe
from torch import nn
from torch.testing import assert_close

import latentize


class Net(small_moe.Net):
    """With dropout, whose mode matters."""

    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        return x + self.moe(self.drop(self.inner(x)))


class KeywordOnly(Net):
    def forward(self, *, x):
        return super().forward(x)


class Nested(Net):
    def forward(self, batch):
        return {"out": [super().forward(batch["x"][0])]}


class WithoutTensors(Net):
    def forward(self, tokens=24):
        return super().forward(torch.linspace(-3, 3, tokens * 16).cos().view(tokens, 16))


class WritesItsInput(Net):
    def forward(self, x):
        x += self.moe(self.inner(x))
        return x


class CalledTwice(Net):
    def forward(self, x):
        return super().forward(super().forward(x))


class SharedWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = Moe(), Moe()
        self.two.a, self.two.c = self.one.a, self.one.c

    def forward(self, x):
        x = x + self.one(x)
        return x + self.two(x)


class Int8(nn.Module):
    """A linear layer whose weight is kept in eight bits."""

    def __init__(self, rows, columns):
        super().__init__()
        weight = torch.randn(rows, columns) * 0.3
        self.register_buffer("scale", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("codes", (weight / self.scale).round().to(torch.int8))

    def forward(self, x):
        return x @ (self.codes.to(x.dtype) * self.scale).T


class Fp8(nn.Module):
    """A linear layer whose weight is a parameter of eight bits, with a scale a row."""

    def __init__(self, rows, columns):
        super().__init__()
        weight = torch.randn(rows, columns) * 0.3
        scale = weight.abs().amax(1, keepdim=True) / 448
        self.weight = nn.Parameter((weight / scale).to(torch.float8_e4m3fn), requires_grad=False)
        self.weight_scale_inv = nn.Parameter(scale)

    def forward(self, x):
        return x @ (self.weight.to(x.dtype) * self.weight_scale_inv.to(x.dtype)).T


class Fp4(nn.Module):
    """A linear layer whose weight is two four-bit floats a byte, with an exponent for each row of two."""

    def __init__(self, rows, columns):
        super().__init__()
        self.register_buffer("blocks", torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8))
        self.register_buffer("scales", torch.randint(123, 126, (rows, columns // 2), dtype=torch.uint8))
        positive = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
        self.register_buffer("values", torch.cat([positive, -positive]), persistent=False)

    def forward(self, x):
        pairs = torch.stack([self.values[(self.blocks & 15).int()], self.values[(self.blocks >> 4).int()]], -1)
        weight = torch.ldexp(pairs, self.scales.to(torch.int32).unsqueeze(-1) - 127).flatten(1)
        return x @ weight.to(x.dtype).T


class Quantised(Moe):
    layer = Int8

    def __init__(self):
        super().__init__()
        del self.a, self.c
        self.up = nn.ModuleList(self.layer(12, 16) for _ in range(4))
        self.down = nn.ModuleList(self.layer(16, 12) for _ in range(4))

    def expert(self, e, x):
        return self.down[e](F.silu(self.up[e](x)))


class QuantisedFp8(Quantised):
    layer = Fp8


class QuantisedFp4(Quantised):
    layer = Fp4


def hooked():
    model = Net()
    model.moe.register_forward_hook(lambda module, args, output: output * 2)
    model.moe.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    return model


X = torch.randn(2, 20, 16, generator=torch.Generator().manual_seed(3))
MODELS = {
    "keyword-only arguments": (KeywordOnly, (), {"x": X}),
    "nested arguments": (Nested, ({"x": [X]},), {}),
    "no tensors": (WithoutTensors, (), {}),
    "writes its input": (WritesItsInput, (X,), {}),
    "called twice": (CalledTwice, (X,), {}),
    "weights shared between blocks": (SharedWeights, (X,), {}),
    "hooks": (hooked, (X,), {}),
    "one token": (Net, (X[:1, :1],), {}),
    "int8 weights": (Quantised, (X,), {}),
    "fp8 weights with scales": (QuantisedFp8, (X,), {}),
    "fp4 weights in bytes": (QuantisedFp4, (X,), {}),
}


class Experts(nn.Module):
    """Relu experts that are told which to use and how much."""

    def __init__(self):
        super().__init__()
        self.a = nn.Parameter(torch.randn(4, 12, 16) * 0.2)
        self.c = nn.Parameter(torch.randn(4, 16, 12) * 0.2)

    def forward(self, x, indices, weights):
        out = torch.zeros_like(x)
        for e in range(4):
            row, slot = torch.where(indices == e)
            out.index_add_(0, row, F.relu(x[row] @ self.a[e].T) @ self.c[e].T * weights[row, slot, None])
        return out


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16))

    def forward(self, x):
        weights, indices = (x @ self.weight.T).softmax(-1).topk(2, -1)
        return indices, weights


class Layer(nn.Module):
    def __init__(self, experts):
        super().__init__()
        self.router, self.experts, self.wide = Router(), experts, nn.Linear(16, 16)

    def forward(self, x):
        flat = x.reshape(-1, 16)
        return (self.wide(flat) + self.experts(flat, *self.router(flat))).view(x.shape)


class SharedExperts(nn.Module):
    """Two layers with routers of their own over the same experts."""

    def __init__(self):
        super().__init__()
        experts = Experts()
        self.layers = nn.Sequential(Layer(experts), Layer(experts))

    def forward(self, x):
        return self.layers(x)


class Counting(Net):
    """Counts its tokens and keeps what it saw, in buffers."""

    def __init__(self):
        super().__init__()
        self.register_buffer("tokens", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(0, 16))

    def forward(self, x):
        self.tokens += x.numel() // 16
        self.seen = torch.cat([self.seen, x.detach().reshape(-1, 16)])
        return super().forward(x)


def outputs(model, args, kwargs):
    with torch.no_grad():
        found = model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    return torch.cat([t.flatten() for t in torch.utils._pytree.tree_leaves(found)])


@pytest.mark.parametrize("name", MODELS)
def test_is_lifted_and_rewritten_exactly_and_its_inputs_are_left_alone(name):
    make, args, kwargs = MODELS[name]
    torch.manual_seed(0)
    model = make().eval()
    before = copy.deepcopy((args, kwargs))
    recipe = latentize.Recipe(latent_dim=16, experts_factor=2, topk_factor=2, heal_steps=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        result = latentize.convert(model, args, kwargs, recipe=recipe)
    assert {block.status for block in result.blocks} == {"moe"}, result.blocks
    wanted, found = outputs(model, args, kwargs), outputs(result.model, args, kwargs)
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()
    for old, new in zip(*(torch.utils._pytree.tree_leaves(v) for v in (before, (args, kwargs))), strict=True):
        assert torch.equal(old, new)


def test_layers_that_share_their_experts_get_latent_experts_of_their_own(tmp_path):
    torch.manual_seed(0)
    model = SharedExperts().eval()
    result = latentize.convert(model, (X,), recipe=latentize.Recipe(latent_dim=8, heal_steps=0), calibration=[(X,)])
    assert len(result.rewritten) == 2
    inside = {id(module) for module in result.model.modules()}
    assert all(id(block.experts) in inside for block in result.rewritten.values())
    result.save(tmp_path / "out")
    again = latentize.load(tmp_path / "out", model=SharedExperts())
    assert torch.equal(outputs(again, (X,), {}), outputs(result.model, (X,), {}))


def test_buffers_that_count_are_left_as_they_were():
    torch.manual_seed(0)
    model = Counting().eval()
    seen = model.seen
    latentize.inspect(model, (X,))
    assert (int(model.tokens), model.seen) == (0, seen)
    recipe = latentize.Recipe(latent_dim=8, heal_steps=2)
    latentize.convert(model, (X,), recipe=recipe, calibration=[(X,), (X + 1,)])
    assert int(model.tokens) == 0
    assert model.seen is seen


def test_training_mode_is_kept_and_said():
    torch.manual_seed(0)
    model = Net().train()
    result = latentize.convert(model, (X,), recipe=latentize.Recipe(latent_dim=8, heal_steps=0))
    assert [block.status for block in result.blocks] == ["moe"]
    assert all(module.training for module in model.modules())
    assert any("training mode" in line for line in result.warnings)


def broken(kind):
    torch.manual_seed(0)
    model = Net().eval()
    if kind == "nan":
        model.moe.a.data[1, 2, 3] = float("nan")
    elif kind == "meta":
        model.moe.c = nn.Parameter(model.moe.c.to("meta"))
    return model


def test_weights_of_eight_bits_are_read_as_the_model_computes_with_them():
    torch.manual_seed(0)
    model = Net().eval()
    model.moe.a = nn.Parameter(model.moe.a.detach().to(torch.float8_e4m3fn), requires_grad=False)
    recipe = latentize.Recipe(latent_dim=16, experts_factor=2, topk_factor=2, heal_steps=0)
    result = latentize.convert(model, (X,), recipe=recipe)
    assert [block.status for block in result.blocks] == ["moe"]
    assert result.model.moe is not model.moe
    with torch.no_grad():
        assert_close(result.model(X), model(X))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("nan", r"moe.a \[4, 12, 16\] holds NaN or Inf; repair the weights"),
        ("meta", "load its weights"),
    ],
)
def test_weights_that_cannot_be_computed_with_are_named(kind, reason):
    (block,) = latentize.inspect(broken(kind), (X,))
    assert block.status == "refused"
    assert re.search(reason, block.reason), block.reason


class LeavesALoss(Moe):
    """Sets an attribute in every run."""

    def forward(self, hidden):
        out = super().forward(hidden)
        self.loss = out.square().mean()
        return out


class ReturnsTheLoss(nn.Module):
    """Returns what its block has set beside what it returned."""

    def __init__(self):
        super().__init__()
        self.block = LeavesALoss()

    def forward(self, x):
        return self.block(x), self.block.loss


def test_a_block_of_which_more_is_read_than_it_returns_is_refused_with_what():
    (block,) = latentize.inspect(ReturnsTheLoss().eval(), args=(torch.randn(1, 24, 16),))
    assert block.status == "refused"
    assert "reads 'loss' of it" in block.reason
