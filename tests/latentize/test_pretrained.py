"""`save_pretrained` of a converted transformers model writes what opens again, and never random experts."""

import copy
import pickle

import pytest
import torch
from torch import nn

import latentize

transformers = pytest.importorskip("transformers")

IDS = torch.arange(12)[None]


@pytest.fixture(scope="module")
def original():
    config = transformers.OlmoeConfig(
        vocab_size=32, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_experts=4, num_experts_per_tok=2, max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.OlmoeForCausalLM(config).eval()


@pytest.fixture
def converted(original):
    return latentize.convert(original, kwargs={"input_ids": IDS}, recipe=latentize.Recipe(heal_steps=0)).model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def trained(model):
    """The model with some of its tensors moved, in a block and outside."""
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
        next(p for name, p in model.named_parameters() if name.endswith("experts.down")).mul_(1.5)
    return model


def from_transformers(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def test_a_trained_model_opens_again_by_both(converted, tmp_path):
    before = logits(converted)
    model = trained(converted)
    model.save_pretrained(tmp_path / "out")
    assert (logits(model) - before).norm() > 1e-2 * before.norm()
    assert torch.equal(logits(latentize.load(tmp_path / "out")), logits(model))
    assert (logits(from_transformers(tmp_path / "out")) - logits(model)).norm() <= 1e-5 * before.norm()


def test_a_folder_with_other_files_is_saved_into_again_and_again(converted, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("of an earlier save")
    converted.save_pretrained(tmp_path)
    model = trained(latentize.load(tmp_path))
    model.save_pretrained(str(tmp_path), state_dict=model.state_dict(), safe_serialization=True)
    assert torch.equal(logits(latentize.load(tmp_path)), logits(model))
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert [file.name for file in tmp_path.glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_save_themselves(converted, copied, tmp_path):
    before = logits(converted)
    other = trained(copied(converted))
    other.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(latentize.load(tmp_path / "out")), logits(other))
    assert torch.equal(logits(converted), before)


def test_the_original_keeps_its_own(original, converted, tmp_path):
    assert "save_pretrained" not in vars(original)
    original.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.OlmoeForCausalLM.from_pretrained(tmp_path)), logits(original))


def test_only_the_main_process_writes(converted, tmp_path):
    converted.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"push_to_hub": True}, "push_to_hub=True"),
        ({"save_function": print}, "save_function"),
        ({"state_dict": {}}, "is not the model's own tensor"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(converted, options, words, tmp_path):
    with pytest.raises(latentize.LatentizeError, match=words) as caught:
        converted.save_pretrained(tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_parts_of_a_converted_model_are_not_saved_alone(original, converted, tmp_path):
    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, ids):
            return self.inner(input_ids=ids).logits

    wrapped = latentize.convert(Wrapped(original), (IDS,), recipe=latentize.Recipe(heal_steps=0)).model
    for part in (converted.model, wrapped.inner):
        with pytest.raises(latentize.LatentizeError, match="saved with the whole model only"):
            part.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
