"""The expert non-linearities as Triton device functions, in fp32. Imported only where Triton is installed.

They mirror `latentize.activations`: the same names, the same clamps, NaN passes through. Triton's language has neither
tanh nor expm1 nor log1p that the interpreter knows too, so these are built from exp and log without cancellation.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def log1p_exp(z):
    """log(1 + e^z) for z <= 20 or so; log1p by Kahan's correction (Higham 2002, Accuracy and Stability, §1.14.1)."""
    e = tl.exp(z)
    u = 1.0 + e
    rounded = u == 1.0
    return tl.where(rounded, e, tl.log(u) * e / tl.where(rounded, 1.0, u - 1.0))


@triton.jit
def expm1(z):
    """e^z - 1 by the same correction; meant for z <= 0."""
    u = tl.exp(z)
    difference = u - 1.0
    tiny, saturated = u == 1.0, difference == -1.0
    safe = tl.where(tiny | saturated, 2.0, u)
    return tl.where(tiny, z, tl.where(saturated, -1.0, difference * z / tl.log(safe)))


@triton.jit
def tanh(z):
    """tanh by its Taylor series near zero, where the other form cancels, and by e^-2|z| elsewhere."""
    s = z * z
    near = z * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    e = tl.exp(-2.0 * tl.abs(z))
    magnitude = (1.0 - e) / (1.0 + e)
    return tl.where(tl.abs(z) < 0.25, near, tl.where(z < 0, -magnitude, magnitude))


@triton.jit
def load_fp32(at, inside):
    """The values at pointers `at` in fp32, zero where not inside."""
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def clamp(z, LOW: tl.constexpr, HIGH: tl.constexpr):
    """z within [LOW, HIGH]; a bound of None does not clamp, NaN stays NaN."""
    if LOW is not None:
        z = tl.where(z < LOW, LOW, z)
    if HIGH is not None:
        z = tl.where(z > HIGH, HIGH, z)
    return z


@triton.jit
def nonlinearity(z, NAME: tl.constexpr, ALPHA: tl.constexpr):
    """The elementwise function that `latentize.activations.FUNCTIONS` has under NAME; ALPHA is the slope of silu."""
    if NAME == "silu":
        out = z * tl.sigmoid(ALPHA * z)
    elif NAME == "gelu":
        out = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif NAME == "gelu_tanh":
        out = 0.5 * z * (1.0 + tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
    elif NAME == "relu":
        out = clamp(z, 0.0, None)
    elif NAME == "relu_squared":
        out = clamp(z, 0.0, None)
        out = out * out
    elif NAME == "sigmoid":
        out = tl.sigmoid(z)
    elif NAME == "tanh":
        out = tanh(z)
    elif NAME == "leaky_relu":
        out = tl.where(z < 0, 0.01 * z, z)
    elif NAME == "elu":
        out = tl.where(z > 0, z, expm1(clamp(z, None, 0.0)))
    elif NAME == "selu":
        out = 1.0507009873554805 * tl.where(z > 0, z, 1.6732632423543772 * expm1(clamp(z, None, 0.0)))
    elif NAME == "mish":
        e = tl.exp(clamp(z, None, 20.0))
        n = e * (e + 2.0)  # tanh(log(1 + e)) = n / (n + 2)
        out = z * tl.where(z > 20.0, 1.0, n / (n + 2.0))
    elif NAME == "softplus":
        out = tl.where(z > 20.0, z, log1p_exp(clamp(z, None, 20.0)))
    elif NAME == "hardswish":
        out = z * clamp(z + 3.0, 0.0, 6.0) / 6.0
    elif NAME == "relu6":
        out = clamp(z, 0.0, 6.0)
    else:
        tl.static_assert(NAME == "identity")
        out = z
    return out


@triton.jit
def activate(
    gate,
    up,
    GATED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    GATE_MIN: tl.constexpr,
    GATE_MAX: tl.constexpr,
    UP_MIN: tl.constexpr,
    UP_MAX: tl.constexpr,
    UP_OFFSET: tl.constexpr,
):
    """Hidden activations of fp32 pre-activations; `gate` is `up` again when the experts are not gated."""
    out = nonlinearity(clamp(gate, GATE_MIN, GATE_MAX), ACTIVATION, ALPHA)
    if GATED:
        out = out * (clamp(up, UP_MIN, UP_MAX) + UP_OFFSET)
    return out
