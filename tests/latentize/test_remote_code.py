"""A converted transformers model comes back by `from_pretrained(..., trust_remote_code=True)`, without latentize."""

import ast
import subprocess
import sys

import pytest
import torch

import latentize
from latentize import remote_code

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "num_experts_per_tok": 2, "pad_token_id": 0,
}  # fmt: skip
FAMILIES = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
    "olmoe": {"num_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8},
    "nemotron_h": {
        "layers_block_type": ["moe", "full_attention"], "n_routed_experts": 4, "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16, "n_group": 2, "topk_group": 1, "head_dim": 8,
    },
}  # fmt: skip


def converted(family, dtype=torch.float32, **recipe):
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype).eval()
    for name, tensor in model.named_parameters():
        if "gate" in name or "router" in name:
            tensor.data.mul_(20)  # far from ties
    ids = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(1))
    kwargs, wanted = {"input_ids": ids}, latentize.Recipe(heal_steps=0, **recipe)
    return latentize.convert(model, kwargs=kwargs, recipe=wanted, calibration=[kwargs] if wanted.bypass else None), ids


@pytest.mark.parametrize(("family", "bypass"), [*((family, 0) for family in FAMILIES), ("olmoe", 4)])
def test_families_come_back_in_their_auto_class(family, bypass, tmp_path):
    result, ids = converted(family, compression=2, bypass=bypass)
    assert result.rewritten
    assert all((block.experts.bypass_up is not None) == bool(bypass) for block in result.rewritten.values())
    result.save(tmp_path / "out")
    card = (tmp_path / "out/README.md").read_text()
    assert 'AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)' in card
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval()
    assert type(again).__name__ == f"Latent{type(result.model).__name__}"
    assert not type(again).__module__.startswith("latentize")
    mine, its = result.model.state_dict(), again.state_dict()
    assert mine.keys() == its.keys()
    assert all(torch.equal(its[name], tensor) for name, tensor in mine.items())
    with torch.no_grad():
        wanted, found = result.model.double()(ids).logits, again.double()(ids).logits
    assert (found - wanted).norm() <= 1e-12 * wanted.norm()
    assert isinstance(latentize.load(tmp_path / "out"), type(result.model))


def test_a_router_kept_in_fp32_stays_so_in_a_bf16_model(tmp_path):
    result, _ = converted("qwen3_moe", torch.bfloat16, compression=2, variant="eff")
    result.save(tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    for name, tensor in result.model.state_dict().items():
        assert again.state_dict()[name].dtype == tensor.dtype, name
    assert {tensor.dtype for tensor in again.state_dict().values()} == {torch.float32, torch.bfloat16}


def test_it_generates_where_latentize_is_not_installed(tmp_path):
    result, ids = converted("qwen3_moe", compression=2)
    result.save(tmp_path / "out")
    code = f"""
import sys
sys.modules["latentize"] = None
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path / "out")!r}, trust_remote_code=True)
ids = torch.tensor({ids.tolist()})
print(model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, -6:].tolist())
"""
    made = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    wanted = result.model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)[:, -6:]
    assert made.stdout.strip().splitlines()[-1] == str(wanted.tolist())


@pytest.mark.parametrize(
    ("site", "class_name", "reason"),
    [
        ({"kind": "graph"}, "Qwen3MoeForCausalLM", "block 'b' was rewritten as a graph"),
        ({"kind": "parts", "router": {"prefix": ["x", "2"]}}, "Qwen3MoeForCausalLM", "transforms its input first"),
        ({"kind": "whole"}, "MyModel", "no Auto class of transformers knows MyModel"),
    ],
)
def test_what_transformers_cannot_rebuild_is_said_with_its_reason(site, class_name, reason):
    model = torch.nn.Module()
    model.config = transformers.Qwen3MoeConfig()
    found = remote_code.support(model, class_name, {"b": {"site": site}})
    assert not found.auto
    assert reason in found.reason


def test_a_model_with_blocks_left_alone_says_that_transformers_alone_cannot_open_it(tmp_path):
    result, _ = converted("qwen3_moe", latent_dim=16, exclude=["model.layers.0.*"])
    result.save(tmp_path / "out")
    assert not (tmp_path / "out" / remote_code.FILE).exists()
    assert "with the new configuration model.layers.0.mlp" in (tmp_path / "out/README.md").read_text()
    assert len(latentize.load(tmp_path / "out").state_dict()) == len(result.model.state_dict())


def test_the_file_defines_every_name_once_and_imports_nothing_of_ours():
    tree = ast.parse(remote_code.source("Qwen3MoeForCausalLM"))
    names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(names) == len(set(names))
    modules = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert not any(module.startswith("latentize") for module in modules)


def test_what_was_trained_outside_the_blocks_comes_back_too(tmp_path):
    config = transformers.AutoConfig.for_model(
        "qwen3_moe", **{**SIZES, **FAMILIES["qwen3_moe"], "tie_word_embeddings": True}
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, tensor in model.named_parameters():
        if "experts" in name:
            tensor.data.mul_(8)  # so that there is something to learn
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator = torch.Generator().manual_seed(1)
    data = [{"input_ids": torch.randint(61, (8, 16), generator=generator)} for _ in range(12)]
    recipe = latentize.Recipe(compression=4, variant="fixed", init="weights", heal_steps=12, heal_train="all")
    result = latentize.convert(model, kwargs=data[0], recipe=recipe, calibration=data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert result.healing.outside > 0
    result.save(tmp_path / "out")
    mine = result.model.state_dict()
    assert not torch.equal(mine["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    opened = [
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True).eval(),
        latentize.load(tmp_path / "out"),
    ]
    for again in (result.model, *opened):
        assert again.lm_head.weight.data_ptr() == again.model.embed_tokens.weight.data_ptr()
        its = again.state_dict()
        assert mine.keys() == its.keys()
        assert all(torch.equal(its[name], tensor) for name, tensor in mine.items())
    with torch.no_grad():
        assert torch.equal(opened[1](**data[0]).logits, result.model(**data[0]).logits)
        wanted, found = result.model.double()(**data[0]).logits, opened[0].double()(**data[0]).logits
    assert (found - wanted).norm() <= 1e-12 * wanted.norm()
