"""`compression: auto` and its budget where a person writes them: what fits together, what does not, in one line."""

from __future__ import annotations

import pytest

from latentize.errors import LatentizeError
from latentize.recipe import Recipe


def auto(**values: object) -> Recipe:
    return Recipe(**{"compression": "auto", "budget": {"bytes": 0.5}, **values})


def test_auto_keeps_the_experts_unless_told_otherwise():
    assert auto().variant == "fixed"
    assert auto(variant="eff").factors_for(64, 16) == (4, 1)
    assert auto().factors_for(64, 16) == (1, 1)
    assert Recipe().variant == "acc"


def test_auto_survives_a_yaml_file_and_a_dump(tmp_path):
    (tmp_path / "r.yaml").write_text("compression: auto\nbudget: {max_loss: 0.02}\n")
    recipe = Recipe.from_yaml(tmp_path / "r.yaml")
    assert recipe.budget is not None
    assert recipe.budget.limit == ("max_loss", 0.02)
    assert Recipe(**recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"budget": None}, "compression: auto needs a budget: one of bytes, flops and max_loss"),
        ({"latent_dim": 8}, "compression: auto and latent_dim both set the experts' width"),
        ({"variant": "acc"}, "compression: auto saves bytes, and variant acc spends them"),
        ({"compression": 2}, "budget is what compression: auto spends"),
        ({"budget": {"max_loss": 0.1}, "init": "weights"}, "budget.max_loss is measured on calibration data"),
        ({"budget": {}}, "budget: give one of bytes, flops and max_loss"),
        ({"budget": {"bytes": 0.5, "flops": 0.5}}, "budget: give one of"),
        ({"budget": {"byte": 0.5}}, "unknown field 'byte' of budget; did you mean 'bytes'"),
        ({"budget": {"bytes": 1.5}}, "budget.bytes = 1.5 is not accepted"),
        ({"compression": "auot"}, 'compression = \'auot\' is not accepted: input should be a number .*, or "auto"'),
    ],
)  # fmt: skip
def test_contradictions_are_refused_in_one_line(values, message):
    with pytest.raises(LatentizeError, match=message) as caught:
        auto(**values)
    assert "\n" not in str(caught.value)


def test_a_bypass_is_a_rank_and_needs_data():
    assert Recipe().bypass == 0
    assert Recipe(bypass=16).bypass == 16
    with pytest.raises(LatentizeError, match="bypass = -1 is not accepted"):
        Recipe(bypass=-1)
    with pytest.raises(LatentizeError, match="bypass is fitted to calibration data, which init: weights does not"):
        Recipe(bypass=16, init="weights")


def test_there_is_no_one_width_to_ask_for():
    with pytest.raises(LatentizeError, match="chosen for each block"):
        auto().latent_dim_for(64)


def test_what_is_refitted_is_not_trained_too():
    with pytest.raises(LatentizeError, match="heal_train: all trains the shared experts too"):
        Recipe(refit_shared=True, heal_train="all")
    assert Recipe(refit_shared=True, heal_train="all", heal_steps=0).refit_shared


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 2\ncompression: 2\nseed: 4\n", "'seed' is given twice, on lines 1 and 3; keep one of them"),
        (
            "compression: auto\nbudget:\n  bytes: 0.5\n  bytes: 0.4\n",
            "'bytes' is given twice, on lines 3 and 4; keep one of them",
        ),
    ],
)
def test_a_field_that_is_given_twice_is_named_with_its_lines(tmp_path, text, words):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(LatentizeError) as caught:
        Recipe.from_yaml(tmp_path / "r.yaml")
    assert str(caught.value) == f"recipe {tmp_path / 'r.yaml'}: {words}"
