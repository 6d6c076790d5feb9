"""Shared experts are refitted where the recipe says so: it helps on tokens unseen, and changes nothing else."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from command_line import call
from shared_moe import data, ids, net

import latentize
from latentize import conversion, refit, report
from latentize.conversion import Start
from latentize.heal import HealPlan
from latentize.passes.hearing import Place
from latentize.passes.shared_expert import Heard, SharedExpert
from latentize.refit import Refit
from latentize.statistics import Sample

RECIPE = latentize.Recipe(latent_dim=4, variant="fixed", heal_steps=0, refit_shared=True)
PLAIN = RECIPE.model_copy(update={"refit_shared": False})


def convert(model, recipe=RECIPE, **options):
    return latentize.convert(model, (ids(),), recipe=recipe, calibration=data(), **options)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed(before, after):
    return {name for name in before.keys() & after.keys() if not torch.equal(before[name], after[name])}


def sum_error(original, converted, seed=99):
    """Relative error of the first layer's sum on tokens that no calibration batch holds."""
    with torch.no_grad():
        x = original.embed(ids(seed, 16, 32))
        wanted, got = original.layers[0](x)[0] - x, converted.layers[0](x)[0] - x
    return float((got - wanted).norm() / wanted.norm())


@pytest.fixture(scope="module")
def pair():
    """A model, and its conversion with refitted shared experts."""
    model = net("gated", bias=True)
    return model, convert(model)


def test_it_is_off_by_default():
    assert latentize.Recipe().refit_shared is False
    assert convert(net(layers=1), PLAIN).refits == {}


def test_named_tensors_are_all_that_changes_and_the_given_model_stays(pair):
    model = net("gated", bias=True)
    before = state(model)
    result = convert(model)
    assert changed(before, model.state_dict()) == set()
    named = {name for made in result.refits.values() for name in made.tensors}
    assert {"layers.0.beside.second.weight", "layers.0.beside.second.bias"} <= named
    assert changed(before, result.model.state_dict()) == named
    assert changed(state(result.model), pair[1].model.state_dict()) == set()  # the same seed, the same output
    new = {tensor.data_ptr() for name, tensor in result.model.state_dict().items() if name in named}
    assert not new & {tensor.data_ptr() for tensor in model.state_dict().values()}


def test_not_a_byte_is_added(pair):
    model, result = pair
    plain = convert(model, PLAIN)
    size = [sum(t.nbytes for t in m.state_dict().values()) for m in (plain.model, result.model)]
    assert size[0] == size[1]


@pytest.mark.parametrize("kind", ["plain", "gated", "scaled"])
def test_the_error_falls_on_unseen_tokens(kind):
    model = net(kind, layers=1)
    plain, refitted = convert(model, PLAIN), convert(model)
    (made,) = refitted.refits.values()
    assert made.kept
    assert made.gated == (kind == "gated")
    assert made.error_after < made.error_before
    before, after = sum_error(model, plain.model), sum_error(model, refitted.model)
    assert after < before
    assert after == pytest.approx(made.error_after, rel=0.1)  # what was said of held-out tokens holds of others
    assert before == pytest.approx(made.error_before, rel=0.1)


def test_what_does_not_help_on_held_out_tokens_is_not_kept():
    """Features without a relation to what is missing, and fewer tokens than they are."""
    draw = torch.Generator().manual_seed(0)
    made = fitted(lambda n: torch.randn(n, 30, generator=draw), lambda phi: torch.randn(len(phi), 8, generator=draw))
    assert not made.kept
    assert made.error_after >= made.error_before
    assert "does not help on held-out tokens" in made.describe()


def test_the_least_squares_solution_is_found():
    draw = torch.Generator().manual_seed(0)
    change = torch.randn(8, 30, generator=draw, dtype=torch.float64)

    def features(_count):
        return torch.randn(2000, 30, generator=draw, dtype=torch.float64)

    made = fitted(features, lambda f: f @ change.T)
    assert made.kept
    assert made.error_after < 0.01 * made.error_before
    torch.testing.assert_close(made.new_weight, change, rtol=0.02, atol=0.02)  # the ridge holds it back a little


