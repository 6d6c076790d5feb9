"""Random experts and blocks of every form: what a test of modules, kernels or graphs holds against the reference."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from latentize.activations import Activation
from latentize.spec import ExpertsSpec, LatentSpec, MoESpec, RouterSpec


def random_experts(
    normal: Callable[..., Tensor], width: int, m: int, n: int,
    *, gated=True, biases=False, activation: Activation | None = None, identity=0,
) -> ExpertsSpec:  # fmt: skip
    """N experts m wide at width `width`, with tensors that `normal` draws by shape."""
    return ExpertsSpec(
        normal(n, m, width),
        normal(n, width, m),
        normal(n, m, width) if gated else None,
        normal(n, m) if gated and biases else None,
        normal(n, m) if biases else None,
        normal(n, width) if biases else None,
        activation or Activation(),
        identity,
    )


def random_block(
    normal: Callable[..., Tensor], d: int, width: int, m: int, n: int, k: int,
    *, latent=True, gated=True, biases=False, identity=0, bypass=0, **routing,
) -> MoESpec:  # fmt: skip
    """N experts m wide at width `width`, or at d where it is not latent, with tensors that `normal` draws by shape.

    `bypass` is the rank of a linear map around them; 0 for none.
    """
    width, rows = width if latent else d, n + identity
    activation = Activation("silu" if gated else "relu_squared")
    experts = random_experts(
        normal, width, m, n, gated=gated, biases=biases, activation=activation, identity=identity
    )
    router = RouterSpec(normal(rows, d), k, bias=normal(rows) if biases else None, **routing)
    around = (normal(bypass, d), normal(d, bypass)) if bypass else (None, None)
    return MoESpec(router, experts, LatentSpec(normal(width, d), normal(d, width), *around) if latent else None)
