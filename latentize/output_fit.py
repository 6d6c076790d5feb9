"""The closed-form output side: the routed output regressed on the weighted hidden activations of all latent experts.

Notation: T tokens, F features (N experts x m neurons, plus one per expert where outputs have biases), Φ [T, F] the
hidden activations times routing weights, zero where an expert was not selected. Φ is never formed: each expert keeps
its own rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentize.projections import leading
from latentize.routing import Routing
from latentize.spec import MoESpec

#: Above this many features ΦᵀΦ is not formed and the fit is iterative.
DENSE_FEATURES = 16384


@dataclass(frozen=True)
class Features:
    """Φ by experts: expert e is non-zero on `tokens[e]` [n_e] only, where it has the columns `columns[e]` [n_e, f]."""

    tokens: list[Tensor]
    columns: list[Tensor]
    count: int  # T

    @property
    def width(self) -> int:
        """Features f of one expert."""
        return self.columns[0].shape[1]

    def times(self, coefficients: Tensor) -> Tensor:
        """Φ B: [T, c] from B [N, f, c]."""
        product = coefficients.new_zeros(self.count, coefficients.shape[2])
        for expert, (token, column) in enumerate(zip(self.tokens, self.columns, strict=True)):
            product.index_add_(0, token, column @ coefficients[expert])
        return product

    def transposed_times(self, values: Tensor) -> Tensor:
        """Φᵀ Y: [N, f, c] from Y [T, c]."""
        return torch.stack([c.T @ values[t] for t, c in zip(self.tokens, self.columns, strict=True)])

    def gram(self) -> Tensor:
        """Φᵀ Φ: [F, F] in fp64, from the tokens that two experts share."""
        experts, width = len(self.tokens), self.width
        total = self.columns[0].new_zeros(experts * width, experts * width, dtype=torch.float64)
        row = torch.full((self.count,), -1, dtype=torch.long, device=total.device)
        for i in range(experts):
            row[self.tokens[i]] = torch.arange(len(self.tokens[i]), device=total.device)
            for j in range(i + 1):
                at = row[self.tokens[j]]
                both = (at >= 0).nonzero().flatten()
                block = self.columns[i][at[both]].T @ self.columns[j][both]
                total[i * width : (i + 1) * width, j * width : (j + 1) * width] = block
                total[j * width : (j + 1) * width, i * width : (i + 1) * width] = block.T
            row[self.tokens[i]] = -1
        return total


def features(spec: MoESpec, hidden: Tensor, routing: Routing) -> Features:
    """Φ of a latent block on hidden [T, d] under a routing, in the dtype of `hidden`."""
    experts = spec.experts
    assert spec.latent is not None
    latent = hidden @ spec.latent.down.to(hidden.dtype).T
    on_input = spec.router.applies_to == "input"
    tokens, columns = [], []
    for expert in range(spec.num_experts):
        token, slot = (routing.indices == expert).nonzero(as_tuple=True)
        weight = routing.weights[token, slot, None].to(hidden.dtype)
        x = latent[token] * weight if on_input else latent[token]
        up = _linear(x, experts.up, experts.up_bias, expert)
        gate = None if experts.gate is None else _linear(x, experts.gate, experts.gate_bias, expert)
        h = experts.activation(gate, up)
        if experts.down_bias is not None:
            h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
        tokens.append(token)
        columns.append(h if on_input else h * weight)
    return Features(tokens, columns, len(hidden))


def fit(phi: Features, target: Tensor, start: Tensor, ridge: float) -> Tensor:
    """B [N, f, d] minimising ‖target − Φ B‖² + λ ‖B − start‖², λ = ridge x the mean square of Φ's columns.

    Args:
        phi: the features; those of an expert without tokens are zero, so that its coefficients stay at `start`.
        target: [T, d].
        start: [N, f, d].
    """
    residual = phi.transposed_times(target - phi.times(start))
    experts, width, d = start.shape
    if experts * width > DENSE_FEATURES:
        return start + _conjugate_gradient(phi, residual, ridge)
    normal = phi.gram()
    diagonal = normal.diagonal()
    diagonal += ridge * diagonal.mean() + torch.finfo(torch.float64).tiny
    change = torch.linalg.solve(normal, residual.reshape(-1, d).double())
    fitted: Tensor = start + change.view(experts, width, d).to(start.dtype)
    return fitted


def _conjugate_gradient(phi: Features, residual: Tensor, ridge: float, steps: int = 30) -> Tensor:
    """(ΦᵀΦ + λ)⁻¹ residual for many features: conjugate gradients, preconditioned by each expert's own block."""
    blocks = torch.stack([c.T @ c for c in phi.columns]).double()
    damping = ridge * blocks.diagonal(dim1=1, dim2=2).mean() + torch.finfo(torch.float64).tiny
    blocks.diagonal(dim1=1, dim2=2).add_(damping)
    factors = torch.linalg.cholesky(blocks).to(residual.dtype)
    solution = torch.zeros_like(residual)
    step = preconditioned = torch.cholesky_solve(residual, factors)
    power = (residual * preconditioned).sum((0, 1))
    first = power.clone()
    for _ in range(steps):
        product = phi.transposed_times(phi.times(step)) + damping.to(step.dtype) * step
        length = power / (step * product).sum((0, 1)).clamp_min(1e-30)
        solution = solution + length * step
        residual = residual - length * product
        preconditioned = torch.cholesky_solve(residual, factors)
        following = (residual * preconditioned).sum((0, 1))
        if (following <= 1e-8 * first).all():
            break
        step = preconditioned + following / power.clamp_min(1e-30) * step
        power = following
    return solution


def coefficients(down: Tensor, down_bias: Tensor | None) -> Tensor:
    """Output weights as regression coefficients [N, f, c] from down [N, c, m] and down_bias [N, c]."""
    rows = down.transpose(1, 2)
    return rows if down_bias is None else torch.cat([rows, down_bias.unsqueeze(1)], dim=1)


def factorise(phi: Features, fitted: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """U [d, rank] and the coefficients [N, f, rank] at that width, keeping most of the *predictions* Φ B."""
    predicted = phi.times(fitted).double()
    up = leading(predicted.T @ predicted, rank).to(fitted.dtype)
    return up, fitted @ up


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    product = x @ weight[expert].to(x.dtype).T
    return product if bias is None else product + bias[expert].to(x.dtype)