def fitted(features, residual):
    """A refit of a zero weight on four batches, the last being held out."""
    expert = SharedExpert("weight", None, "path", "experts", Place("total", "out"), gated=False)
    batches = [features(10) for _ in range(4)]
    count = len(batches[0])
    places = torch.arange(4 * count)
    sample = Sample(torch.zeros(4 * count, 8), None, torch.zeros(4 * count, 1), places[:, None], None, places)
    sums = refit._Sums(expert, sample, torch.ones(4 * count))
    for number, phi in enumerate(batches):
        zero, one = torch.zeros(count, 8).to(phi), torch.ones(count, 1).to(phi)
        sums.add(
            Heard(residual(phi), one, zero, one, phi), Heard(zero, one, zero, one, phi), held_out=number == 3
        )
    return sums.solve(torch.zeros(8, 30).to(batches[0]), None)


def test_later_blocks_read_what_refitted_ones_give(monkeypatch):
    model = net()
    survey = conversion.survey(model, (ids(),), {}, RECIPE)
    read = []
    reread = conversion.reread

    def noted(latent, *rest):
        read.append(latent.state_dict()["layers.0.beside.second.weight"].clone())
        return reread(latent, *rest)

    monkeypatch.setattr(conversion, "reread", noted)
    with conversion.workspace():
        prepared = conversion.prepare(model, survey.selected, RECIPE, data())
        started = conversion.begin(prepared, RECIPE)
    first = next(iter(started.refits.values()))
    assert len(read) == 1
    assert torch.equal(read[0], first.new_weight)
    assert not torch.equal(read[0], model.layers[0].beside.second.weight)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_in_place_in_a_module_that_becomes_a_graph():
    sys.path.insert(0, str(Path(__file__).parents[1] / "passes"))
    import hf

    model = hf.build("llama4_text")
    before = state(model)
    batches = [hf.inputs(model, 8, 32, seed=seed) for seed in range(1, 9)]
    result = latentize.convert(model, kwargs=hf.inputs(model), calibration=batches, recipe=RECIPE, inplace=True)
    kept = [made for made in result.refits.values() if made.kept]
    assert kept
    for made in kept:
        assert torch.equal(model.get_parameter(made.weight), made.new_weight)
    assert changed(before, model.state_dict()) == {made.weight for made in kept}


def test_in_place_the_model_itself_gets_them(pair):
    model = net("gated", bias=True)
    old = model.layers[0].beside.second.weight
    kept = old.clone()
    result = convert(model, inplace=True)
    assert result.model is model
    assert torch.equal(model.layers[0].beside.second.weight, pair[1].model.layers[0].beside.second.weight)
    assert torch.equal(old, kept)  # whoever else holds the tensor


def test_saved_and_loaded_they_give_the_same(pair, tmp_path):
    _, result = pair
    result.save(tmp_path / "out")
    again = latentize.load(tmp_path / "out", model=net("gated", bias=True))
    with torch.no_grad():
        assert torch.equal(again(ids(5))[0], result.model(ids(5))[0])
    assert "layers.0.beside.second.weight" in (tmp_path / "out" / "README.md").read_text()


def test_of_a_graph_that_a_pass_is_given():
    graph = torch.export.export(net(layers=1), (ids(),), strict=False).module()
    before = state(graph)
    found = latentize.convert(graph, (ids(),), recipe=RECIPE, calibration=[(ids(seed),) for seed in range(1, 17)])
    (made,) = found.refits.values()
    assert made.kept
    assert changed(before, found.model.state_dict()) == {"layers.0.beside.second.weight"}
    assert changed(before, graph.state_dict()) == set()


def test_in_half_precision():
    model = net("gated", layers=1).bfloat16()
    (made,) = convert(model).refits.values()
    assert made.kept
    assert made.new_weight.dtype == torch.bfloat16
    assert made.error_after < made.error_before


@pytest.mark.parametrize(
    ("recipe", "calibration", "why"),
    [
        (RECIPE, None, "takes calibration data"),
        (RECIPE.model_copy(update={"init": "weights"}), "data", "init: activation"),
        (RECIPE.model_copy(update={"latent_dim": 16}), "data", "nothing was lost"),
    ],
)
def test_what_stands_against_it_is_said(recipe, calibration, why):
    model = net(layers=1)
    before = state(model)
    result = latentize.convert(model, (ids(),), recipe=recipe, calibration=data() if calibration else None)
    assert any(why in warning for warning in result.warnings)
    assert changed(before, result.model.state_dict()) == set()


