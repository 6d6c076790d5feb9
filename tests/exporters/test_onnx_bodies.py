"""Every body form computes what `latentize::LatentExperts` means, for every activation and layout it accepts."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict

import numpy as np
import pytest
import torch
from random_blocks import random_experts

from latentize.activations import FUNCTIONS, Activation
from latentize.errors import LatentizeError
from latentize.reference import experts_forward
from latentize.routing import Routing
from latentize.spec import ExpertsSpec, MoESpec, RouterSpec

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from latentize.exporters.onnx_bodies import DOMAIN, FORMS, INPUTS, OP_TYPE, build_body  # noqa: E402
from latentize.exporters.onnx_costs import Priced, last_tokens  # noqa: E402
from latentize.exporters.onnx_forms import NodeConfig  # noqa: E402
from latentize.exporters.onnx_fused import MICROSOFT, moe_refusal  # noqa: E402

N, K, L, M = 6, 3, 8, 5
#: Bodies of several take their first branch for one token, their last for many, one in between for a few.
COMPOSED = (*FORMS, "moe:1+unrolled", "gather:1+dense:3+batched", "gather:2+moe:3+batched", "loop:1+unrolled")
TOKENS = (1, 3, 16)
# fp32 on one side, fp64 on the other, sums of at most 24 terms: a few times 1e-7 is expected.
TOLERANCE = 1e-5

CLAMPED = Activation("silu", alpha=1.702, gate_max=0.7, up_min=-0.7, up_max=0.7, up_offset=1.0)


def make_experts(*, gated: bool = True, biases: bool = False, activation: Activation | None = None) -> ExpertsSpec:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.6

    return random_experts(draw, L, M, N, gated=gated, biases=biases, activation=activation)


def make_routing(tokens: int, *, signed: bool = False, missing: bool = False) -> Routing:
    """Distinct experts per token; with `missing`, some indices name no expert and one token has none at all."""
    generator = torch.Generator().manual_seed(tokens)
    order = torch.rand(tokens, N, generator=generator).argsort(-1)[:, :K]
    weights = torch.rand(tokens, K, generator=generator, dtype=torch.float64) + 0.05
    if signed:
        weights[:, 0] *= -1
    if missing:
        order[:, 1] = N
        order[0] = torch.arange(N, N + K)
    return Routing(torch.empty(0), weights, order)


def node_config(
    experts: ExpertsSpec, *, on_input: bool = False, named: bool = False, dtype: int = TensorProto.FLOAT
) -> NodeConfig:
    there = tuple(n for n in ("gate", "gate_bias", "up_bias", "down_bias") if getattr(experts, n) is not None)
    return NodeConfig(N, K, L, M, dtype, experts.activation, there, on_input, named)


def make_model(
    form: str, experts: ExpertsSpec, *, on_input: bool = False, named: bool = False, opset: int = 20
) -> onnx.ModelProto:
    weights = {name: getattr(experts, name) for name in INPUTS[3:]}
    attributes = {name: value for name, value in asdict(experts.activation).items() if value is not None}
    attributes["activation"] = attributes.pop("name")
    node = helper.make_node(
        OP_TYPE, [*INPUTS[:3], *(name if weights[name] is not None else "" for name in INPUTS[3:])], ["combined"],
        domain=DOMAIN, overload="only", weights_on_input=int(on_input), **attributes,
    )  # fmt: skip
    info = helper.make_tensor_value_info
    inputs = [
        info("hidden", TensorProto.FLOAT, ["T", L]),
        info("indices", TensorProto.INT64, ["T", K]),
        info("weights", TensorProto.FLOAT, ["T", K]),
    ]
    stored = [numpy_helper.from_array(t.float().numpy(), n) for n, t in weights.items() if t is not None]
    graph = helper.make_graph([node], "one", inputs, [info("combined", TensorProto.FLOAT, ["T", L])], stored)
    body = build_body(form, node_config(experts, on_input=on_input, named=named), opset, "only")
    imports = [helper.make_opsetid(domain, version) for domain, version in (("", opset), (DOMAIN, 1), (MICROSOFT, 1))]
    return helper.make_model(graph, functions=[body], opset_imports=imports, ir_version=10)


def run_model(model: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> torch.Tensor:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, dict(feeds))[0])


def worst_error(
    form: str, experts: ExpertsSpec, *, on_input: bool = False, named: bool = False, opset: int = 20, **routing: bool
) -> float:
    """Largest relative error against the fp64 reference over `TOKENS`."""
    model = make_model(form, experts, on_input=on_input, named=named, opset=opset)
    router = RouterSpec(torch.empty(N, L), K, applies_to="input" if on_input else "output")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    errors = []
    for tokens in TOKENS:
        chosen = make_routing(tokens, **routing)
        hidden = torch.randn(tokens, L, generator=torch.Generator().manual_seed(tokens), dtype=torch.float64)
        expected = experts_forward(MoESpec(router, experts), hidden, chosen)
        feeds = {"hidden": hidden.float(), "indices": chosen.indices, "weights": chosen.weights.float()}
        actual = torch.from_numpy(session.run(None, {name: t.numpy() for name, t in feeds.items()})[0])
        errors.append(((actual - expected).norm() / expected.norm().clamp_min(1e-12)).item())
    return max(errors)


@pytest.mark.parametrize("form", FORMS)
def test_where_every_index_names_an_expert_nothing_looks_for_others(form: str) -> None:
    experts = make_experts(gated=True, biases=True, activation=Activation("silu"))
    for on_input in [on_input for on_input in (False, True) if accepts(form, experts, on_input=on_input)]:
        assert worst_error(form, experts, on_input=on_input, named=True) < TOLERANCE
        known, unknown = (
            build_body(form, node_config(experts, on_input=on_input, named=named), 20, "only").ByteSize()
            for named in (True, False)
        )
        if form == "dense":  # its OneHot leaves them out at no cost
            assert known == unknown
        else:
            assert known < unknown


def accepts(form: str, experts: ExpertsSpec, *, on_input: bool = False) -> bool:
    return "moe" not in form or not moe_refusal(node_config(experts, on_input=on_input))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gated, biases", itertools.product((True, False), (True, False)))
def test_every_activation_matches_the_reference(form: str, gated: bool, biases: bool) -> None:
    checked = 0
    for name in FUNCTIONS:
        experts = make_experts(gated=gated, biases=biases, activation=Activation(name))
        if accepts(form, experts):
            assert worst_error(form, experts) < TOLERANCE, name
            checked += 1
    assert checked == (len(FUNCTIONS) if "moe" not in form else 1 if gated else 5)


@pytest.mark.parametrize("form", COMPOSED)
@pytest.mark.parametrize("biases", [False, True])
def test_glu_variant_with_clamps_slope_and_offset(form: str, biases: bool) -> None:
    experts = make_experts(biases=biases, activation=CLAMPED)
    assert worst_error(form, experts) < TOLERANCE
    plain = make_experts(biases=biases)
    assert worst_error(form, plain) < TOLERANCE


@pytest.mark.parametrize("form", [form for form in COMPOSED if "moe" not in form])
@pytest.mark.parametrize("name", ["silu", "sigmoid"])  # sigmoid(0) != 0: a weight of zero must not stand for absence
def test_weights_on_the_input(form: str, name: str) -> None:
    for gated, biases in itertools.product((True, False), (True, False)):
        experts = make_experts(gated=gated, biases=biases, activation=Activation(name))
        assert worst_error(form, experts, on_input=True) < TOLERANCE
        assert worst_error(form, experts, on_input=True, named=True) < TOLERANCE
        assert worst_error(form, experts, on_input=True, missing=True) < TOLERANCE


@pytest.mark.parametrize("form", COMPOSED)
@pytest.mark.parametrize("biases", [False, True])
def test_indices_past_the_experts_contribute_nothing(form: str, biases: bool) -> None:
    assert worst_error(form, make_experts(biases=biases), missing=True) < TOLERANCE


@pytest.mark.parametrize("form", [form for form in COMPOSED if form.startswith("gather")])
@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_gathered_forms_take_no_tokens_too(form: str, biases: bool, gated: bool) -> None:
    experts = make_experts(biases=biases, gated=gated)
    for named in (False, True):
        given = {"hidden": (0, L), "indices": (0, K), "weights": (0, K)}
        feeds = {n: np.zeros(s, np.int64 if n == "indices" else np.float32) for n, s in given.items()}
        assert run_model(make_model(form, experts, named=named), feeds).shape == (0, L)


@pytest.mark.parametrize("form", COMPOSED)
def test_negative_weights(form: str) -> None:
    assert worst_error(form, make_experts(), signed=True) < TOLERANCE


@pytest.mark.parametrize("form", COMPOSED)
def test_weights_that_are_all_zero(form: str) -> None:
    experts = make_experts()
    feeds = {"hidden": np.ones((2, L), np.float32), "indices": make_routing(2).indices.numpy()}
    output = run_model(make_model(form, experts), {**feeds, "weights": np.zeros((2, K), np.float32)})
    assert torch.equal(output, torch.zeros(2, L))


@pytest.mark.parametrize("form", COMPOSED)
@pytest.mark.parametrize("biases", [False, True])
def test_bodies_pass_the_full_checker(form: str, biases: bool) -> None:
    model = make_model(form, make_experts(biases=biases))
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    assert inferred.graph.output[0].type.tensor_type.elem_type == TensorProto.FLOAT


@pytest.mark.parametrize("opset", [20, 21, 22, 23])
@pytest.mark.parametrize("form", FORMS)
def test_every_opset(form: str, opset: int) -> None:
    experts = make_experts(biases=True, activation=Activation("silu" if "moe" in form else "gelu"))
    assert worst_error(form, experts, opset=opset) < TOLERANCE


def test_the_fused_form_refuses_what_it_cannot_express() -> None:
    config = node_config(make_experts(activation=Activation("gelu")))
    with pytest.raises(LatentizeError, match="form 'moe' cannot express gelu GLU experts: its GLU is silu, not gelu"):
        build_body("moe", config, 20, "only")
    on_input = node_config(make_experts(), on_input=True)
    assert moe_refusal(on_input) == "it weighs experts' outputs, not their inputs"


def test_unknown_forms_are_refused_by_name() -> None:
    with pytest.raises(LatentizeError, match="form 'fast' is not known: expected auto, measured, loop"):
        build_body("fast", node_config(make_experts()), 20, "only")


def test_the_larger_the_experts_the_earlier_the_unrolled_form_wins() -> None:
    def limit(size: int) -> int | None:
        config = NodeConfig(64, 8, size, size, TensorProto.FLOAT, Activation(), ("gate",), False)
        return last_tokens(Priced(config), "moe", "unrolled")

    assert limit(32) > 8 > limit(512) >= 1


def test_all_experts_are_run_while_few_are_idle() -> None:
    def limit(experts: int, k: int) -> int | None:
        config = NodeConfig(experts, k, 64, 64, TensorProto.FLOAT, Activation(), ("gate",), False)
        return last_tokens(Priced(config), "dense", "batched")

    assert limit(8, 5) is None  # hardly any is idle
    assert limit(32, 8) > limit(128, 8) > limit(128, 2) > 0
