"""SOAP: Adam in the eigenbasis of Shampoo's preconditioner, for stacks of matrices.

Vyas et al., "SOAP: Improving and Stabilizing Shampoo using Adam" (2024), arXiv:2409.11321, algorithm 3: second moments
are kept in the eigenbases of E[G Gᵀ] and E[Gᵀ G], which are refreshed now and then by one step of subspace iteration.
The mean of the gradients is kept in them too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

#: A side longer than this keeps its own coordinates: eigenbases of long sides cost more than they earn.
MAX_SIDE = 512


def matrix_step(size: float, shape: Sequence[int]) -> float:
    """How large a step of a matrix [..., r, c] with entries of root mean square `size` is a relative change of about 1.

    A step of this kind moves every entry by its rate, a change of spectral norm up to √(r c) times the rate, while a
    matrix of independent entries of that size has one near size (√r + √c): their quotient.
    """
    r, c = shape[-2:]
    return float(size * (r**0.5 + c**0.5) / (r * c) ** 0.5)


class Soap(torch.optim.Optimizer):
    """SOAP over parameters [..., r, c] seen as stacks of matrices; plain Adam over vectors.

    The first gradient of a matrix only sets its bases; the matrix moves from the second one on.

    Args:
        params: tensors or parameter groups.
        lr: learning rate, in Adam's units.
        betas: decay of the mean and of all second moments.
        eps: added to the root of the second moments.
        refresh: steps between two refreshes of the bases.
        each: runs a function on every item of a sequence, possibly side by side.

    A parameter group with `keep_idle` keeps the coordinates of a side of which the first gradient leaves some rows (or
    columns) out, tables that are looked up for example, so that what has no gradient stays where it is.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.97),
        eps: float = 1e-10,
        refresh: int = 10,
        each: Callable[[Callable[[Any], None], Sequence[Any]], object] | None = None,
    ) -> None:
        self._each = each or _in_turn
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "refresh": refresh})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None if closure is None else closure()
        found = [(p, p.grad, g, self.state[p]) for g in self.param_groups for p in g["params"] if p.grad is not None]
        # The largest first: then what is done side by side ends together.
        self._each(lambda one: _update(*one), sorted(found, key=lambda one: -one[0].numel()))
        return loss


def _in_turn(work: Callable[[Any], None], items: Sequence[Any]) -> None:
    for item in items:
        work(item)


@torch.no_grad()
def _update(parameter: Tensor, gradient: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
    beta1, beta2 = group["betas"]
    if not state:
        state.update(step=0, mean=torch.zeros_like(gradient), square=torch.zeros_like(gradient))
        if gradient.ndim > 1:
            _start_bases(state, gradient, keep_idle=group.get("keep_idle", False))
        if len(state) > 3:
            return  # in its own bases the first gradient is diagonal: its other second moments are rounding noise
    state["step"] += 1
    step = state["step"]
    turned = _turn(gradient, state)
    state["mean"].lerp_(turned, 1 - beta1)
    state["square"].lerp_(turned.square(), 1 - beta2)
    scale = (state["square"] / (1 - beta2**step)).sqrt().add_(group["eps"])
    update = (state["mean"] / (1 - beta1**step)).div_(scale)
    parameter.add_(_turn_back(update, state), alpha=-group["lr"])
    if gradient.ndim > 1:
        _follow_factors(state, gradient, 1 - beta2)
        if step == 1 or step % group["refresh"] == 0:
            _refresh_bases(state)


def _start_bases(state: dict[str, Any], gradient: Tensor, *, keep_idle: bool) -> None:
    rows, columns = gradient.shape[-2:]
    for side, size, along in (("row", rows, gradient), ("column", columns, gradient.mT)):
        if size <= MAX_SIDE and not (keep_idle and bool((along == 0).all(-1).any())):
            factor = along @ along.mT
            state[f"{side}_factor"] = factor
            state[f"{side}_basis"] = torch.linalg.eigh(factor.double()).eigenvectors.to(gradient.dtype)


def _follow_factors(state: dict[str, Any], gradient: Tensor, weight: float) -> None:
    if "row_factor" in state:
        state["row_factor"].lerp_(gradient @ gradient.mT, weight)
    if "column_factor" in state:
        state["column_factor"].lerp_(gradient.mT @ gradient, weight)


def _refresh_bases(state: dict[str, Any]) -> None:
    """One step of subspace iteration per side; the mean is turned along, second moments stay with their directions."""
    for side, axis in (("row", -2), ("column", -1)):
        if f"{side}_factor" not in state:
            continue
        basis = state[f"{side}_basis"]
        moved = state[f"{side}_factor"] @ basis
        order = (basis * moved).sum(-2).argsort(-1, descending=True)
        moved = moved.gather(-1, order.unsqueeze(-2).expand_as(moved))
        along = order.unsqueeze(-1) if axis == -2 else order.unsqueeze(-2)
        state["square"] = state["square"].gather(axis, along.expand_as(state["square"]))
        refreshed = torch.linalg.qr(moved).Q
        turn = refreshed.mT @ basis
        state["mean"] = turn @ state["mean"] if axis == -2 else state["mean"] @ turn.mT
        state[f"{side}_basis"] = refreshed


def _turn(value: Tensor, state: dict[str, Any]) -> Tensor:
    """`value` in the current bases."""
    if "row_basis" in state:
        value = state["row_basis"].mT @ value
    return value @ state["column_basis"] if "column_basis" in state else value


def _turn_back(value: Tensor, state: dict[str, Any]) -> Tensor:
    if "row_basis" in state:
        value = state["row_basis"] @ value
    return value @ state["column_basis"].mT if "column_basis" in state else value
