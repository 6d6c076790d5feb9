"""Forms are compared by their prices: where one overtakes another, and which of them a body should hold."""

from __future__ import annotations

import pytest

from latentize.activations import Activation
from latentize.exporters import onnx_costs
from latentize.exporters.onnx_costs import CHOICE, PRICES, amounts, cheapest, cost, last_tokens, taken
from latentize.exporters.onnx_forms import NodeConfig

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
    last = last_tokens(config, few, many)
    assert last is not None
    assert cost(few, config, last) <= cost(many, config, last)
    assert cost(few, config, last + 1) > cost(many, config, last + 1)


def test_a_form_that_is_never_or_always_cheaper() -> None:
    large = make_config(latent=512, m=512)
    assert cost("gather", large, 1) > cost("moe", large, 1)
    assert last_tokens(large, "gather", "moe") == 1
    assert last_tokens(make_config(n=4, k=4, latent=16, m=16), "dense", "loop") is None


@pytest.mark.parametrize("n, k", [(8, 2), (16, 4), (32, 8), (64, 4), (128, 8)])
@pytest.mark.parametrize("latent, m", [(16, 32), (64, 64), (128, 64), (128, 512), (512, 256)])
def test_what_is_chosen_stays_close_to_the_cheapest(n: int, k: int, latent: int, m: int) -> None:
    config = make_config(n, k, latent, m)
    chosen = cheapest(config, FORMS)
    assert 1 <= len(chosen) <= 3
    assert len(set(chosen)) == len(chosen)
    for tokens in (1, 4, 16, 64, 256):
        best = min(cost(form, config, tokens) for form in FORMS)
        assert cost(chosen[taken(config, chosen, tokens)], config, tokens) <= 1.1 * best + CHOICE


def test_a_choice_is_left_out_where_it_costs_more_than_it_saves(monkeypatch: pytest.MonkeyPatch) -> None:
    config = make_config(n=32, k=4, latent=32, m=32)
    assert "gather" in cheapest(config, FORMS)
    monkeypatch.setattr(onnx_costs, "CHOICE", 1e6)
    cheapest.cache_clear()
    assert len(cheapest(config, FORMS)) == 1
    cheapest.cache_clear()


def test_only_the_forms_that_are_allowed_are_chosen() -> None:
    assert set(cheapest(make_config(), ("gather", "loop"))) <= {"gather", "loop"}
    narrow = make_config(n=128, k=2, latent=8, m=8)
    assert cost("gather", narrow, 1024) < cost("moe", narrow, 1024)
    assert cheapest(narrow, ("gather", "moe"))[-1] == "moe"  # copies for every pair would take too much memory
    assert set(PRICES) == {*FORMS, "loop"}
