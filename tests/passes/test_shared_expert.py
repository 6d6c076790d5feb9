"""Shared experts are found by what flows where, and whatever only looks like one is not."""

import importlib.util

import pytest
import torch
from shared_moe import Clamped, D, Routed, Shared, ids, net
from torch import nn

from latentize import conversion
from latentize.passes.find_shared import find_shared
from latentize.passes.listening import listening, without_gradients
from latentize.passes.shared_expert import SharedExpert, hear
from latentize.recipe import Recipe


def found_in(model, args, kwargs=None, batches=None):
    survey = conversion.survey(model, args, kwargs or {}, Recipe())
    assert survey.selected, [item.block.reason for item in survey.found]
    canonical = conversion.canonical(model, survey.selected)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with conversion.workspace():
        found = find_shared(model, canonical.model, canonical.blocks, batches or [kwargs or args])
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return found, canonical


@pytest.mark.parametrize(
    ("kind", "gated", "bias"),
    [("plain", False, False), ("plain", False, True), ("gated", True, False), ("scaled", False, False),
     ("in place", False, True)],
)  # fmt: skip
def test_a_shared_expert_is_found(kind, gated, bias):
    found, _ = found_in(net(kind, bias=bias), (ids(),))
    assert [type(expert) for expert in found.values()] == [SharedExpert] * 2
    for number, expert in enumerate(found.values()):
        assert expert.weight == f"layers.{number}.beside.second.weight"
        assert expert.bias == (f"layers.{number}.beside.second.bias" if bias else None)
        assert expert.gated == gated


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("alone", "no linear layer that reads what its experts read is added"),
        ("used elsewhere", "is added to its output and taken off the routed output changes the model's outputs"),
        ("weight read elsewhere", "depend on its weights in another way than through its output"),
        ("feeds the experts", ""),
        ("normed", "no linear layer"),
        ("gates itself", "no linear layer"),
        ("product", "no linear layer"),
        ("reads other tokens", "what it reads at one token depends on other tokens"),
        ("reads something else", "no linear layer that reads what its experts read"),
        ("twice", "runs 2 times in one pass"),
    ],
)
def test_a_look_alike_is_not(kind, reason):
    found, _ = found_in(net(kind, layers=1), (ids(),))
    (why,) = found.values()
    assert isinstance(why, str)
    assert why.startswith("no shared expert was found (")
    assert reason in why


def test_one_that_is_used_elsewhere_does_not_spoil_the_others():
    model = net()
    model.layers[1].kind = "used elsewhere"
    first, second = found_in(model, (ids(),))[0].values()
    assert isinstance(first, SharedExpert)
    assert "so it is used elsewhere too" in second


def test_weights_that_two_layers_read_are_refused():
    found, _ = found_in(net(tied=True), (ids(),))
    assert all("other layers read its weights too" in why for why in found.values())


def test_weights_that_lie_in_the_memory_of_others_are_refused():
    model = net()
    store = torch.randn(D, 2 * model.layers[0].beside.second.weight.shape[1])
    model.layers[0].beside.second.weight = nn.Parameter(store[:, : store.shape[1] // 2])
    model.register_buffer("store", store)
    first, second = found_in(model, (ids(),))[0].values()
    assert "other layers read its weights too" in first
    assert isinstance(second, SharedExpert)


def test_a_layer_that_is_not_linear_after_all_is_refused():
    found, _ = found_in(net(last=Clamped), (ids(),))
    assert all(isinstance(why, str) for why in found.values())


def test_what_is_heard_adds_up_to_what_the_model_adds():
    model = net("gated", layers=1)
    found, canonical = found_in(model, (ids(),))
    (heard,) = hear(without_gradients(listening(canonical.model)), found, (ids(3),)).values()
    layer = model.layers[0]
    with torch.no_grad():
        x = model.embed(ids(3))
        wanted = (layer(x)[0] - x).reshape(-1, D)
        gate = torch.sigmoid(layer.gate(layer.norm(x))).reshape(-1, 1)
    torch.testing.assert_close(heard.total.float(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(heard.shared_scale.float(), gate, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(heard.routed_scale, torch.ones_like(heard.routed_scale))


def test_in_a_graph_of_the_whole_model():
    model = net(layers=1)
    graph = torch.export.export(model, (ids(),), strict=False).module()
    names = dict(graph.named_parameters())
    found, _ = found_in(graph, (ids(),))
    assert [expert.weight for expert in found.values()] == [f"layers.{i}.beside.second.weight" for i in range(1)]
    assert all(expert.weight in names for expert in found.values())


def test_weights_that_a_graph_reads_twice_are_refused():
    graph = torch.export.export(net("weight read elsewhere", layers=1), (ids(),), strict=False).module()
    (why,) = found_in(graph, (ids(),))[0].values()
    assert "depend on its weights in another way than through its output" in why


def test_of_blocks_without_anything_between_them():
    class Stack(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two, self.beside = Routed(), Routed(), Shared()

        def forward(self, x):
            h = self.one(x)
            return self.two(h) + self.beside(h)

    found, _ = found_in(Stack().eval(), (torch.randn(2, 24, D),))
    assert "no linear layer" in found["one"]
    assert found["two"].weight == "beside.second.weight"


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.parametrize(
    ("family", "ending", "gated"),
    [
        ("qwen2_moe", "shared_expert.down_proj.weight", True),
        ("deepseek_v3", "shared_experts.down_proj.weight", False),
        ("glm4_moe", "shared_experts.down_proj.weight", False),
        ("llama4_text", "shared_expert.down_proj.weight", False),
        ("granitemoeshared", "shared_mlp.output_linear.weight", False),
        ("nemotron_h", "shared_experts.down_proj.weight", False),
        ("qwen3_moe", "", False),
    ],
)
def test_families_of_transformers(family, ending, gated):
    import hf

    model = hf.build(family)
    found, _ = found_in(model, (), hf.inputs(model))
    assert found
    for name, expert in found.items():
        if not ending:
            assert "no linear layer" in expert
        else:
            assert isinstance(expert, SharedExpert), expert
            assert expert.weight.endswith(ending)
            assert expert.weight.split(".")[2] == name.split(".")[2]  # of the same layer
            assert expert.gated == gated
