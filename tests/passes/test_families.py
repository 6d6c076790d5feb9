"""The MoE families of transformers, tiny: lifted exactly in every coding they offer, or refused for a stated reason."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import contract
import pytest
from torch import Tensor, nn

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)
import hf

#: Families of the ordinary suite, with the number of blocks in their tiny model.
FEW = {"mixtral": 2, "qwen3_moe": 2, "olmoe": 2, "gpt_oss": 2, "deepseek_v3": 1, "gemma4_text": 2, "llama4_text": 2}
#: Families whose experts come in one coding.
ONE_CODING = {"dbrx", "llama4_text", "doge", "longcat_flash", "jetmoe", "switch_transformers", "nllb-moe"}


def run(model: nn.Module, inputs: contract.Inputs) -> Tensor:
    return hf.main_output(model(*inputs[0], **inputs[1]))


def example(model: nn.Module, *shape: int) -> tuple[tuple[()], dict[str, Any]]:
    return (), hf.inputs(model, *shape)


def lift(family: str, implementation: str | None, blocks: int) -> None:
    make = functools.partial(hf.build, family, implementation)
    model = make()
    fresh = [example(model, 1, 5, 3), example(model, 3, 9, 4), example(model, 1, 1, 5)]
    contract.assert_lifted(make, example(model), fresh, run, blocks)


@pytest.mark.parametrize("family", FEW)
def test_family_is_lifted(family: str) -> None:
    lift(family, None, FEW[family])


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
@pytest.mark.parametrize("family", [f for f in FEW if f not in ONE_CODING])
def test_family_is_lifted_in_every_coding(family: str, implementation: str) -> None:
    lift(family, implementation, FEW[family])


@pytest.mark.parametrize("family", [pytest.param("doge", marks=pytest.mark.slow), "phimoe", "nllb-moe"])
def test_family_is_refused(family: str) -> None:
    make = functools.partial(hf.build, family)
    model = make()
    contract.assert_refused(make, example(model), [example(model, 3, 9, 4)], run)


#: What a person must find in the reason, by family.
REASONS = {
    "switch_transformers": "capacity", "zaya": "more than one projection", "inkling_text": "logits",
    "inkling2_text": "they use sigmoid, tanh",
}  # fmt: skip


@pytest.mark.parametrize("family", REASONS)
def test_refusal_names_what_is_not_standard(family: str) -> None:
    blocks = contract.inspect(functools.partial(hf.build, family), example(hf.build(family)))
    assert blocks
    assert all(b.status == "refused" and REASONS[family] in b.reason for b in blocks)


@pytest.mark.parametrize("family", ["nemotron_h", "muse_spark_text"])
def test_latent_family_is_reported_as_latent(family: str) -> None:
    make = functools.partial(hf.build, family, **{"nemotron_h": {"moe_latent_size": 16}}.get(family, {}))
    assert [b.status for b in contract.inspect(make, example(make()))] == ["latent"]
