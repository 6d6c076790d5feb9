"""`inspect` changes nothing, `convert` leaves what it is given alone, and a result says what was done."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import latentize
from latentize.calibration import batches_of
from latentize.errors import LatentizeError
from latentize.moe import LatentExperts
from latentize.statistics import BlockStatistics

WIDTH, INTERMEDIATE, EXPERTS, TOP_K = 16, 12, 4, 2


class Expert(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, INTERMEDIATE, bias=False)
        self.up = nn.Linear(WIDTH, INTERMEDIATE, bias=False)
        self.down = nn.Linear(INTERMEDIATE, WIDTH, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Moe(nn.Module):
    def __init__(self, experts=EXPERTS, top_k=TOP_K):
        super().__init__()
        self.router = nn.Linear(WIDTH, experts, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(experts))
        self.top_k = top_k

    def forward(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, slot = torch.where(chosen == number)
            out.index_add_(0, row, expert(x[row]) * weights[row, slot, None])
        return out


class Net(nn.Module):
    def __init__(self, blocks=2):
        super().__init__()
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Moe() for _ in range(blocks))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def net(blocks=2):
    torch.manual_seed(0)
    return Net(blocks).eval()


def example(rows=40, seed=1):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def data(batches=4):
    return [(example(64, seed),) for seed in range(batches)]


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def converted():
    """(original, its state before, result) of one conversion with healing, inside no_grad, from a one-shot iterable."""
    model = net()
    before = state(model)
    with torch.no_grad():
        result = latentize.convert(
            model,
            args=(example(),),
            recipe=latentize.Recipe(latent_dim=8, heal_steps=6),
            calibration=(b for b in data()),
        )
    return model, before, result


def test_inspect_finds_what_is_there_and_changes_nothing():
    model = net().train()
    before, modes = state(model), [m.training for m in model.modules()]
    random.seed(3)
    rng = torch.get_rng_state(), random.getstate()
    blocks = latentize.inspect(model, args=(example(),), kwargs={})
    assert [(b.name, b.status) for b in blocks] == [("blocks.0", "moe"), ("blocks.1", "moe")]
    sizes = blocks[0].spec
    found = (sizes.hidden_size, sizes.intermediate_size, sizes.num_experts, sizes.top_k)
    assert found == (WIDTH, INTERMEDIATE, EXPERTS, TOP_K)
    assert blocks[0].max_error < 4e-6
    assert same(state(model), before)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng[0])
    assert random.getstate() == rng[1]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_inspect_of_a_model_without_moe_is_empty():
    assert latentize.inspect(nn.Linear(4, 4), args=(torch.ones(2, 4),)) == []


def test_convert_leaves_the_model_it_was_given_unchanged(converted):
    model, before, result = converted
    assert same(state(model), before)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(isinstance(module, LatentExperts) for module in model.modules())
    assert result.model is not model


def test_convert_shares_what_it_does_not_touch_and_copies_what_healing_trains(converted):
    model, _, result = converted
    assert result.model.head.weight is model.head.weight
    old = {p.untyped_storage().data_ptr() for p in model.blocks.parameters()}
    new = [p for block in result.rewritten.values() for p in block.parameters()]
    assert new
    assert not any(p.untyped_storage().data_ptr() in old for p in new)
    assert all(p.requires_grad for p in new)


def test_the_result_says_what_was_done(converted):
    _, _, result = converted
    assert [(b.name, b.status) for b in result.blocks] == [("blocks.0", "moe"), ("blocks.1", "moe")]
    plan = result.plan["blocks.0"]
    assert (plan.latent_dim, plan.new_num_experts, plan.new_top_k) == (8, 2 * EXPERTS, 2 * TOP_K)
    assert result.healing.model_steps > 0
    for errors in result.errors.values():
        assert 0 < errors.healed_end_to_end < 1
        assert errors.initialised > 0
    assert not any("no calibration" in line for line in result.warnings)


def test_the_rewritten_model_runs_on_other_lengths_and_trains(converted):
    _, _, result = converted
    for rows in (1, 7):
        assert result.model(example(rows)).shape == (rows, 3)
    result.model(example(5)).sum().backward()
    assert all(p.grad is not None for p in result.rewritten["blocks.0"].experts.parameters() if p.numel())
    result.model.zero_grad()


def test_a_converted_model_is_latent_and_there_is_nothing_to_do(converted):
    _, _, result = converted
    again = latentize.convert(result.model, args=(example(),))
    assert [b.status for b in again.blocks] == ["latent", "latent"]
    assert again.model is result.model


def test_experts_that_span_their_width_are_read_by_the_weights_that_are_carried():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), Moe(WIDTH + 4, WIDTH + 1)).eval()
    (block,) = latentize.inspect(model, args=(example(),))
    assert (block.status, block.spec.top_k, block.spec.experts.activation.name) == ("moe", WIDTH + 1, "silu")
    narrow = latentize.convert(model, args=(example(),), recipe=latentize.Recipe(latent_dim=4, variant="fixed"))
    assert [b.status for b in latentize.inspect(narrow.model, args=(example(),))] == ["latent"]


class Counting(nn.Module):
    """Counts what is routed to each expert, by their number in the original."""

    def __init__(self):
        super().__init__()
        self.moe = Whole()

    def forward(self, x):
        out, chosen = self.moe(x)
        return out, F.one_hot(chosen, EXPERTS).sum((0, 1))


class Whole(Moe):
    def forward(self, x):
        return super().forward(x), self.router(x).topk(TOP_K, dim=-1).indices


def test_code_that_counts_the_experts_is_said_to():
    model = Counting().eval()
    assert [b.status for b in latentize.inspect(model, args=(example(),))] == ["moe"]
    recipe = latentize.Recipe(latent_dim=8, variant="acc", heal_steps=0)
    with pytest.raises(LatentizeError, match=r"does not run on its example inputs.*try variant: fixed"):
        latentize.convert(model, args=(example(),), recipe=recipe)
    fixed = latentize.convert(model, args=(example(),), recipe=latentize.Recipe(latent_dim=8, variant="fixed"))
    assert fixed.model(example())[1].shape == (EXPERTS,)


def test_batches_that_are_made_in_one_tensor_are_told_apart():
    wanted = data()

    def refilled():
        buffer = torch.empty(64, WIDTH)
        for (batch,) in wanted:
            yield (buffer.copy_(batch),)

    found = batches_of(refilled(), net())
    assert all(torch.equal(a, b) for (a,), (b,) in zip(found, wanted, strict=True))


def test_what_is_no_recipe_or_no_tuple_is_named():
    with pytest.raises(LatentizeError, match=r"expected a latentize\.Recipe, found a dict"):
        latentize.convert(net(), args=(example(),), recipe={"compression": 2})
    for call in (latentize.convert, latentize.inspect):
        with pytest.raises(LatentizeError, match="args: expected a tuple of arguments, found a Tensor"):
            call(net(), args=example())


class Ungraded(Net):
    @torch.inference_mode()
    def forward(self, x):
        return super().forward(x)


def test_a_model_without_gradients_is_not_healed():
    with torch.inference_mode():
        made = net(1)
    cases = ((Ungraded(1).eval(), "no gradient reaches the blocks"), (made, "under torch.inference_mode"))
    for model, message in cases:
        with pytest.raises(LatentizeError, match=message):
            latentize.convert(model, args=(example(),), calibration=data(), recipe=latentize.Recipe(heal_steps=2))


def test_at_full_width_the_model_computes_the_same():
    model = net()
    recipe = latentize.Recipe(latent_dim=WIDTH, experts_factor=2, topk_factor=2, heal_steps=0)
    result = latentize.convert(model, args=(example(),), recipe=recipe)
    x = example(9, seed=5)
    torch.testing.assert_close(result.model(x), model(x), rtol=2e-5, atol=2e-6)  # fp32 sums in another order


def test_without_calibration_the_weights_decide_and_that_is_said():
    result = latentize.convert(net(1), args=(example(),), recipe=latentize.Recipe(latent_dim=8))
    assert result.healing is None
    assert any("weights alone" in line for line in result.warnings)
    assert any("nothing was healed" in line for line in result.warnings)


def test_positional_and_keyword_inputs_may_be_mixed():
    class Scaled(Net):
        def forward(self, x, *, scale):
            return super().forward(x * scale)

    torch.manual_seed(0)
    model = Scaled(1).eval()
    result = latentize.convert(model, args=(example(),), kwargs={"scale": 0.5}, recipe=latentize.Recipe(latent_dim=8))
    assert result.errors["blocks.0"].initialised > 0
    assert result.model(example(3), scale=2.0).shape == (3, 3)


def test_a_block_on_the_meta_device_is_not_converted():
    model = net(1).to("meta")
    blocks = latentize.inspect(model, args=(example().to("meta"),))
    assert all(block.max_error is None for block in blocks)
    if any(block.status == "moe" for block in blocks):
        with pytest.raises(LatentizeError, match="meta device"):
            latentize.convert(model, args=(example().to("meta"),))


def test_inplace_replaces_the_blocks_in_the_model_itself():
    model = net(1)
    result = latentize.convert(model, args=(example(),), recipe=latentize.Recipe(latent_dim=8), inplace=True)
    assert result.model is model
    assert any(isinstance(module, LatentExperts) for module in model.modules())


def test_patterns_select_blocks_by_name():
    result = latentize.convert(
        net(), args=(example(),), recipe=latentize.Recipe(latent_dim=8, include=("blocks.*",), exclude=("*.1",))
    )
    assert list(result.plan) == ["blocks.0"]
    assert "exclude pattern" in result.left["blocks.1"]
    assert isinstance(result.model.blocks[1], Moe)


def test_nothing_to_rewrite_gives_the_model_back():
    model = nn.Linear(4, 4)
    result = latentize.convert(model, args=(torch.ones(2, 4),))
    assert result.model is model
    assert result.blocks == []
    untouched = net(1)
    assert latentize.convert(untouched, args=(example(),), recipe=latentize.Recipe(include=("x",))).model is untouched


def test_the_same_seed_gives_the_same_weights():
    recipe = latentize.Recipe(latent_dim=8, heal_steps=2)
    first, second = (
        latentize.convert(net(1), args=(example(),), recipe=recipe, calibration=data(2)).model for _ in range(2)
    )
    assert same(state(first), state(second))


def test_the_recipe_dtype_is_that_of_experts_and_projections():
    recipe = latentize.Recipe(latent_dim=8, dtype="bfloat16", heal_steps=0)
    block = latentize.convert(net(1), args=(example(),), recipe=recipe).rewritten["blocks.0"]
    assert block.experts.up.dtype == torch.bfloat16
    assert block.router.weight.dtype == torch.float32
    assert block(example(3)).dtype == torch.float32


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        ([], "holds no batch"),
        (iter(()), "holds no batch"),
        ({"x": example()}, "expected an iterable of batches, found one dict"),
        (example(), "expected an iterable of batches"),
        ([example()], "calibration batch 0: expected a tuple"),
        ([(example(4),), (torch.ones(4, WIDTH + 1),)], "calibration batch 1: the model rejects them"),
        ((1 / 0 for _ in range(1)), "calibration batch 0: producing it failed: ZeroDivisionError"),
    ],
)
def test_calibration_that_does_not_fit_is_one_line(calibration, words):
    with pytest.raises(LatentizeError, match=words):
        latentize.convert(net(1), args=(example(),), recipe=latentize.Recipe(latent_dim=8), calibration=calibration)


def endless():
    seed = 0
    while True:
        yield (example(2048, seed),)
        seed += 1


def test_of_a_generator_that_never_ends_enough_is_taken_and_that_is_said():
    result = latentize.convert(
        net(1), args=(example(),), recipe=latentize.Recipe(latent_dim=8, heal_steps=0), calibration=endless()
    )
    assert "calibration: the first 256 batches, 524,288 tokens, were taken of an iterable that goes on" in "\n".join(
        result.warnings
    )
    taken = batches_of(((example(2048, seed),) for seed in range(300)), net(1), heal_steps=110)
    assert len(taken) == 275  # more steps take more batches


def test_what_ends_or_says_its_length_is_taken_whole():
    ending = batches_of(((example(2048, seed),) for seed in range(256)), net(1), heal_steps=0)
    assert type(ending) is list
    assert len(ending) == 256
    rows = example(2048)
    listed = batches_of([(rows,)] * 300, net(1), heal_steps=0)
    assert len(listed) == 300


class Uncomparable(Net):
    """Its output is a word, and says so before anything long begins."""

    def forward(self, x):
        super().forward(x)
        return "done"


def test_an_output_that_cannot_be_compared_is_named_before_the_work_begins(monkeypatch):
    model = Uncomparable(1).eval()
    recipe = latentize.Recipe(latent_dim=8, heal_steps=0)
    assert latentize.convert(model, args=(example(),), recipe=recipe).rewritten
    monkeypatch.setattr("latentize.api.batches_of", None)  # not reached
    with pytest.raises(LatentizeError, match="the model returns str, in which there is no floating-point tensor"):
        latentize.convert(model, args=(example(),), recipe=latentize.Recipe(latent_dim=8), calibration=data())


def test_a_latent_size_beyond_the_width_names_the_block():
    with pytest.raises(LatentizeError, match=r"blocks\.0: latent size 17"):
        latentize.convert(net(1), args=(example(),), recipe=latentize.Recipe(latent_dim=WIDTH + 1))


def test_non_finite_weights_are_named():
    model = net(1)
    with torch.no_grad():
        model.head.weight[0, 0] = float("nan")
    with pytest.raises(LatentizeError, match=r"block 'head': weight 'weight'"):
        latentize.convert(model, args=(example(),), recipe=latentize.Recipe(latent_dim=8))


def test_of_many_batches_only_some_are_measured(monkeypatch):
    from latentize import conversion

    monkeypatch.setattr(conversion, "MOMENT_TOKENS", 128)
    model = net(1)
    survey = conversion.survey(model, (example(),), {}, latentize.Recipe())
    teacher = conversion.canonical(model, survey.selected)
    found = conversion.measure(teacher, latentize.Recipe(), data(8))["blocks.0"]
    assert isinstance(found, BlockStatistics)
    assert found.tokens == 128
