"""The closed-form output side: the routed output regressed on the weighted hidden activations of all latent experts.

Notation: T tokens, F features (N experts x m neurons, plus one per expert where outputs have biases), Φ [T, F] the
hidden activations times routing weights, zero where an expert was not selected. Φ is never formed: each expert keeps
its own rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentize.projections import leading, square_root
from latentize.routing import Routing
from latentize.spec import ExpertsSpec, MoESpec

#: Above this many features ΦᵀΦ is not formed and experts are fitted in turn.
DENSE_FEATURES = 16384

#: Times that they are: one comes within 7 % of the exact fit's error, three within 1 %.
SWEEPS = 3

#: Ridge of the fit relative to the mean square of a feature.
RIDGE = 3e-3


#: Bytes that a fit may take, the fp32 copies of its weights included.
FIT_BYTES = 16 * 2**30


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

    def scaled(self, weights: Tensor) -> Features:
        """diag(weights) Φ, in place; weights [T, 1]."""
        for token, column in zip(self.tokens, self.columns, strict=True):
            column *= weights[token]
        return self

    def times(self, coefficients: Tensor) -> Tensor:
        """Φ B: [T, c] from B [N, f, c], or fewer experts' [n, f, c] where expert e has what e mod n has."""
        product = coefficients.new_zeros(self.count, coefficients.shape[2])
        for expert, (token, column) in enumerate(zip(self.tokens, self.columns, strict=True)):
            product.index_add_(0, token, column @ coefficients[expert % len(coefficients)])
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


def fit_bytes(spec: MoESpec, tokens: int, experts_factor: int = 1, topk_factor: int = 1) -> int:
    """Bytes that fitting the output side of a block takes, about: weights, features and coefficients in fp32."""
    n, m, d = spec.num_experts, spec.intermediate_size, spec.hidden_size
    weights = n * m * d * (3 if spec.gated else 2)
    held = (1 + experts_factor) * weights + 3 * experts_factor * n * m * d + tokens * topk_factor * spec.top_k * m
    return 4 * held


def features(spec: MoESpec, hidden: Tensor, routing: Routing) -> Features:
    """Φ of a block on hidden [T, d] under a routing, in the dtype of `hidden`."""
    tokens, columns = [], []
    latent = hidden if spec.latent is None else hidden @ spec.latent.down.to(hidden.dtype).T
    on_input = spec.router.applies_to == "input"
    for expert in range(spec.num_experts):
        token, weight = selected(routing, expert)
        gate, up = preactivations(spec.experts, expert, latent[token] * weight if on_input else latent[token])
        h = spec.experts.activation(gate, up)
        if spec.experts.down_bias is not None:
            h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
        tokens.append(token)
        columns.append(h if on_input else h * weight)
    return Features(tokens, columns, len(hidden))


def selected(routing: Routing, expert: int) -> tuple[Tensor, Tensor]:
    """Tokens [n] that selected an expert and their routing weights [n, 1]."""
    token, slot = (routing.indices == expert).nonzero(as_tuple=True)
    return token, routing.weights[token, slot].unsqueeze(1)


def preactivations(experts: ExpertsSpec, expert: int, x: Tensor) -> tuple[Tensor | None, Tensor]:
    """Gate (None when ungated) and up pre-activations [n, m] of one expert on x [n, l]."""
    gate = None if experts.gate is None else _linear(x, experts.gate, experts.gate_bias, expert)
    return gate, _linear(x, experts.up, experts.up_bias, expert)


def damping(phi: Features) -> float:
    """λ of the ridge: small beside the mean square of Φ's columns, unless features outnumber tokens."""
    size = len(phi.columns) * phi.width
    mean = sum(c.double().square().sum().item() for c in phi.columns) / size
    return RIDGE * (1.0 + 10.0 * (size / phi.count) ** 2) * mean + torch.finfo(torch.float64).tiny


def fit(phi: Features, target: Tensor, start: Tensor, ridge: float) -> Tensor:
    """B [N, f, d] minimising ‖target − Φ B‖² + λ ‖B − start‖².

    Args:
        phi: the features; those of an expert without tokens are zero, so that its coefficients stay at `start`.
        target: [T, d].
        start: [N, f, d], or [n, f, d] where expert e starts at start[e mod n].
        ridge: λ.
    """
    experts, (width, d) = len(phi.columns), start.shape[1:]
    if experts * width > DENSE_FEATURES:
        return _expert_by_expert(phi, target, start, ridge)
    residual = phi.transposed_times(target - phi.times(start))
    normal = phi.gram()
    normal.diagonal().add_(ridge)
    change = torch.linalg.solve(normal, residual.reshape(-1, d).double())
    fitted = start.repeat(experts // len(start), 1, 1)
    fitted += change.view(experts, width, d).to(start.dtype)
    return fitted


def _expert_by_expert(phi: Features, target: Tensor, start: Tensor, ridge: float) -> Tensor:
    """`fit` for many features: each expert in turn explains what the others leave, `SWEEPS` times over all.

    Beside B it holds one expert's own f x f system and what is left of the target [T, d].
    """
    fitted, left = start.repeat(len(phi.columns) // len(start), 1, 1), target - phi.times(start)
    for _ in range(SWEEPS):
        for expert, (token, column) in enumerate(zip(phi.tokens, phi.columns, strict=True)):
            if not len(token):
                continue
            normal = (column.T @ column).double()
            normal.diagonal().add_(ridge)
            gradient = column.T @ left[token] - ridge * (fitted[expert] - start[expert % len(start)])
            change = torch.cholesky_solve(gradient.double(), torch.linalg.cholesky(normal)).to(fitted.dtype)
            fitted[expert] += change
            left.index_add_(0, token, column @ -change)
    return fitted


def coefficients(down: Tensor, down_bias: Tensor | None) -> Tensor:
    """Output weights as regression coefficients [N, f, c] from down [N, c, m] and down_bias [N, c]."""
    rows = down.transpose(1, 2)
    return rows if down_bias is None else torch.cat([rows, down_bias.unsqueeze(1)], dim=1)


def factorise(phi: Features, fitted: Tensor, metric: Tensor, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
    """U [d, rank] with orthonormal columns, and V [d, rank] such that B V are the coefficients at that width.

    Together they keep most of the *predictions* Φ B, errors being measured by eᵀ M e: with R = M^½, the rank-l
    truncation of Φ B R keeps W, the leading eigenvectors of R Bᵀ(ΦᵀΦ + λ)B R, hence U = R⁻¹ W and coefficients B R W.

    Args:
        phi: the features.
        fitted: B [N, f, d].
        metric: M [d, d], positive definite.
        rank: l.
        ridge: λ of the fit, so that outputs no token shows still have directions.
    """
    root = square_root(metric.to(fitted.device, torch.float64))
    predicted, gram = phi.times(fitted).double(), torch.zeros_like(root)
    for rows in fitted:
        gram += rows.double().T @ rows.double()
    basis = leading(root @ (predicted.T @ predicted + ridge * gram) @ root, rank)
    up, mix = torch.linalg.qr(torch.linalg.solve(root, basis))
    return up.to(fitted.dtype), (root @ basis @ mix.T).to(fitted.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    product = x @ weight[expert].to(x.dtype).T
    return product if bias is None else product + bias[expert].to(x.dtype)
