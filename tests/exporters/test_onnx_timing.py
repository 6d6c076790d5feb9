"""The fastest form on a machine: what is timed, and what follows from the times."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
import torch

from latentize.activations import Activation
from latentize.exporters import onnx_timing
from latentize.exporters.onnx_choice import limits_of, names_of
from latentize.exporters.onnx_costs import TOKENS, Priced, cheapest, cost
from latentize.exporters.onnx_forms import NodeConfig
from latentize.exporters.onnx_timing import Timed, fastest, interleaved, measurable

FORMS = ("gather", "moe", "dense", "batched", "unrolled")
CONFIG = NodeConfig(16, 4, 64, 64, 1, Activation("silu"), ("gate",), False, True)

Measured = dict[int, dict[str, float]]


def at_prices(config: NodeConfig, wanted: Mapping[int, Sequence[str]], _copies: int = 1, **times: float) -> Measured:
    """Milliseconds of a machine on which forms cost their prices, times a factor; a choice costs nothing there."""

    def ms(form: str, tokens: int) -> float:
        names, limits = names_of(form), limits_of(form, config)
        place = next((i for i, limit in enumerate(limits) if limit is not None and tokens <= limit), len(limits))
        return cost(names[place], config, tokens) * times.get(names[place], 1.0) / 1e6

    return {tokens: {form: ms(form, tokens) for form in forms} for tokens, forms in wanted.items()}


def test_times_are_kept_where_they_were_taken_and_follow_the_prices_elsewhere() -> None:
    timed = Timed.of(CONFIG, {4: {"moe": 1.0, "dense": 2.0}, 64: {"moe": 9.0}})
    assert timed.forms == ("moe", "dense")
    assert timed("moe", 4) == pytest.approx(1e6)
    assert timed("moe", 64) == pytest.approx(9e6)
    twice = cost("dense", CONFIG, 4) / 2e6
    assert timed("dense", 1000) == pytest.approx(cost("dense", CONFIG, 1000) / twice)
    low, high = (cost("moe", CONFIG, t) / timed("moe", t) for t in (4, 64))
    assert cost("moe", CONFIG, 16) / timed("moe", 16) == pytest.approx(math.sqrt(low * high))  # halfway in logarithms


@pytest.mark.parametrize("tokens", [TOKENS, (1,), (1, 2, 4), (256, 512)])
def test_at_the_usual_prices_the_usual_forms_are_fastest(
    tokens: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_timing, "measure", at_prices)
    form = fastest(CONFIG, FORMS, tokens)
    usual = cheapest(Priced(CONFIG), FORMS, tokens)
    for count in tokens:
        best = min(cost(name, CONFIG, count) for name in FORMS)
        mine, theirs = (at_prices(CONFIG, {count: [f]})[count][f] * 1e6 for f in (form, "+".join(usual)))
        assert mine <= 1.05 * max(theirs, best)


@pytest.mark.parametrize("slow", ["gather", "dense", "batched"])
def test_a_form_that_is_slow_on_this_machine_is_not_taken(slow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert slow in cheapest(Priced(CONFIG), FORMS)
    monkeypatch.setattr(onnx_timing, "measure", lambda c, wanted, _copies: at_prices(c, wanted, **{slow: 4.0}))
    form = fastest(CONFIG, FORMS)
    assert slow not in names_of(form)
    assert names_of(form)[-1] != "gather"


def test_limits_are_those_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_timing, "measure", at_prices)
    usual = fastest(CONFIG, ("dense", "batched"))
    monkeypatch.setattr(onnx_timing, "measure", lambda c, wanted, _copies: at_prices(c, wanted, dense=0.8))
    quick = fastest(CONFIG, ("dense", "batched"))
    assert names_of(usual) == names_of(quick) == ("dense", "batched")
    (few,), (more,) = limits_of(usual, CONFIG), limits_of(quick, CONFIG)
    assert few is not None
    assert more is not None
    assert 0 < few < more


def test_bodies_of_several_forms_are_timed_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a choice turns out to cost much, there is none."""

    def dear(config: NodeConfig, wanted: Mapping[int, Sequence[str]], _copies: int) -> Measured:
        found = at_prices(config, wanted)
        return {t: {f: ms * 10 ** f.count("+") for f, ms in times.items()} for t, times in found.items()}

    monkeypatch.setattr(onnx_timing, "measure", at_prices)
    assert "+" in fastest(CONFIG, FORMS)
    monkeypatch.setattr(onnx_timing, "measure", dear)
    assert "+" not in fastest(CONFIG, FORMS)


