"""The closed-form output side: the routed output regressed on the weighted hidden activations of all latent experts.

Notation: T tokens, F features (N experts x m neurons, plus one per expert where outputs have biases), Φ [T, F] the
hidden activations times routing weights, zero where an expert was not selected. Φ is never formed: each expert has its
own rows, which are computed again whenever they are asked for where there are many.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, overload

import torch
from torch import Tensor

from latentize.memory import trim
from latentize.projections import leading, square_root
from latentize.routing import Routing
from latentize.spec import ExpertsSpec, MoESpec

#: Above this many features neither Φ nor ΦᵀΦ is kept, and experts are fitted in turn.
DENSE_FEATURES = 4096

#: Times that they are: one comes within 7 % of the exact fit's error, three within 1 %.
SWEEPS = 3

#: Ridge of the fit relative to the mean square of a feature.
RIDGE = 3e-3

#: Rows that are widened to fp64 at once.
_ROWS_AT_ONCE = 4096

#: Bytes that a fit may take, the fp32 copies of its weights included.
FIT_BYTES = 16 * 2**30


@dataclass(frozen=True)
class Features:
    """Φ by experts: expert e is non-zero on `tokens[e]` [n_e] only, where it has the columns `columns[e]` [n_e, f]."""

    tokens: Sequence[Tensor]
    columns: Sequence[Tensor]
    count: int  # T
    width: int  # f

    @property
    def size(self) -> int:
        """F."""
        return len(self.tokens) * self.width

    @property
    def dense(self) -> bool:
        """Whether ΦᵀΦ may be formed."""
        return self.size <= DENSE_FEATURES

    def times(self, coefficients: Tensor | Sequence[Tensor]) -> Tensor:
        """Φ B: [T, c] from B [N, f, c], or fewer experts' [n, f, c] where expert e has what e mod n has."""
        product = coefficients[0].new_zeros(self.count, coefficients[0].shape[1])
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


def fit_bytes(spec: MoESpec, tokens: int, experts_factor: int = 1) -> int:
    """Bytes that fitting the output side of a block takes, about: weights, latent weights and tokens in fp32."""
    n, m, d = spec.num_experts, spec.intermediate_size, spec.hidden_size
    weights = n * m * d * (3 if spec.gated else 2)
    return 4 * ((1 + experts_factor) * weights + 6 * tokens * d)


def features(spec: MoESpec, hidden: Tensor, routing: Routing, weights: Tensor | None = None) -> Features:
    """Φ of a block on hidden [T, d] under a routing, in the dtype of `hidden`.

    Args:
        spec: the block.
        hidden: [T, d].
        routing: of these tokens.
        weights: [T, 1] that each token's row is multiplied by; None for ones.
    """
    latent = hidden if spec.latent is None else hidden @ spec.latent.down.to(hidden.dtype).T
    experts, on_input = spec.experts, spec.router.applies_to == "input"
    chosen = [selected(routing, expert) for expert in range(spec.num_experts)]

    def columns(expert: int) -> Tensor:
        token, weight = chosen[expert]
        gate, up = preactivations(experts, expert, latent[token] * weight if on_input else latent[token])
        h = experts.activation(gate, up)
        if experts.down_bias is not None:
            h = torch.cat([h, h.new_ones(len(h), 1)], dim=1)
        if not on_input:
            h = h * weight
        return h if weights is None else h * weights[token]

    width = spec.intermediate_size + (experts.down_bias is not None)
    tokens = [token for token, _ in chosen]
    found = Features(tokens, Computed(spec.num_experts, columns), len(hidden), width)
    return replace(found, columns=list(found.columns)) if found.dense else found


@dataclass(frozen=True)
class Computed(Sequence[Tensor]):
    """A tensor for each expert, computed whenever it is asked for."""

    length: int
    compute: Callable[[int], Tensor]

    def __len__(self) -> int:
        return self.length

    @overload
    def __getitem__(self, expert: int) -> Tensor: ...
    @overload
    def __getitem__(self, expert: slice) -> list[Tensor]: ...
    def __getitem__(self, expert: int | slice) -> Tensor | list[Tensor]:
        if isinstance(expert, slice):
            return [self[e] for e in range(*expert.indices(self.length))]
        if not 0 <= expert < self.length:
            raise IndexError(expert)
        trim()
        return self.compute(expert)


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
    return ridge_for(sum(c.double().square().sum().item() for c in phi.columns), phi.size, phi.count)


def ridge_for(squares: float, size: int, count: int) -> float:
    """λ for `size` features of `count` tokens whose squares add up to `squares`."""
    return RIDGE * (1.0 + 10.0 * (size / count) ** 2) * (squares / size) + torch.finfo(torch.float64).tiny


