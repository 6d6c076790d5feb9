"""Graphs that are reached with token ids: their blocks are proved on hidden states that no token has."""

from __future__ import annotations

import codings
import codings_near
import pytest
import torch
from codings_base import HIDDEN, TOP_K, Coding
from torch import Tensor, fx, nn

import latentize
from latentize.passes.probes import Prober
from latentize.passes.scan import ModuleCall


class Language(nn.Module):
    """Token ids in, logits out, with one block between."""

    def __init__(self, block: type[Coding]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(50, HIDDEN), nn.LayerNorm(HIDDEN)
        self.block = block()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return (x + self.block(self.norm(x))) @ self.embed.weight.t()


def exported(block: type[Coding], ids: Tensor) -> fx.GraphModule:
    dynamic = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    return torch.export.export(Language(block).eval(), (ids,), dynamic_shapes=dynamic, strict=False).module()


def ids(tokens: int) -> Tensor:
    return torch.randint(0, 50, (2, tokens), generator=torch.Generator().manual_seed(1))


class QuietLogitClamp(codings_near.RareLogitClamp):
    """Logits clamped at twenty, far from those of any token."""

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, index = self.r(x).clamp(-20, 20).softmax(-1).topk(TOP_K, -1)
        return weights / weights.sum(-1, keepdim=True), index


def test_block_behind_token_ids_is_proved_on_hidden_states_of_many_sizes() -> None:
    (block,) = latentize.inspect(exported(codings.MOES["FusedGateUp"], ids(12)), args=(ids(12),))
    assert block.status == "moe"
    names = {probe.name for probe in block.evidence}
    assert {"example inputs loud", "example inputs quiet", "batch of 1 × 1", "batch of 3 × 11"} <= names


def test_what_tokens_do_not_show_is_seen() -> None:
    graph = exported(QuietLogitClamp, ids(12))
    logits = nn.functional.linear(graph.get_parameter("embed.weight"), graph.get_parameter("block.r.weight"))
    assert float(logits.detach().abs().max()) < 20
    (block,) = latentize.inspect(graph, args=(ids(12),))
    assert block.status == "refused"


def test_example_too_short_to_reach_every_expert() -> None:
    (block,) = latentize.inspect(exported(codings.MOES["FusedGateUp"], ids(2)), args=(ids(2),))
    assert (block.status, block.spec.num_experts) == ("moe", codings.EXPERTS)


@pytest.mark.parametrize("shape", [(6, HIDDEN), (2, 6, HIDDEN), (2, HIDDEN, 3, 3)])
def test_probes_are_on_the_device_of_the_hidden_states_whatever_the_default(shape: tuple[int, ...]) -> None:
    prober = Prober(ModuleCall("", nn.Linear(HIDDEN, HIDDEN), (torch.ones(shape),), {}))
    with torch.device("meta"):
        made = [*prober.proofs(0), *prober.extremes(0)]
    assert {tensor.device.type for inputs in made for tensor in inputs.tensors()} == {"cpu"}
