"""The verifier rejects a lift that is wrong in any one field, and accepts the right one."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from latentize.activations import Activation
from latentize.passes.probes import Prober
from latentize.passes.scan import ModuleCall
from latentize.passes.shaken import Shaken
from latentize.passes.sites import Argument, Output, Structure, WholeSite
from latentize.passes.verify import Candidate, _agrees, _relative, verify
from latentize.reference import moe_forward
from latentize.spec import ExpertsSpec, Groups, MoESpec, RouterSpec

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 16, 12, 8, 2
SITE = WholeSite("", Argument(position=0), Structure("tensor", (Output("routed", like_hidden=True),)))


class Original(nn.Module):
    """A block with every part a router and an expert can have, computed by the reference."""

    def __init__(self, applies_to: str = "output") -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def drawn(*shape: int, size: float = 0.3) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator) * size)

        self.router = drawn(EXPERTS, HIDDEN)
        self.router_bias, self.tilt = drawn(EXPERTS), drawn(EXPERTS, size=0.1)
        self.each = nn.Parameter(1 + 0.3 * torch.rand(EXPERTS, generator=generator))
        self.gate, self.up = drawn(EXPERTS, INTERMEDIATE, HIDDEN), drawn(EXPERTS, INTERMEDIATE, HIDDEN)
        self.down = drawn(EXPERTS, HIDDEN, INTERMEDIATE)
        self.gate_bias, self.up_bias = drawn(EXPERTS, INTERMEDIATE), drawn(EXPERTS, INTERMEDIATE)
        self.down_bias, self.output_bias = drawn(EXPERTS, HIDDEN), drawn(HIDDEN)
        self.applies_to = applies_to

    def spec(self) -> MoESpec:
        router = RouterSpec(
            self.router, TOP_K, self.router_bias, 3.0, "sigmoid", "score_first", self.tilt, "score",
            Groups(4, 2, "top2", "-inf"), "sum", 0.05, 1.0, 1.7, self.each, self.applies_to,  # type: ignore[arg-type]
        )  # fmt: skip
        experts = ExpertsSpec(
            self.up, self.down, self.gate, self.gate_bias, self.up_bias, self.down_bias,
            Activation("silu", 1.3, None, 0.8, -0.7, 0.7, 1.0),
        )  # fmt: skip
        return MoESpec(router, experts, None, 1.0, self.output_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        return moe_forward(self.spec(), hidden.reshape(-1, HIDDEN)).view(hidden.shape)


def proof(change: Callable[[MoESpec], MoESpec], applies_to: str = "output") -> str:
    """The verifier's reason for refusing the original's spec after `change`; empty when it accepts."""
    module = Original(applies_to).eval()
    hidden = torch.randn(2, 12, HIDDEN, generator=torch.Generator().manual_seed(1))
    candidate = Candidate(module, SITE, lambda of: change(of.spec()), 1.0, (0,))  # type: ignore[operator]
    return verify(candidate, Shaken.of(module), Prober(ModuleCall("", module, (hidden,), {})))[1]


def router(**fields: object) -> Callable[[MoESpec], MoESpec]:
    return lambda spec: replace(spec, router=replace(spec.router, **fields))  # type: ignore[arg-type]


def experts(**fields: object) -> Callable[[MoESpec], MoESpec]:
    return lambda spec: replace(spec, experts=replace(spec.experts, **fields))  # type: ignore[arg-type]


def activation(**fields: object) -> Callable[[MoESpec], MoESpec]:
    return lambda spec: experts(activation=replace(spec.experts.activation, **fields))(spec)  # type: ignore[arg-type]


def turned(part: str, name: str) -> Callable[[MoESpec], MoESpec]:
    """One tensor with its experts in another order."""

    def change(spec: MoESpec) -> MoESpec:
        owner = getattr(spec, part)
        return replace(spec, **{part: replace(owner, **{name: getattr(owner, name).roll(1, 0)})})

    return change


WRONG: dict[str, Callable[[MoESpec], MoESpec]] = {
    "top_k": router(top_k=3),
    "no router bias": router(bias=None),
    "no softcap": router(softcap=None),
    "softmax scores": router(score="softmax"),
    "square root of softplus scores": router(score="sqrt_softplus"),
    "top-k before scores": router(order="topk_first", selection_bias=None),
    "no selection bias": router(selection_bias=None),
    "selection bias on the logits": router(selection_bias_on="logit"),
    "no groups": router(groups=None),
    "one more group kept": router(groups=Groups(4, 3)),
    "groups by their largest score": router(groups=Groups(4, 2, "max")),
    "no normalisation": router(normalize="none"),
    "sum clamped": router(normalize="clamp"),
    "2-norm": router(normalize="norm", p=2.0),
    "eps left out": router(eps=0.0),
    "scale": router(scale=1.6),
    "no per-expert scale": router(per_expert_scale=None),
    "weights on the input": router(applies_to="input"),
    "router rows in another order": turned("router", "weight"),
    "gates in another order": turned("experts", "gate"),
    "ups in another order": turned("experts", "up"),
    "downs in another order": turned("experts", "down"),
    "no gate bias": experts(gate_bias=None),
    "no up bias": experts(up_bias=None),
    "no down bias": experts(down_bias=None),
    "gate and up exchanged": lambda s: experts(gate=s.experts.up, up=s.experts.gate)(s),
    "gelu": activation(name="gelu", alpha=1.0),
    "slope": activation(alpha=1.0),
    "no gate limit": activation(gate_max=None),
    "no up limits": activation(up_min=None, up_max=None),
    "no offset on up": activation(up_offset=0.0),
    "output scale": lambda s: replace(s, output_scale=1.1),
    "no output bias": lambda s: replace(s, output_bias=None),
}


def test_accepts_the_right_spec() -> None:
    assert proof(lambda spec: spec) == ""


def test_accepts_weights_on_the_input() -> None:
    assert proof(lambda spec: spec, "input") == ""


def test_rejects_weights_taken_from_the_input_to_the_output() -> None:
    assert "does not hold" in proof(router(applies_to="output"), "input")


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_rejects_a_spec_wrong_in_one_field(change: Callable[[MoESpec], MoESpec]) -> None:
    reason = proof(change)
    assert "does not hold" in reason
    assert "relative error" in reason


def test_group_fill_shows_when_biased_scores_are_negative() -> None:
    module = Original().eval()
    with torch.no_grad():
        module.tilt -= 3
    hidden = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(1))
    spec = module.spec()
    masked = replace(spec, router=replace(spec.router, groups=Groups(4, 1, "max", "-inf")))
    zeroed = replace(spec, router=replace(spec.router, groups=Groups(4, 1, "max", "zero")))
    assert not torch.allclose(moe_forward(masked, hidden), moe_forward(zeroed, hidden))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_output_that_is_not_finite_is_no_match(value):
    expected = torch.randn(6, 4, dtype=torch.float64)
    ours = expected.clone()
    ours[2, 1] = value
    assert _relative(ours, expected, None, 1.0)[0] == math.inf
    assert not _agrees(torch.full((6, 4), math.nan), expected, None)


def test_integers_beside_the_output_are_compared_where_the_selection_is_clear():
    numbers = torch.tensor([[1, 2], [3, 0], [2, 1]])
    clear = torch.tensor([True, True, False])
    assert _agrees(numbers.flip(1), numbers, clear)
    assert _agrees(torch.tensor([[1, 2], [3, 0], [0, 0]]), numbers, clear)
    assert not _agrees(torch.tensor([[1, 1], [3, 0], [2, 1]]), numbers, clear)
