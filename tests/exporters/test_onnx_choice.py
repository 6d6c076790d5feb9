"""What a body holds, as text and in words."""

from __future__ import annotations

import pytest

from latentize.activations import Activation
from latentize.errors import LatentizeError
from latentize.exporters.onnx_bodies import check_form
from latentize.exporters.onnx_choice import FormChoice, limits_of, names_of, spell
from latentize.exporters.onnx_costs import Priced, last_tokens
from latentize.exporters.onnx_forms import NodeConfig


def make_config(n: int = 32, k: int = 8, latent: int = 64, m: int = 64) -> NodeConfig:
    return NodeConfig(n, k, latent, m, 1, Activation("silu"), ("gate",), False)


def test_a_choice_is_said_in_words() -> None:
    config = make_config(latent=512, m=512)
    assert FormChoice.of("b", "moe", config, (1,)).describe() == "moe; chosen for 1 token in flight"
    assert FormChoice.of("b", "moe", config, ()).describe() == "moe; as asked for"
    two = FormChoice.of("b", "gather+moe", config, (1, 2, 4096))
    assert two.limits == (last_tokens(Priced(config), "gather", "moe"),) == (1,)
    assert two.describe() == "gather up to 1 token, then moe; chosen for 1 to 4,096 tokens in flight"
    tiny = make_config(n=4, k=4, latent=16, m=16)
    assert "dense at any number, then loop" in FormChoice.of("b", "dense+loop", tiny, ()).describe()
    timed = FormChoice.of("b", "gather:3+moe", config, (1, 2, 4), "measured")
    assert timed.describe() == (
        "gather up to 3 tokens, then moe; fastest of those timed on the exporting machine for 1 to 4 tokens in flight"
    )


def test_limits_that_are_said_are_taken_and_the_others_follow_from_costs() -> None:
    config = make_config()
    assert names_of("gather:2+dense+batched") == ("gather", "dense", "batched")
    assert limits_of("gather:2+dense+batched", config) == (2, last_tokens(Priced(config), "dense", "batched"))
    assert limits_of("moe", config) == ()
    assert spell(("gather", "dense", "moe"), (1, 40)) == "gather:1+dense:40+moe"
    assert spell(("moe",), ()) == "moe"
    check_form("gather:1+dense:40+moe")
    check_form("gather+dense:40+moe")


@pytest.mark.parametrize(
    "form", ["", "fast", "gather+", "gather+dense+moe+loop", "gather:x+moe", "gather:-1+moe", "a:1", "auto+moe"]
)
def test_text_that_is_no_form_is_refused_with_what_would_be(form: str) -> None:
    with pytest.raises(LatentizeError, match=r"is not known: expected auto, measured, loop.*few:4\+many"):
        check_form(form)


@pytest.mark.parametrize("form", ["gather:0+moe", "moe:4", "gather:4+dense:4+moe", "gather:4+moe:9"])
def test_numbers_of_tokens_that_make_no_sense_are_refused(form: str) -> None:
    with pytest.raises(LatentizeError, match=r"may name a largest number of tokens.*gather:1\+dense:16\+batched"):
        check_form(form)