def test_forms_that_cannot_be_the_fastest_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Mapping[int, Sequence[str]]] = []
    built: list[int] = []

    def watched(config: NodeConfig, wanted: Mapping[int, Sequence[str]], copies: int) -> Measured:
        asked.append(wanted)
        built.append(copies)
        return at_prices(config, wanted)

    monkeypatch.setattr(onnx_timing, "measure", watched)
    fastest(CONFIG, FORMS)
    assert list(asked[0]) == [1, 4, 16, 64, 256, 1024]
    assert "gather" in asked[0][1]
    assert not any("gather" in forms for tokens, forms in asked[0].items() if tokens >= 64)
    assert set(built) == {1}
    for config, count, copies in ((CONFIG, 4, 4), (CONFIG, 48, 8), (replace(CONFIG, num_experts=128), 48, 2)):
        built.clear()
        fastest(config, FORMS, (1,), count)  # as many as the model has, until their weights fill the caches
        assert set(built) == {copies}


def test_where_copies_alone_are_promising_there_is_a_form_for_many_tokens_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_timing, "measure", at_prices)
    many = NodeConfig(1024, 8, 16, 16, 1, Activation("silu"), ("gate",), False, True)
    assert cost("gather", many, 1) * 3 < min(cost(form, many, 1) for form in FORMS if form != "gather")
    for forms in (FORMS, ("gather", "moe")):
        form = fastest(many, forms, (1,))
        assert names_of(form)[0] == "gather"
        assert names_of(form)[-1] != "gather"


def test_very_large_experts_are_left_to_the_prices(caplog: pytest.LogCaptureFixture) -> None:
    large = replace(CONFIG, latent_dim=2048, intermediate_size=4096)
    assert measurable(CONFIG)
    assert not measurable(large)
    assert not measurable(NodeConfig(64, 2, 1024, 1024, 11, Activation("relu"), (), False))  # 2 GiB in float64
    assert fastest(large, ("gather", "moe")) == "moe"
    assert "are not built to be timed: prices decide" in caplog.text


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_fastest_here(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Really built and run; which form it is depends on the machine."""
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnx_timing, "SECONDS", 0.01)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        form = fastest(CONFIG, FORMS, (1, 64))
    finally:
        torch.set_num_threads(before)
    assert set(names_of(form)) <= set(FORMS)
    assert all(limit is not None and limit >= 1 for limit in limits_of(form, CONFIG))
    found = onnx_timing.measure(CONFIG, {1: [form, "loop"], 64: [form, "gather"]})
    assert found[1][form] < found[1]["loop"]
    assert found[64][form] < found[64]["gather"]


@pytest.mark.parametrize("dtype", [1, 10, 11, 16])
def test_nodes_of_every_element_type_can_be_timed(dtype: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnx_timing, "SECONDS", 0.001)
    inputs = ("gate", "gate_bias", "up_bias", "down_bias")
    config = NodeConfig(8, 2, 16, 12, dtype, Activation("silu"), inputs, False, True)
    forms = ["gather:1+dense:4+batched", "unrolled", "loop", "dense", "gather", *(["moe"] if dtype != 11 else [])]
    found = onnx_timing.measure(config, {1: forms, 9: forms})
    assert all(0 < ms < 1000 for times in found.values() for ms in times.values())
    assert {len(times) for times in found.values()} == {len(forms)}


def test_every_call_is_timed_in_turn_and_the_first_of_several_in_a_row_is_not_counted() -> None:
    now, calls = 0.0, []

    def call(name: str, ms: float) -> None:
        nonlocal now
        repeated = calls[-1:] == [name]
        calls.append(name)
        now += ms / 1e3 * (1 if repeated else 100)

    timed = interleaved(
        {"a": lambda: call("a", 1.0), "b": lambda: call("b", 3.0)}, 0.01, lambda: now, in_a_row=4
    )  # fmt: skip
    assert timed == pytest.approx({"a": 1.0, "b": 3.0})
    assert abs(calls.count("a") - calls.count("b")) == 0
