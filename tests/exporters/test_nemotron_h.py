"""A converted NemotronH is a NemotronH again: transformers opens it unmodified, and it computes the same."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open

import latentize
from latentize import cli
from latentize.activations import Activation
from latentize.errors import LatentizeError, ResourceError
from latentize.exporters import nemotron_h
from latentize.inputs import Inputs
from latentize.spec import Groups

transformers = pytest.importorskip("transformers")
SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "layers_block_type": ["moe", "full_attention", "linear_attention", "moe"], "n_routed_experts": 4,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16, "n_group": 2,
    "topk_group": 1, "routed_scaling_factor": 2.5, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2,
    "ssm_state_size": 8, "pad_token_id": 0, "chunk_size": 8,
}  # fmt: skip


def original(**changes):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.NemotronHConfig(**{**SIZES, **changes})).eval()
    for name, tensor in model.named_parameters():
        if name.endswith("gate.weight"):
            tensor.data.mul_(20)  # far from ties
    for name, tensor in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            tensor.data.copy_(torch.randn(tensor.shape) * 0.1)
    return model


@pytest.fixture(scope="module")
def ids():
    return {"input_ids": torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(1))}


@pytest.fixture(scope="module")
def result(ids):
    return latentize.convert(original(), kwargs=ids, recipe=latentize.Recipe(latent_dim=16, heal_steps=0))


@pytest.mark.parametrize("per_expert", [False, True])
def test_transformers_opens_it_unmodified(result, ids, tmp_path, per_expert):
    found = nemotron_h.write(tmp_path / "n", result.model, result.rewritten, Inputs((), ids), per_expert=per_expert)
    assert found.error <= 1e-5 == found.tolerance
    config = json.loads((tmp_path / "n/config.json").read_text())
    assert (config["moe_latent_size"], config["n_routed_experts"], config["num_experts_per_tok"]) == (16, 8, 4)
    assert (config["n_group"], config["topk_group"], config["architectures"]) == (4, 2, ["NemotronHForCausalLM"])
    assert "auto_map" not in config
    with safe_open(tmp_path / "n/model.safetensors", framework="pt") as file:
        names = set(file.keys())
    stem = "backbone.layers.0.mixer" if per_expert else "model.layers.0.mixer"
    assert {f"{stem}.fc1_latent_proj.weight", f"{stem}.fc2_latent_proj.weight"} <= names
    assert (f"{stem}.experts.7.up_proj.weight" in names) == per_expert
    assert (f"{stem}.experts.up_proj" in names) != per_expert

    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "n").eval()
    assert type(again) is transformers.NemotronHForCausalLM
    fresh = torch.randint(61, (1, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted, found = result.model(fresh).logits, again(fresh).logits
    assert (found - wanted).norm() <= 1e-5 * wanted.norm()


def test_blocks_in_half_precision_agree_as_closely_as_that_rounds(ids, tmp_path):
    recipe = latentize.Recipe(latent_dim=16, heal_steps=0, dtype="float16")
    result = latentize.convert(original(), kwargs=ids, recipe=recipe)
    found = nemotron_h.write(tmp_path / "n", result.model, result.rewritten, Inputs((), ids))
    assert 1e-5 < found.error <= found.tolerance == 1e-2


def test_what_was_trained_outside_the_blocks_is_written_too(tmp_path):
    generator = torch.Generator().manual_seed(4)
    data = [{"input_ids": torch.randint(61, (4, 12), generator=generator)} for _ in range(8)]
    recipe = latentize.Recipe(latent_dim=8, variant="fixed", heal_steps=8, heal_train="all")
    model = original()
    trained = latentize.convert(model, kwargs=data[0], recipe=recipe, calibration=data)
    assert trained.healing.outside > 0
    assert nemotron_h.write(tmp_path / "n", trained.model, trained.rewritten, Inputs((), data[0])).error <= 1e-5
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "n").state_dict()
    mine, before = trained.model.state_dict(), model.state_dict()
    outside = [name for name in mine if name in again and name in before and ".mixer.gate." not in name]
    assert all(torch.equal(again[name], mine[name]) for name in outside)
    moved = {name for name in outside if not torch.equal(mine[name], before[name])}
    assert {"model.embeddings.weight", "lm_head.weight", "model.layers.1.mixer.q_proj.weight"} <= moved
    assert {"model.layers.0.mixer.shared_experts.up_proj.weight", "model.layers.2.mixer.A_log"} <= moved


def test_what_the_file_computes_is_checked(result, ids, tmp_path, monkeypatch):
    state = nemotron_h._block_state
    monkeypatch.setattr(nemotron_h, "_block_state", lambda *a: {k: 1.01 * v for k, v in state(*a).items()})
    assert nemotron_h.write(tmp_path / "n", result.model, result.rewritten, Inputs((), ids)).error > 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: replace(s, router=replace(s.router, score="softmax")), "a routing by softmax"),
        (lambda s: replace(s, router=replace(s.router, groups=Groups(2, 1, "max"))), "groups chosen by their max"),
        (lambda s: replace(s, router=replace(s.router, eps=0.1)), "another normalisation"),
        (lambda s: replace(s, router=replace(s.router, applies_to="input")), "weights on the experts' input"),
        (lambda s: replace(s, router=replace(s.router, bias=torch.ones(4))), "biases or scales"),
        (lambda s: replace(s, experts=replace(s.experts, gate=s.experts.up)), "experts with relu_squared GLU"),
        (lambda s: replace(s, experts=replace(s.experts, activation=Activation("relu"))), "experts with relu"),
        (lambda s: replace(s, experts=replace(s.experts, num_identity=1)), "identity experts"),
        (lambda s: replace(s, output_bias=torch.ones(32)), "biases in its experts"),
    ],
)
def test_what_the_architecture_lacks_is_named_before_the_work(result, change, words):
    specs = {block.name: block.spec for block in result.blocks}
    name = next(iter(specs))
    nemotron_h.check(original(), specs, result.plan)
    with pytest.raises(LatentizeError, match=words):
        nemotron_h.check(original(), {**specs, name: change(specs[name])}, result.plan)


def test_one_size_for_all_layers_and_no_banks(result):
    specs = {block.name: block.spec for block in result.blocks}
    first, second = specs
    plans = dict(result.plan)
    with pytest.raises(LatentizeError, match="would have a bypass, which NemotronH cannot express"):
        nemotron_h.check(original(), specs, {**plans, first: replace(plans[first], bypass_rank=2)})
    with pytest.raises(LatentizeError, match="one latent size"):
        nemotron_h.check(original(), specs, {**plans, first: replace(plans[first], latent_dim=8)})
    with pytest.raises(LatentizeError, match="2 layers are MoE and 1 of them"):
        nemotron_h.check(original(), {second: specs[second]}, {second: plans[second]})
    banks = {name: replace(plan, topk_factor=1, new_top_k=2) for name, plan in plans.items()}
    with pytest.raises(LatentizeError, match="banks of experts"):
        nemotron_h.check(original(), specs, banks)


@pytest.mark.parametrize("there", [False, True])
def test_a_full_disk_leaves_no_half_of_it_and_an_earlier_one_whole(result, ids, tmp_path, monkeypatch, there):
    def write():
        nemotron_h.write(tmp_path / "n", result.model, result.rewritten, Inputs((), ids))

    if there:
        write()
    before = {file.name: file.read_bytes() for file in tmp_path.glob("n/*")}

    def full(*_arguments, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)  # config.json is written by then
    with pytest.raises(ResourceError, match="n: the disk is full; nothing was left there") as caught:
        write()
    assert caught.value.exit_code == 5
    assert {file.name: file.read_bytes() for file in tmp_path.glob("n/*")} == before
    assert (tmp_path / "n").exists() == there


def test_the_command_line_writes_it_and_refuses_other_models(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    original().save_pretrained("hybrid")
    for name in ("tokenizer.json", "tokenizer_config.json", "notes.txt"):
        (tmp_path / "hybrid" / name).write_text(f'{{"of": "{name}"}}')
    arguments = ["--latent-dim", "16", "--heal", "0", "--export", "nemotron_h,nemotron_h-hub"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(["hybrid", "-o", "out", *arguments])
    assert not stopped.value.code, capsys.readouterr().err
    assert "checkpoint that NemotronH loads unchanged" in capsys.readouterr().out
    assert (tmp_path / "out/nemotron_h/model.safetensors").exists()
    assert (tmp_path / "out/nemotron_h-hub/model.safetensors").exists()
    for checkpoint in ("nemotron_h", "nemotron_h-hub"):  # what serves it has to tokenise too
        written = {file.name for file in (tmp_path / "out" / checkpoint).iterdir()}
        assert written >= {"tokenizer.json", "tokenizer_config.json", "config.json"}
        assert "notes.txt" not in written
        assert (tmp_path / "out" / checkpoint / "tokenizer.json").read_text() == '{"of": "tokenizer.json"}'
    with pytest.raises(SystemExit) as stopped:
        cli.main(["hybrid", "-o", "out", *arguments, "--dry-run"])  # OUT is still known to be ours
    assert not stopped.value.code, capsys.readouterr().err
    config = transformers.MixtralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained("other")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["other", "-o", "out2", *arguments, "--dry-run"])
    assert stopped.value.code == 2
    assert "not a NemotronH of transformers" in capsys.readouterr().err
