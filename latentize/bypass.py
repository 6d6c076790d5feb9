"""The linear bypass: what the routed experts lost in the latent width, as far as a map of low rank can give it back.

Notation: T tokens, d hidden size, r rank. X [T, d] are what the experts read, E [T, d] what their output lacks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentize.output_fit import factorise, ridge_for

#: Tokens that are widened to fp64 at once.
_ROWS_AT_ONCE = 4096


def fit_bypass(hidden: Tensor, missing: Tensor, weights: Tensor, metric: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The down-projection [r, d] and up-projection [d, r] of the best linear map of rank r from X to E.

    Their product minimises Σ_t weights_t² eᵀ M e + λ ‖R C‖² over all maps C of rank r, where e is what is left of E
    and R = M^½: the full map by ridge regression, then truncated by what keeps most of its predictions
    (`output_fit.factorise`), which is exact for a problem of this form. The up-projection's columns are orthonormal.

    Args:
        hidden: X [T, d].
        missing: E [T, d].
        weights: [T, 1] of the tokens' residuals.
        metric: M [d, d], positive definite.
        rank: r, below d.
    """
    d = hidden.shape[1]
    normal, right = hidden.new_zeros(2, d, d, dtype=torch.float64)
    for x, e, w in zip(*(t.split(_ROWS_AT_ONCE) for t in (hidden, missing, weights)), strict=True):
        rows = (x * w).double()
        normal += rows.T @ rows
        right += rows.T @ (e * w).double()
    ridge = ridge_for(normal.trace().item(), d, len(hidden))
    normal.diagonal().add_(ridge)
    full = torch.linalg.solve(normal, right)  # [d, d], maps rows
    predicted = (hidden * weights) @ full.to(hidden.dtype)
    up, mix = factorise(predicted, full.T @ full, metric, rank, ridge)
    down = (full.to(mix.dtype) @ mix).T.contiguous()
    return down, up.contiguous()
