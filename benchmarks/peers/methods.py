"""Low-rank methods for MoE experts, written anew from their published descriptions, as maps from weights to weights.

Each gives the experts' weights in its own form, from which they are multiplied out at full width so that any model can
run them, and says what its form would read and send: `expert` elements read for one selected expert, `shared` elements
read once for all experts of a block, `dispatched` elements that travel to and from one selected expert for a token.

Notation: N experts, gate and up [N, m, d], down [N, d, m]; C [d, d] second moment of what experts read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from forms import Form
from torch import Tensor

from latentize.output_fit import preactivations, selected
from latentize.projections import shrink
from latentize.routing import Routing
from latentize.spec import MoESpec
from latentize.statistics import BlockStatistics

NAMES = ("gate", "up", "down")


@dataclass(frozen=True)
class Rebuilt:
    """A block after a method, and the cost of the method's own form in elements.

    `forms` has the matrices of `spec` that are products, by name; a latent block has none, as it is its own form.
    """

    spec: MoESpec
    expert: int
    shared: int
    dispatched: int
    forms: Mapping[str, Form] = field(default_factory=dict)


Method = Callable[[MoESpec, BlockStatistics, int], Rebuilt]


def plain_svd(spec: MoESpec, _statistics: BlockStatistics, latent: int) -> Rebuilt:
    """Every matrix of every expert on its own, truncated to the rank r that costs what a latent width would.

    The two factors take r (m + d) elements, so r = m l / (m + d). A token is still sent at width d.
    """
    m, d = spec.intermediate_size, spec.hidden_size
    rank = max(1, m * latent // (m + d))
    experts = spec.experts
    forms = {name: truncate(getattr(experts, name), rank) for name in NAMES}
    return Rebuilt(multiplied(spec, forms), 3 * rank * (m + d), 0, 2 * d, forms)


def molae(spec: MoESpec, _statistics: BlockStatistics, latent: int, *, by_dispatch: bool = False) -> Rebuilt:
    """MoLAE (Liu et al., arXiv 2503.23100): SVD of the stacked experts, one latent space for each kind of matrix.

    Gate and up have latent spaces of their own, so a token is sent twice l wide; `by_dispatch` halves them.
    """
    m, d = spec.intermediate_size, spec.hidden_size
    inner = latent // 2 if by_dispatch else latent
    forms = {name: stacked(getattr(spec.experts, name), inner) for name in ("gate", "up")}
    forms["down"] = stacked(spec.experts.down.transpose(1, 2), latent).transposed()
    cost = m * (2 * inner + latent), d * (2 * inner + latent), 2 * inner + latent
    return Rebuilt(multiplied(spec, forms), *cost, forms)


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
    forms = {name: delta(getattr(experts, name), loads, read, latent) for name in ("gate", "up")}
    forms["down"] = delta(experts.down, loads, neurons, rank)
    shared = 3 * m * d + 2 * d * latent + rank * m
    return Rebuilt(multiplied(spec, forms), 2 * m * latent + d * rank, shared, 2 * d, forms)


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
    both = hooi(torch.cat([experts.gate, experts.up]).double() @ white, kept, width, torch.linalg.inv(white))
    gate, up = both.core.chunk(2)
    forms = {"gate": replace(both, core=gate), "up": replace(both, core=up)}
    forms["down"] = hooi(experts.down.double() @ inner, width, kept, torch.linalg.inv(inner))
    shared = (d * width + m * kept * (kept < m)) * 2
    return Rebuilt(multiplied(spec, forms), 3 * kept * width, shared, 2 * width, forms)


def mobe(spec: MoESpec, _statistics: BlockStatistics, latent: int, *, bases: int = 4, steps: int = 500) -> Rebuilt:
    """MoBE (Chen et al., arXiv 2508.05257): gate and up as A_e f(Σ_j a_ej B_j), bases B shared; down as it is.

    Learned on the weights by Adam. For one token an expert reads A_e (m r) of each and its whole down; the bases are
    read once for all. r is what costs as much as a latent width would: 2 m r + m d = 3 m l.
    """
    m, d = spec.intermediate_size, spec.hidden_size
    rank = (3 * latent - d) // 2
    if rank < 1:
        raise ValueError("MoBE leaves down as it is, which alone reads more than this width allows")
    forms = {name: basis_fit(getattr(spec.experts, name), rank, bases, steps) for name in ("gate", "up")}
    return Rebuilt(multiplied(spec, forms), 2 * m * rank + m * d, 2 * bases * rank * d, 2 * d, forms)


def latent(spec: MoESpec) -> Rebuilt:
    """A latent block as it is."""
    m, d, width = spec.intermediate_size, spec.hidden_size, spec.latent_dim
    return Rebuilt(spec, 3 * m * width, 2 * d * width, 2 * width)


def truncate(weights: Tensor, rank: int) -> Form:
    """The best rank-`rank` approximation of each matrix of [N, a, b]."""
    u, s, v = torch.linalg.svd(weights.double(), full_matrices=False)
    root = s[..., :rank].sqrt()
    return Form(u[..., :rank] * root[..., None, :], right=root[..., None] * v[..., :rank, :])


def stacked(weights: Tensor, rank: int) -> Form:
    """[N, a, b] with all rows projected on their `rank` leading right singular vectors."""
    basis = right_basis(weights.double().flatten(0, 1), rank)
    return Form(weights.double() @ basis, right=basis.T)


def right_basis(rows: Tensor, rank: int) -> Tensor:
    """The `rank` leading right singular vectors [b, rank] of rows [a, b]."""
    vectors: Tensor = torch.linalg.eigh(rows.T @ rows)[1].flip(1)[:, :rank]
    return vectors


def delta(weights: Tensor, loads: Tensor, white: Tensor, rank: int) -> Form:
    """Base plus deltas of [N, a, b], whitened by `white` [b, b] and truncated to `rank` with one right factor."""
    w = weights.double()
    base = (w * (loads / loads.sum())[:, None, None]).sum(0)
    whitened = (w - base) @ white
    basis = right_basis(whitened.flatten(0, 1), rank)
    return Form(whitened @ basis, right=basis.T @ torch.linalg.inv(white), base=base)


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


def hooi(tensor: Tensor, rows: int, columns: int, unwhite: Tensor, sweeps: int = 3) -> Form:
    """[N, a, b] with its second and third modes projected on `rows` and `columns` directions, then times `unwhite`.

    By alternation. A mode that keeps all its directions has no factor: it would be a rotation.
    """
    right = right_basis(tensor.flatten(0, 1), columns)
    if rows == tensor.shape[1]:
        core, left = tensor, None
    else:
        left = right_basis(tensor.transpose(1, 2).flatten(0, 1), rows)
        for _ in range(sweeps):
            left = right_basis((tensor @ right).transpose(1, 2).flatten(0, 1), rows)
            right = right_basis((left.T @ tensor).flatten(0, 1), columns)
        core = left.T @ tensor
    if columns == tensor.shape[2]:
        return Form(core @ unwhite, left=left)
    return Form(core @ right, left=left, right=right.T @ unwhite)


def basis_fit(weights: Tensor, rank: int, bases: int, steps: int) -> Form:
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
            loss = (Form(left, right=basis, mix=mix).dense() - target).square().mean()
            loss.backward()
            optimiser.step()
    return Form((left * scale).detach(), right=basis.detach(), mix=mix.detach())


def weight_error(spec: MoESpec, rebuilt: MoESpec, names: Sequence[str] = NAMES) -> float:
    """Relative error of the experts' own weights, all of `names` together; of a latent block, multiplied out."""
    wrong = whole = 0.0
    for name in names:
        before, after = getattr(spec.experts, name), getattr(rebuilt.experts, name)
        if rebuilt.latent is not None:
            after = rebuilt.latent.up @ after if name == "down" else after @ rebuilt.latent.down
        wrong += (after - before).double().square().sum().item()
        whole += before.double().square().sum().item()
    return (wrong / whole) ** 0.5


def multiplied(spec: MoESpec, forms: Mapping[str, Form]) -> MoESpec:
    """The block with its experts' weights multiplied out."""
    dense = {name: form.dense().to(spec.experts.up.dtype).contiguous() for name, form in forms.items()}
    return replace(spec, experts=replace(spec.experts, **dense))
