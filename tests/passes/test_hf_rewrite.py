"""A rewritten transformers model is still a transformers model."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

import latentize

if importlib.util.find_spec("transformers") is None:
    pytest.skip("transformers is not installed", allow_module_level=True)
import hf

FACTOR = 2


@pytest.fixture(scope="module", params=["eager", "grouped_mm"])
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """A tiny Qwen3-MoE and its conversion to half the width, twice the experts."""
    original: Any = hf.build("qwen3_moe", request.param, router_aux_loss_coef=0.01)
    inputs = hf.inputs(original)
    result = latentize.convert(original, kwargs=inputs, recipe=latentize.Recipe(compression=FACTOR, heal_steps=0))
    return original, result.model


def logits(model: Any, *shape: int) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(**hf.inputs(model, *shape)).logits
    return found


def test_class_and_signature_stay(pair: tuple[Any, Any]) -> None:
    original, converted = pair
    assert type(converted) is type(original)
    assert type(converted(**hf.inputs(converted))) is type(original(**hf.inputs(original)))


def test_config_says_what_the_model_is(pair: tuple[Any, Any]) -> None:
    original, converted = pair
    assert converted.config.num_experts == FACTOR * original.config.num_experts
    assert converted.config.num_experts_per_tok == FACTOR * original.config.num_experts_per_tok
    assert converted.config.latent_dim == original.config.hidden_size // FACTOR


def test_generates(pair: tuple[Any, Any]) -> None:
    _, converted = pair
    tokens = converted.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert tokens.shape == (1, 7)


def test_router_logits_and_auxiliary_loss_are_the_new_routers(pair: tuple[Any, Any]) -> None:
    original, converted = pair
    ids = hf.inputs(converted)["input_ids"]
    output = converted(input_ids=ids, labels=ids, output_router_logits=True)
    experts = FACTOR * original.config.num_experts
    assert [r.shape[-1] for r in output.router_logits] == [experts] * len(output.router_logits)
    assert torch.isfinite(output.aux_loss)
    # perfectly balanced routing gives top_k; nothing gives less than that by much
    assert float(output.aux_loss) > 0.9 * converted.config.num_experts_per_tok


def test_state_dict_round_trip(pair: tuple[Any, Any]) -> None:
    _, converted = pair
    state = {name: t.clone() for name, t in converted.state_dict().items()}
    other = copy.deepcopy(converted)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict(state, strict=True)
    assert torch.equal(logits(other, 1, 5), logits(converted, 1, 5))


def test_trains(pair: tuple[Any, Any]) -> None:
    model = copy.deepcopy(pair[1]).train()
    ids = hf.inputs(model)["input_ids"]
    model(input_ids=ids, labels=ids).loss.backward()
    silent = [
        n for n, p in model.named_parameters() if ".mlp." in n and (p.grad is None or not p.grad.isfinite().all())
    ]
    assert silent == []
    assert all(p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "latent_down" in n or "latent_up" in n)


def test_exports_whole(pair: tuple[Any, Any]) -> None:
    from torch.export import Dim

    _, converted = pair
    inputs = hf.inputs(converted, 2, 12)
    shapes = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}, "use_cache": None}
    with torch.no_grad():
        program = torch.export.export(converted, (), inputs, dynamic_shapes=shapes, strict=False)
        fresh = hf.inputs(converted, 3, 7, 5)
        found = hf.main_output(program.module()(**fresh))
    torch.testing.assert_close(found, logits(converted, 3, 7, 5), rtol=1e-5, atol=1e-5)


def test_original_is_as_it_was(pair: tuple[Any, Any]) -> None:
    original, _ = pair
    fresh = hf.build("qwen3_moe", router_aux_loss_coef=0.01)
    assert original.config.num_experts == fresh.config.num_experts
    for (name, ours), theirs in zip(original.state_dict().items(), fresh.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name


@torch.no_grad()
def test_layers_that_stay_read_the_old_sizes() -> None:
    """Routers of this family ask the configuration for their top-k when they run."""
    original: Any = hf.build("diffusion_gemma_text")
    inputs = hf.inputs(original)
    exact = latentize.Recipe(latent_dim=32, experts_factor=2, topk_factor=2, heal_steps=0, include=["layers.0"])
    converted = latentize.convert(original, kwargs=inputs, recipe=exact).model
    assert converted.config.top_k_experts == 2 * original.config.top_k_experts
    ours, theirs = (hf.main_output(m(**hf.inputs(m, 3, 9, 4))) for m in (converted, original))
    assert float((ours - theirs).norm() / theirs.norm()) <= 1e-5
