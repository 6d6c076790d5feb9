"""Which body a node gets: by what it computes, by its size, and by what the whole graph can afford."""

from __future__ import annotations

import pytest

from latentize.activations import Activation
from latentize.exporters.onnx_experts import choose_form
from latentize.exporters.onnx_forms import NodeConfig

FLOAT, DOUBLE = 1, 11  # onnx.TensorProto element types


def make_config(
    *, n: int = 64, k: int = 8, latent: int = 128, m: int = 512, activation: str = "silu", dtype: int = FLOAT,
    on_input: bool = False,
) -> NodeConfig:  # fmt: skip
    return NodeConfig(n, k, latent, m, dtype, Activation(activation), ("gate",), on_input)


@pytest.mark.parametrize(
    ("config", "form"),
    [
        (make_config(), "batched+unrolled"),
        (make_config(latent=64, m=64, n=32), "gather+dense+batched"),
        (make_config(latent=32, m=32, n=8, k=4), "dense"),
        (make_config(latent=64, m=64, k=4), "gather+moe+batched"),
        (make_config(activation="gelu", latent=64, m=64, k=4), "gather+batched"),
        (make_config(dtype=DOUBLE, latent=64, m=64, k=4), "gather+batched"),
        (make_config(on_input=True, latent=64, m=64, k=4), "gather+batched"),
    ],
)
def test_form_follows_size_and_what_the_fused_operator_can_express(config: NodeConfig, form: str) -> None:
    assert choose_form(config, [config]) == form


def test_form_follows_the_tokens_that_the_graph_is_for() -> None:
    config = make_config(activation="gelu", latent=64, m=64, n=32)
    assert choose_form(config, [config], (1, 2, 4)) == "gather+dense"
    assert choose_form(config, [config], (256, 1024, 4096)) == "unrolled"
    assert choose_form(config, [config] * 48, (256, 1024, 4096)) == "loop"  # too many experts for nodes of their own


def test_graphs_with_very_many_experts_have_no_node_per_expert() -> None:
    fused, other = make_config(n=128), make_config(n=128, activation="gelu")
    assert choose_form(fused, [fused] * 48) == "moe"
    assert choose_form(other, [other] * 48) == "loop"
    small = make_config(n=128, latent=32, m=32, k=4)
    assert choose_form(small, [small] * 48) == "gather+moe"


def test_graphs_with_very_large_weights_do_not_copy_them() -> None:
    large = make_config(latent=2048, m=4096)
    assert large.weight_bytes > 1 << 30
    assert choose_form(large, [large]) == "moe"
    small = make_config(latent=32, m=32, n=32)
    assert "dense" in choose_form(small, [small])
    assert "dense" not in choose_form(small, [small, large])