def fit(phi: Features, target: Tensor, start: Tensor | Sequence[Tensor], ridge: float) -> Tensor:
    """B [N, f, c] minimising ‖target − Φ B‖² + λ ‖B − start‖².

    Args:
        phi: the features; those of an expert without tokens are zero, so that its coefficients stay at `start`.
        target: [T, c].
        start: [N, f, c], or [n, f, c] where expert e starts at start[e mod n]; looked at one expert at a time.
        ridge: λ.
    """
    experts = len(phi.tokens)
    if phi.dense:
        change = _change(phi, target, start, ridge)
    else:
        # B - start, in the memory of B at last: [N, c, f], which is how output weights are stored.
        change = target.new_zeros(experts, target.shape[1], phi.width).mT
        left = target - phi.times(start)
        for _ in range(SWEEPS):
            for expert in range(experts):
                further = _own_change(phi, expert, left, change[expert], ridge)
                if further is not None:
                    change[expert] += further
    for expert in range(experts):
        change[expert] += start[expert % len(start)]
    return change


class Explained(NamedTuple):
    """What a fit predicts, Φ B [T, c], and Bᵀ B [c, c] in fp64; B [N, f, c] itself where it was formed."""

    predicted: Tensor
    gram: Tensor
    fitted: Tensor | None


def explained(phi: Features, target: Tensor, start: Tensor | Sequence[Tensor], ridge: float) -> Explained:
    """What the B of `fit` predicts. Where experts are fitted in turn it is the B of one turn, which is not kept."""
    if phi.dense:
        fitted = fit(phi, target, start, ridge)
        return Explained(phi.times(fitted), _gram(fitted.flatten(0, 1)), fitted)
    left, gram = target - phi.times(start), target.new_zeros(target.shape[1], target.shape[1], dtype=torch.float64)
    for expert in range(len(phi.tokens)):
        rows = start[expert % len(start)]
        change = _own_change(phi, expert, left, torch.zeros_like(rows), ridge)
        gram += _gram(rows if change is None else rows + change)
    return Explained(target - left, gram, None)


def _change(phi: Features, target: Tensor, start: Tensor | Sequence[Tensor], ridge: float) -> Tensor:
    """B - start [N, f, c] from the normal equations of all experts."""
    residual = phi.transposed_times(target - phi.times(start))
    normal = phi.gram()
    normal.diagonal().add_(ridge)
    change: Tensor = torch.linalg.solve(normal, residual.flatten(0, 1).double()).view(residual.shape)
    return change.to(target.dtype)


def _own_change(phi: Features, expert: int, left: Tensor, moved: Tensor, ridge: float) -> Tensor | None:
    """The change [f, c] of one expert's coefficients that explains what is `left` [T, c] best, and is taken off it.

    `moved` [f, c] is how far they are from the start. None for an expert without tokens.
    """
    token = phi.tokens[expert]
    if not len(token):
        return None
    column = phi.columns[expert]
    normal = (column.T @ column).double()
    normal.diagonal().add_(ridge)
    gradient = column.T @ left[token] - ridge * moved
    change = torch.cholesky_solve(gradient.double(), torch.linalg.cholesky(normal)).to(left.dtype)
    left.index_add_(0, token, column @ -change)
    return change


def _gram(rows: Tensor) -> Tensor:
    """rowsᵀ rows in fp64."""
    total = rows.new_zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    for part in rows.split(_ROWS_AT_ONCE):
        wide = part.double()
        total += wide.T @ wide
    return total


def coefficients(down: Tensor, down_bias: Tensor | None) -> Tensor:
    """Output weights as regression coefficients [N, f, c] from down [N, c, m] and down_bias [N, c]."""
    rows = down.transpose(1, 2)
    return rows if down_bias is None else torch.cat([rows, down_bias.unsqueeze(1)], dim=1)


def factorise(predicted: Tensor, gram: Tensor, metric: Tensor, rank: int, ridge: float) -> tuple[Tensor, Tensor]:
    """U [d, rank] with orthonormal columns, and V [d, rank] such that B V are the coefficients at that width.

    Together they keep most of the *predictions* Φ B, errors being measured by eᵀ M e: with R = M^½, the rank-l
    truncation of Φ B R keeps W, the leading eigenvectors of R Bᵀ(ΦᵀΦ + λ)B R, hence U = R⁻¹ W and coefficients B R W.

    Args:
        predicted: Φ B [T, d].
        gram: Bᵀ B [d, d] in fp64.
        metric: M [d, d], positive definite.
        rank: l.
        ridge: λ of the fit, so that outputs no token shows still have directions.
    """
    root = square_root(metric.to(predicted.device, torch.float64))
    basis = leading(root @ (_gram(predicted) + ridge * gram) @ root, rank)
    up, mix = torch.linalg.qr(torch.linalg.solve(root, basis))
    return up.to(predicted.dtype), (root @ basis @ mix.T).to(predicted.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert: int) -> Tensor:
    product = x @ weight[expert].to(x.dtype).T
    return product if bias is None else product + bias[expert].to(x.dtype)
