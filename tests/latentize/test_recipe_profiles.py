"""What engines take, in a recipe: one number or three, in order, and kept with the converted model."""

import pytest

from latentize import Recipe
from latentize.errors import LatentizeError


def test_one_number_is_all_three_and_the_batch_is_one_by_default():
    (first, second) = Recipe(profiles=[{"tokens": 1}, {"batch": [1, 2, 4], "tokens": [1, 16, 256]}]).profiles
    assert (first.batch, first.tokens) == ((1, 1, 1), (1, 1, 1))
    assert (second.batch, second.tokens) == ((1, 2, 4), (1, 16, 256))


def test_they_survive_what_is_kept_of_a_recipe():
    recipe = Recipe(profiles=[{"tokens": [1, 16, 256]}])
    assert recipe.model_dump(mode="json")["profiles"] == [{"batch": [1, 1, 1], "tokens": [1, 16, 256]}]
    assert Recipe(**recipe.model_dump(mode="json")) == recipe
    assert Recipe().profiles == ()


@pytest.mark.parametrize(
    "profile, words",
    [
        ({"tokens": [16, 1, 256]}, r"profiles\.0\.tokens: 16, 1, 256 is not in order"),
        ({"tokens": 0}, r"0, 0, 0 is not in order"),
        ({"tokens": [1, 2]}, r"profiles\.0\.tokens"),
        ({"batch": 1}, r"profiles\.0\.tokens"),
        ({"tokens": 1, "length": 3}, "length"),
    ],
)
def test_profiles_that_make_no_sense_are_refused_by_field(profile, words):
    with pytest.raises(LatentizeError, match=words):
        Recipe(profiles=[profile])
