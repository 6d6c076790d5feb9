"""Forms are compared by their prices: where one overtakes another, and which of them a body should hold."""

from __future__ import annotations

import pytest

from latentize.activations import Activation
from latentize.exporters import onnx_costs
from latentize.exporters.onnx_costs import (
    CHOICE,
    PRICES,
    TOKENS,
    Priced,
    amounts,
    cheapest,
    cost,
    last_tokens,
    ranked,
    taken,
    tokens_in_flight,
)
from latentize.exporters.onnx_forms import NodeConfig
from latentize.exporters.tensorrt_profiles import Profile

FORMS = ("gather", "moe", "dense", "batched", "unrolled")


def make_config(n: int = 32, k: int = 8, latent: int = 64, m: int = 64, *, gated: bool = True) -> NodeConfig:
    return NodeConfig(n, k, latent, m, 1, Activation("silu"), ("gate",) if gated else (), False)


def test_amounts_are_those_of_the_routing() -> None:
    n, k, weights = 32, 8, 3 * 64 * 64
    assert amounts("moe", make_config(), 1) == pytest.approx((1, n, k, k * weights, k, k * weights, k * 64))
    assert amounts("dense", make_config(), 2)[2:] == (n, n * weights, 2 * n, 2 * n * weights, 2 * n * 64)
    assert k < amounts("moe", make_config(), 2)[2] < 2 * k  # some experts are selected twice
    assert amounts("moe", make_config(gated=False), 1)[3] == pytest.approx(k * weights * 2 / 3)
    assert amounts("moe", make_config(n=4, k=8), 1)[2] == 4


@pytest.mark.parametrize(("few", "many"), [("gather", "moe"), ("dense", "batched"), ("moe", "unrolled")])
def test_one_form_overtakes_the_other_past_the_last_tokens(few: str, many: str) -> None:
    config = make_config()
    last = last_tokens(Priced(config), few, many)
    assert last is not None
    assert cost(few, config, last) <= cost(many, config, last)
    assert cost(few, config, last + 1) > cost(many, config, last + 1)


def test_a_form_that_is_never_or_always_cheaper() -> None:
    large = make_config(latent=512, m=512)
    assert cost("gather", large, 1) > cost("moe", large, 1)
    assert last_tokens(Priced(large), "gather", "moe") == 1
    assert last_tokens(Priced(make_config(n=4, k=4, latent=16, m=16)), "dense", "loop") is None


@pytest.mark.parametrize("n, k", [(8, 2), (16, 4), (32, 8), (64, 4), (128, 8)])
@pytest.mark.parametrize("latent, m", [(16, 32), (64, 64), (128, 64), (128, 512), (512, 256)])
def test_what_is_chosen_stays_close_to_the_cheapest(n: int, k: int, latent: int, m: int) -> None:
    config = make_config(n, k, latent, m)
    chosen = cheapest(Priced(config), FORMS)
    assert 1 <= len(chosen) <= 3
    assert len(set(chosen)) == len(chosen)
    for tokens in (1, 4, 16, 64, 256):
        best = min(cost(form, config, tokens) for form in FORMS)
        assert cost(chosen[taken(Priced(config), chosen, tokens)], config, tokens) <= 1.1 * best + CHOICE


def test_a_choice_is_left_out_where_it_costs_more_than_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(n=32, k=4, latent=32, m=32)
    assert "gather" in cheapest(Priced(config), FORMS)
    monkeypatch.setattr(onnx_costs, "CHOICE", 1e6)
    ranked.cache_clear()
    assert len(cheapest(Priced(config), FORMS)) == 1
    ranked.cache_clear()


def test_only_the_forms_that_are_allowed_are_chosen() -> None:
    assert set(cheapest(Priced(make_config()), ("gather", "loop"))) <= {"gather", "loop"}
    narrow = make_config(n=128, k=2, latent=8, m=8)
    assert cost("gather", narrow, 1024) < cost("moe", narrow, 1024)
    assert cheapest(Priced(narrow), ("gather", "moe"))[-1] == "moe"  # copies for every pair would take too much memory
    assert set(PRICES) == {*FORMS, "loop"}


def profiles(*texts: str) -> list[Profile]:
    return [Profile.parse(text) for text in texts]


@pytest.mark.parametrize(
    ("texts", "tokens"),
    [
        ((), TOKENS),
        (("1x1",), (1,)),
        (("1:1:4x1",), (1, 2, 4)),
        (("1x1:3:6",), (1, 2, 3, 4, 6)),
        (("1:2:4x300",), (300, 512, 600, 1024, 1200)),  # batches of 300 tokens
        (("1x1", "8x64"), (1, 512)),  # two uses, and nothing between them
    ],
)
def test_tokens_in_flight_are_the_profiles_whole_batches(texts: tuple[str, ...], tokens: tuple[int, ...]) -> None:
    assert tokens_in_flight(profiles(*texts)) == tokens


@pytest.mark.parametrize("n, k", [(8, 2), (16, 4), (32, 8), (64, 4), (128, 8)])
@pytest.mark.parametrize("latent, m", [(16, 32), (64, 64), (128, 512), (512, 256)])
@pytest.mark.parametrize("use", ["1:1:4x1", "1x256:1024:4096"])
def test_a_profile_gets_what_is_cheapest_at_its_tokens(use: str, n: int, k: int, latent: int, m: int) -> None:
    config, tokens = make_config(n, k, latent, m), tokens_in_flight(profiles(use))
    chosen, usual = cheapest(Priced(config), FORMS, tokens), cheapest(Priced(config), FORMS)
    assert chosen[-1] != "gather"

    def worst(forms: tuple[str, ...]) -> float:
        times = {}
        for count in tokens:
            place = taken(Priced(config), forms, count)
            times[count] = cost(forms[place], config, count) + CHOICE * min(place + 1, len(forms) - 1)
        return max(times[count] / min(cost(form, config, count) for form in FORMS) for count in tokens)

    assert worst(chosen) <= worst(usual) + 0.02 * (len(usual) - len(chosen))  # what a form more must save
    for count in tokens:
        mine = cost(chosen[taken(Priced(config), chosen, count)], config, count)
        assert mine <= 1.1 * min(cost(form, config, count) for form in FORMS) + CHOICE


def test_decoding_and_prefilling_get_bodies_of_their_own() -> None:
    config = make_config(n=64, k=8, latent=128, m=512)
    uses = ("1:1:4x1", "1x256:1024:4096")
    decode, prefill = (cheapest(Priced(config), FORMS, tokens_in_flight(profiles(use))) for use in uses)
    assert (decode, prefill) == (("batched",), ("unrolled",))
    assert cheapest(Priced(config), FORMS) == ("batched", "unrolled")


def test_where_several_do_equally_well_the_usual_tokens_decide() -> None:
    """At one token copies of the weights are best, whatever comes after them."""
    config = make_config(n=64, k=2, latent=64, m=64)
    assert {taken(Priced(config), ("gather", form), 1) for form in ("dense", "moe")} == {0}
    assert cost("moe", config, 64) < cost("dense", config, 64) / 2
    assert cheapest(Priced(config), ("gather", "dense", "moe"), (1,)) == ("gather", "moe")
