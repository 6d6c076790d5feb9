"""What is saved comes back to the bit, for every form of model, and what cannot be saved leaves nothing behind."""

import json
from pathlib import Path

import pytest
import small_moe
import torch
from torch import nn

import latentize
from latentize.artefact import Origin, SavedBlock, write
from latentize.errors import LatentizeError
from latentize.moe import LatentMoE
from latentize.spec import ExpertsSpec, LatentSpec, MoESpec, RouterSpec

transformers = pytest.importorskip("transformers")

MODEL = Path(small_moe.__file__).read_text() + """
def example_inputs():
    return (torch.randn(40, 16, generator=torch.Generator().manual_seed(1)),)
def evaluate(model):
    return {"size": model(*example_inputs()).norm().item()}
"""
RECIPE = latentize.Recipe(latent_dim=8, heal_steps=0)


@pytest.fixture(scope="module")
def module_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "net.py"
    path.write_text(MODEL)
    return path


@pytest.fixture(scope="module")
def from_python(module_file):
    from latentize.sources import open_model

    source = open_model(str(module_file))
    return source, latentize.convert(source.model, args=source.args, recipe=RECIPE)


@pytest.fixture(scope="module")
def from_transformers():
    config = transformers.Qwen3MoeConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        intermediate_size=16, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2, max_position_embeddings=64,
        tie_word_embeddings=True, norm_topk_prob=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(config).eval()
    inputs = {"input_ids": torch.arange(24).view(2, 12), "use_cache": False}
    recipe = RECIPE.model_copy(update={"exclude": ("model.layers.0.*",)})
    return inputs, latentize.convert(model, kwargs=inputs, recipe=recipe)


def test_a_transformers_model_comes_back_from_its_config(from_transformers, tmp_path):
    inputs, result = from_transformers
    result.save(tmp_path / "out")
    loaded = latentize.load(tmp_path / "out")
    assert type(loaded) is type(result.model)
    assert loaded.config.num_experts == result.model.config.num_experts
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, result.model(**inputs).logits)
    assert loaded.lm_head.weight.data_ptr() == loaded.model.embed_tokens.weight.data_ptr()
    assert loaded.generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False).shape == (1, 5)
    assert [b.status for b in latentize.inspect(loaded, kwargs=inputs)] == ["moe", "latent"]


def test_state_dicts_go_round(from_transformers, tmp_path):
    _, result = from_transformers
    result.save(tmp_path / "out")
    loaded = latentize.load(tmp_path / "out")
    assert loaded.state_dict().keys() == result.model.state_dict().keys()
    loaded.load_state_dict(result.model.state_dict())


def test_a_model_py_comes_back_from_its_copy(module_file, from_python, tmp_path):
    source, result = from_python
    result._origin = Origin.of(source.model, source)
    result.save(tmp_path / "out")
    assert (tmp_path / "out" / "net.py").read_text() == MODEL
    x = torch.randn(5, 16)
    assert torch.equal(latentize.load(tmp_path / "out")(x), result.model(x))


def test_another_model_needs_a_fresh_original(module_file, from_python, tmp_path):
    source, result = from_python
    result._origin = Origin.of(source.model)
    result.save(tmp_path / "out")
    with pytest.raises(LatentizeError, match=r"cannot be rebuilt from files; .* model=it"):
        latentize.load(tmp_path / "out")
    from latentize.source_file import open_file

    x = torch.randn(5, 16)
    loaded = latentize.load(tmp_path / "out", model=open_file(module_file).model)
    assert torch.equal(loaded(x), result.model(x))


def test_a_pt2_comes_back_from_its_graph(module_file, tmp_path):
    from latentize.source_file import open_file
    from latentize.sources import open_model

    source = open_file(module_file)
    program = torch.export.export(source.model, source.args, dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False)
    torch.export.save(program, tmp_path / "net.pt2")
    opened = open_model(str(tmp_path / "net.pt2"))
    result = latentize.convert(opened.model, args=opened.args, recipe=RECIPE)
    assert list(result.plan)
    result._origin = Origin.of(opened.model, opened)
    result.save(tmp_path / "out")
    loaded = latentize.load(tmp_path / "out")
    x = torch.randn(9, 16)
    assert torch.equal(loaded(x), result.model(x))
    again = open_model(str(tmp_path / "out"))
    assert torch.equal(again.model(*again.args), result.model(*opened.args))


def test_the_manifest_and_the_model_card_say_what_was_done(from_python, tmp_path):
    _, result = from_python
    result.save(tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "latentize.json").read_text())
    assert manifest["schema_version"] == 1
    assert manifest["recipe"]["latent_dim"] == 8
    assert manifest["blocks"]["moe"]["spec"]["experts"]["up"] == {"shape": [8, 12, 8], "dtype": "float32"}
    assert set(manifest["files"]) == {file.name for file in (tmp_path / "out").iterdir()}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "latent_dim: 8" in card
    assert "| moe | rewritten | 16 → 8 | 4 → 8 | 2 → 4 |" in card


def test_a_result_with_non_finite_tensors_is_not_saved(from_python, tmp_path):
    _, result = from_python
    up = result.rewritten["moe"].experts.up
    kept = up.data.clone()
    up.data[0, 0, 0] = float("nan")
    with pytest.raises(LatentizeError, match="not finite"):
        result.save(tmp_path / "out")
    up.data.copy_(kept)
    assert not list(tmp_path.iterdir())


def tiny_block():
    router = RouterSpec(torch.randn(2, 4), 1)
    experts = ExpertsSpec(torch.randn(2, 3, 2), torch.randn(2, 2, 3))
    return LatentMoE(MoESpec(router, experts, LatentSpec(torch.randn(2, 4), torch.randn(4, 2))))


def test_blocks_that_are_not_in_the_model_and_unknown_blocks_are_refused(tmp_path):
    origin, inside, outside = Origin("module", "Net"), tiny_block(), tiny_block()
    model = nn.Sequential(inside)
    with pytest.raises(LatentizeError, match=r"block '0': router\.weight is missing"):
        write(tmp_path, model, origin, {"0": SavedBlock({}, outside.spec)}, {})
    with pytest.raises(LatentizeError, match="1 latent blocks and only 0 are described"):
        write(tmp_path, model, origin, {}, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: {**m, "schema_version": 99}, "schema version 99"),
        (lambda m: {**m, "format": "other"}, "not a folder that latentize wrote"),
        (lambda m: {k: v for k, v in m.items() if k != "origin"}, "is damaged"),
        (lambda m: {**m, "blocks": {"moe": {"site": {}}}}, "is damaged"),
    ],
)
def test_a_damaged_or_foreign_folder_is_one_line(from_python, tmp_path, change, words):
    _, result = from_python
    result.save(tmp_path / "out")
    file = tmp_path / "out" / "latentize.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(LatentizeError, match=words):
        latentize.load(tmp_path / "out")


def test_a_folder_without_its_weights_is_one_line(from_python, module_file, tmp_path):
    _, result = from_python
    result.save(tmp_path / "out")
    (tmp_path / "out" / "model.safetensors").unlink()
    from latentize.source_file import open_file

    with pytest.raises(LatentizeError, match="missing or was cut short"):
        latentize.load(tmp_path / "out", model=open_file(module_file).model)