def test_without_a_shared_expert_nothing_is_done_and_it_is_said():
    model = net("alone", layers=1)
    before = state(model)
    result = convert(model)
    assert any("no shared expert was found" in warning for warning in result.warnings)
    assert changed(before, result.model.state_dict()) == set()


def test_blocks_are_healed_end_to_end_alone(monkeypatch):
    """The routed output by itself is no goal once its shared expert makes up for some of it."""
    plans = []

    def heal(*_models, steps, **_options):
        plans.append(steps)

    monkeypatch.setattr("latentize.api.heal", heal)
    for recipe in (RECIPE, PLAIN):
        convert(net(layers=1), recipe.model_copy(update={"heal_steps": 40}))
    chosen = HealPlan.chosen(40)
    assert plans[0].block_steps == 0
    assert plans[0].model_steps == chosen.model_steps
    assert plans[1] == chosen


def test_healing_leaves_them_as_they_were_refitted():
    recipe = RECIPE.model_copy(update={"heal_steps": 2})
    result = convert(net(layers=1), recipe)
    (made,) = result.refits.values()
    assert torch.equal(result.model.layers[0].beside.second.weight, made.new_weight)


def test_a_start_is_kept_and_read_back(tmp_path):
    from latentize import store

    made = Refit("w", gated=True, held_out=6, error_before=0.5, error_after=0.25, new_weight=torch.ones(2, 3))
    store.save(Start({}, {"block": made, "other": Refit(reason="none")}), tmp_path / "start")
    again = store.load(Start, tmp_path / "start")
    assert torch.equal(again.refits["block"].new_weight, made.new_weight)
    assert again.refits["block"].describe() == made.describe()
    assert again.refits["block"].gated
    assert again.refits["other"] == Refit(reason="none")


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
def test_transformers_alone_opens_it(tmp_path):
    import transformers

    sys.path.insert(0, str(Path(__file__).parents[1] / "passes"))
    import hf

    model = hf.build("nemotron_h")
    batches = [hf.inputs(model, 8, 16, seed=seed) for seed in range(1, 9)]
    result = latentize.convert(
        model, kwargs=hf.inputs(model), calibration=batches,
        recipe=latentize.Recipe(compression=2, variant="fixed", heal_steps=0, refit_shared=True),
    )  # fmt: skip
    assert all(made.kept for made in result.refits.values())
    result.save(tmp_path / "out")
    here = latentize.load(tmp_path / "out")
    there = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", trust_remote_code=True, attn_implementation="eager"
    )
    with torch.no_grad():
        wanted = result.model(**hf.inputs(model)).logits
        assert torch.equal(here(**hf.inputs(model)).logits, wanted)
        torch.testing.assert_close(there(**hf.inputs(model)).logits, wanted, rtol=1e-5, atol=1e-5)  # other kernels
    for name, new in (item for made in result.refits.values() for item in made.tensors.items()):
        assert torch.equal(there.get_parameter(name), new)
        assert not torch.equal(model.get_parameter(name), new)


MODEL = """
import sys
sys.path.insert(0, {tests!r})
from shared_moe import data, ids, net

def build_model():
    return net(layers=1)

def example_inputs():
    return (ids(),)

def calibration_data():
    return data()
"""


def test_the_command_line_says_it_and_the_report_keeps_it(tmp_path, capsys):
    (tmp_path / "model.py").write_text(MODEL.format(tests=str(Path(__file__).parents[1])))
    given = [str(tmp_path / "model.py"), "-o", str(tmp_path / "out"), "--latent-dim", "4", "--variant", "fixed",
             "--heal", "0", "--refit-shared"]  # fmt: skip
    code, said, _ = call(capsys, *given, "--dry-run")
    assert code == 0
    said = " ".join(said.split())
    assert "would refit layers.0.beside.second.weight where held-out tokens gain, 0 bytes added" in said
    code, said, _ = call(capsys, *given)
    assert code == 0
    said = " ".join(said.split())
    assert "(layers.0.beside.second.weight) refitted: error of routed + shared output" in said
    assert "0 B added" in said
    record = next(block for block in report.read(tmp_path / "out").blocks if block.plan is not None).shared_expert
    assert record.tensors == ("layers.0.beside.second.weight",)
    assert record.error_after < record.error_before
    assert record.bytes_added == 0
    assert json.loads((tmp_path / "out" / "latentize.json").read_text())["recipe"]["refit_shared"] is True
    assert "layers.<wbr>0.<wbr>beside" in (tmp_path / "out" / "report.html").read_text()
