"""The shared projections from second moments: d x d Gram matrices and eigh, one expert in memory at a time.

Notation: d hidden size, l latent size, C the uncentred second moment of what the experts read, G the stacked gate and
up rows of all experts. P [l, d] maps down, U [d, l] maps up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentize.spec import ExpertsSpec

#: Least weight of an output direction relative to the mean one.
METRIC_FLOOR = 1e-2


def shrink(moment: Tensor, tokens: int) -> Tensor:
    """`moment` [d, d] pulled towards a multiple of the identity, the more the fewer tokens it was measured on.

    The weight is the oracle-approximating one of Chen, Wiesel, Eldar and Hero, "Shrinkage algorithms for MMSE
    covariance estimation", IEEE Trans. Signal Processing 58 (2010); at least 1e-6, so that nothing is singular.
    """
    d = len(moment)
    trace, square = moment.trace(), moment.square().sum()
    spread = square - trace.square() / d
    weight = ((1 - 2 / d) * square + trace.square()) / ((tokens + 1 - 2 / d) * spread).clamp_min(1e-300)
    weight = weight.nan_to_num(nan=1.0).clamp(1e-6, 1.0)
    identity = torch.eye(d, dtype=moment.dtype, device=moment.device)
    if not trace > 0:
        return identity
    shrunk: Tensor = (1 - weight) * moment + weight * (trace / d) * identity
    return shrunk


def gram(experts: ExpertsSpec, gate_loads: Tensor, up_loads: Tensor) -> Tensor:
    """Σ_e gate_eᵀ diag(gate_loads_e) gate_e + up_eᵀ diag(up_loads_e) up_e, [d, d] in fp64; loads [N] or [N, m].

    One expert at a time: its own products are in fp32, or in fp64 where its weights are.
    """
    d = experts.up.shape[-1]
    total = torch.zeros(d, d, dtype=torch.float64, device=experts.up.device)
    for expert in range(experts.up.shape[0]):
        for weights, loads in ((experts.gate, gate_loads), (experts.up, up_loads)):
            if weights is not None:
                rows = _precise(weights[expert])
                total += rows.T @ (rows * loads[expert].to(rows.dtype).reshape(-1, 1))
    return total


def output_gram(experts: ExpertsSpec, loads: Tensor) -> Tensor:
    """Σ_e loads_e down_e down_eᵀ, [d, d] in fp64, summed as in `gram`; loads [N]."""
    d = experts.down.shape[1]
    total = torch.zeros(d, d, dtype=torch.float64, device=experts.down.device)
    for expert in range(experts.down.shape[0]):
        columns = _precise(experts.down[expert])
        total += loads[expert].double() * (columns @ columns.T)
    return total


def _precise(weights: Tensor) -> Tensor:
    """In at least fp32."""
    return weights.to(torch.promote_types(weights.dtype, torch.float32))


def spectrum(expert_gram: Tensor, moment: Tensor) -> Tensor:
    """Singular values [d] of G C^½, descending."""
    root = square_root(moment)
    values: Tensor = torch.linalg.eigvalsh(root @ expert_gram @ root).flip(0).clamp_min(0).sqrt()
    return values


def square_root(moment: Tensor) -> Tensor:
    """Symmetric square root of a positive semidefinite [d, d]."""
    values, vectors = torch.linalg.eigh(moment)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root


def leading(moment: Tensor, rank: int) -> Tensor:
    """The `rank` leading eigenvectors of a symmetric [d, d], as orthonormal columns [d, rank]."""
    vectors: Tensor = torch.linalg.eigh(moment)[1].flip(1)[:, :rank].contiguous()
    return vectors


def input_projection(expert_gram: Tensor, moment: Tensor, rank: int) -> Tensor:
    """P [rank, d] with orthonormal rows whose span keeps most of G C^½.

    The rank-l truncation G C^½ = W S Vᵀ is reached by z = V_lᵀ C^-½ x; only the span of its rows matters.
    """
    root = square_root(moment)
    directions = leading(root @ expert_gram @ root, rank)
    basis: Tensor = torch.linalg.qr(torch.linalg.solve(root, directions))[0]
    return basis.T.contiguous()


def reconstruction(projection: Tensor, moment: Tensor) -> Tensor:
    """R [d, l] = C Pᵀ (P C Pᵀ)⁻¹: R P x is the best linear guess of x, and G R the best weights on P x."""
    cross = moment @ projection.T
    guess: Tensor = torch.linalg.solve(projection @ cross, cross.T).T
    return guess


def metric(sensitivity: Tensor | None, d: int) -> Tensor:
    """Symmetric positive definite [d, d] that output errors are measured in, of mean eigenvalue about one.

    The floor keeps an up-projection well conditioned and off directions that only the calibration data ignores.
    """
    identity = torch.eye(d, dtype=torch.float64)
    if sensitivity is None:
        return identity
    scaled: Tensor = sensitivity * (d / sensitivity.trace())
    return scaled + METRIC_FLOOR * identity.to(scaled.device)
