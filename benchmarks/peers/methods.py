"""Low-rank methods for MoE experts, written anew from their published descriptions, as maps from weights to weights.

Each gives the experts' weights as it would reconstruct them, at full width so that any model can run them, and says
what its own form would read and send: `expert` elements read for one selected expert, `shared` elements read once for
all experts of a block, `dispatched` elements that travel to and from one selected expert for a token.

Notation: N experts, gate and up [N, m, d], down [N, d, m]; C [d, d] second moment of what experts read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentize.output_fit import preactivations, selected
from latentize.projections import shrink
from latentize.routing import Routing
from latentize.spec import MoESpec
from latentize.statistics import BlockStatistics


@dataclass(frozen=True)
class Rebuilt:
    """A block after a method, and the cost of the method's own form in elements."""

    spec: MoESpec
    expert: int
    shared: int
    dispatched: int


Method = Callable[[MoESpec, BlockStatistics, int], Rebuilt]


def plain_svd(spec: MoESpec, _statistics: BlockStatistics, latent: int) -> Rebuilt:
    """Every matrix of every expert on its own, truncated to the rank r that costs what a latent width would.

    The two factors take r (m + d) elements, so r = m l / (m + d). A token is still sent at width d.
    """
    m, d = spec.intermediate_size, spec.hidden_size
    rank = max(1, m * latent // (m + d))
    experts = spec.experts
    gate, up, down = (truncate(w, rank) for w in (experts.gate, experts.up, experts.down))
    return Rebuilt(_with(spec, gate, up, down), 3 * rank * (m + d), 0, 2 * d)


def molae(spec: MoESpec, _statistics: BlockStatistics, latent: int, *, by_dispatch: bool = False) -> Rebuilt:
    """MoLAE (Liu et al., arXiv 2503.23100): SVD of the stacked experts, one latent space for each kind of matrix.

    Gate and up have latent spaces of their own, so a token is sent twice l wide; `by_dispatch` halves them.
    """
    m, d = spec.intermediate_size, spec.hidden_size
    inner = latent // 2 if by_dispatch else latent
    gate, up = (stacked(w, inner) for w in (spec.experts.gate, spec.experts.up))
    down = stacked(spec.experts.down.transpose(1, 2), latent).transpose(1, 2)
    return Rebuilt(_with(spec, gate, up, down), m * (2 * inner + latent), d * (2 * inner + latent), 2 * inner + latent)


def d2_moe(spec: MoESpec, statistics: BlockStatistics, latent: int) -> Rebuilt:
    """D2-MoE (Gu et al., arXiv 2502.17298): a merged base, and the experts' deltas whitened, truncated, with one V.

    The base is the mean of experts by load (theirs: by Fisher information), and is not pruned. Deltas are whitened by
    the mean over experts of the Cholesky factors of what a matrix reads. V is on the side that a matrix reads, so U of
    down is [d, r], and a token is sent and comes back at width d.
    """
    m, d = spec.intermediate_size, spec.hidden_size
    loads = statistics.counts[: spec.num_experts].double()
    read, neurons = cholesky_means(spec, statistics)
    experts, rank = spec.experts, m * latent // d
    gate, up = (delta(w, loads, read, latent) for w in (experts.gate, experts.up))
    down = delta(experts.down, loads, neurons, rank)
    shared = 3 * m * d + 2 * d * latent + rank * m
    return Rebuilt(_with(spec, gate, up, down), 2 * m * latent + d * rank, shared, 2 * d)


def tucker(spec: MoESpec, statistics: BlockStatistics, latent: int, *, neurons: float = 1.0) -> Rebuilt:
    """TD-MoE (Xu et al., ICLR 2026): a Tucker decomposition of all experts as one tensor, whitened by what it reads.

    Gate and up are one tensor, so that they share the factor on the token's side. `neurons` is the share of m that the
    factor on the other side keeps; the side of d gets what that leaves at the same elements for each expert. The mode
    of experts is not truncated: it costs nothing that a token reads.
    """
    m, d = spec.intermediate_size, spec.hidden_size
    kept = max(1, round(neurons * m))
    width = min(d, m * latent // kept)
    white = torch.linalg.cholesky(shrink(statistics.input_moment, statistics.tokens))
    inner = cholesky_means(spec, statistics)[1]
    experts = spec.experts
    both = hooi(torch.cat([experts.gate, experts.up]).double() @ white, kept, width)
    gate, up = (both @ torch.linalg.inv(white)).to(experts.up.dtype).chunk(2)
    down = (hooi(experts.down.double() @ inner, width, kept) @ torch.linalg.inv(inner)).to(experts.down.dtype)
    shared = (d * width + m * kept * (kept < m)) * 2
    return Rebuilt(_with(spec, gate, up, down), 3 * kept * width, shared, 2 * width)


def mobe(spec: MoESpec, _statistics: BlockStatistics, latent: int, *, bases: int = 4, steps: int = 500) -> Rebuilt:
    """MoBE (Chen et al., arXiv 2508.05257): gate and up as A_e f(Σ_j a_ej B_j), bases B shared; down as it is.

    Learned on the weights by Adam. For one token an expert reads A_e (m r) of each and its whole down; the bases are
    read once for all. r is what costs as much as a latent width would: 2 m r + m d = 3 m l.
    """
    m, d = spec.intermediate_size, spec.hidden_size
    rank = (3 * latent - d) // 2
    if rank < 1:
        raise ValueError("MoBE leaves down as it is, which alone reads more than this width allows")
    gate, up = (basis_fit(w, rank, bases, steps) for w in (spec.experts.gate, spec.experts.up))
    return Rebuilt(_with(spec, gate, up, spec.experts.down), 2 * m * rank + m * d, 2 * bases * rank * d, 2 * d)


def latent(spec: MoESpec) -> Rebuilt:
    """A latent block as it is."""
    m, d, width = spec.intermediate_size, spec.hidden_size, spec.latent_dim
    return Rebuilt(spec, 3 * m * width, 2 * d * width, 2 * width)


def truncate(weights: Tensor, rank: int) -> Tensor:
    """The best rank-`rank` approximation of each matrix of [N, a, b]."""
    u, s, v = torch.linalg.svd(weights.double(), full_matrices=False)
    kept: Tensor = (u[..., :rank] * s[..., None, :rank]) @ v[..., :rank, :]
    return kept.to(weights.dtype)


def stacked(weights: Tensor, rank: int) -> Tensor:
    """[N, a, b] with all rows projected on their `rank` leading right singular vectors."""
    basis = right_basis(weights.double().flatten(0, 1), rank)
    kept: Tensor = weights.double() @ basis @ basis.T
    return kept.to(weights.dtype)


def right_basis(rows: Tensor, rank: int) -> Tensor:
    """The `rank` leading right singular vectors [b, rank] of rows [a, b]."""
    vectors: Tensor = torch.linalg.eigh(rows.T @ rows)[1].flip(1)[:, :rank]
    return vectors


def delta(weights: Tensor, loads: Tensor, white: Tensor, rank: int) -> Tensor:
    """Base plus deltas of [N, a, b], whitened by `white` [b, b] and truncated to `rank` with one right factor."""
    w = weights.double()
    base = (w * (loads / loads.sum())[:, None, None]).sum(0)
    whitened = (w - base) @ white
    basis = right_basis(whitened.flatten(0, 1), rank)
    result: Tensor = base + whitened @ (basis @ basis.T @ torch.linalg.inv(white))
    return result.to(weights.dtype)


def cholesky_means(spec: MoESpec, statistics: BlockStatistics) -> tuple[Tensor, Tensor]:
    """Means over experts of the Cholesky factors of second moments: of inputs [d, d] and of neurons [m, m]."""
    sample = statistics.sample
    routing = Routing(sample.hidden.new_empty(0), sample.weights, sample.indices)
    factors: tuple[list[Tensor], list[Tensor]] = ([], [])
    for expert in range(spec.num_experts):
        x = sample.hidden[selected(routing, expert)[0]]
        if len(x):
            neurons = spec.experts.activation(*preactivations(spec.experts, expert, x))
            for rows, found in zip((x, neurons), factors, strict=True):
                moment = rows.double().T @ rows.double() / len(rows)
                found.append(torch.linalg.cholesky(shrink(moment, len(rows))))
    return torch.stack(factors[0]).mean(0), torch.stack(factors[1]).mean(0)


def hooi(tensor: Tensor, rows: int, columns: int, sweeps: int = 3) -> Tensor:
    """[N, a, b] with its second and third modes projected on `rows` and `columns` directions, by alternation."""
    right = right_basis(tensor.flatten(0, 1), columns)
    left = right_basis(tensor.transpose(1, 2).flatten(0, 1), rows)
    for _ in range(sweeps if rows < tensor.shape[1] else 0):
        left = right_basis((tensor @ right).transpose(1, 2).flatten(0, 1), rows)
        right = right_basis((left.T @ tensor).flatten(0, 1), columns)
    result: Tensor = left @ (left.T @ tensor @ right) @ right.T
    return result


def basis_fit(weights: Tensor, rank: int, bases: int, steps: int) -> Tensor:
    """A_e silu(Σ_j a_ej B_j) nearest to weights [N, m, d], from Adam with a falling rate."""
    n, _, d = weights.shape
    scale = weights.std()
    target = weights / scale
    generator = torch.Generator().manual_seed(0)
    u, s, _ = torch.linalg.svd(target, full_matrices=False)
    left = (u[..., :rank] * s[:, None, :rank] / d**0.5).contiguous().requires_grad_()
    basis = torch.randn(bases, rank, d, generator=generator).requires_grad_()
    mix = torch.randn(n, bases, generator=generator).requires_grad_()
    optimiser = torch.optim.Adam([left, basis, mix], lr=0.03)
    with torch.enable_grad():
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = 0.03 * (1 - step / steps) + 1e-4
            optimiser.zero_grad()
            loss = (_combine(left, basis, mix) - target).square().mean()
            loss.backward()
            optimiser.step()
    return (_combine(left, basis, mix) * scale).detach()


def weight_error(spec: MoESpec, rebuilt: MoESpec, names: Sequence[str] = ("gate", "up", "down")) -> float:
    """Relative error of the experts' own weights, all of `names` together; of a latent block, multiplied out."""
    wrong = whole = 0.0
    for name in names:
        before, after = getattr(spec.experts, name), getattr(rebuilt.experts, name)
        if rebuilt.latent is not None:
            after = rebuilt.latent.up @ after if name == "down" else after @ rebuilt.latent.down
        wrong += (after - before).double().square().sum().item()
        whole += before.double().square().sum().item()
    return (wrong / whole) ** 0.5


def _combine(left: Tensor, basis: Tensor, mix: Tensor) -> Tensor:
    return left @ torch.nn.functional.silu(torch.einsum("nj,jrd->nrd", mix, basis))


def _with(spec: MoESpec, gate: Tensor, up: Tensor, down: Tensor) -> MoESpec:
    experts = replace(spec.experts, gate=gate.contiguous(), up=up.contiguous(), down=down.contiguous())
    return replace(spec, experts=experts)
