"""What the experts of a region compute, found by trying every reading of its weights against its routed output.

The routed output of a token is a weighted sum of its experts' outputs, so a reading is right when the output lies in
their span, whatever the routing weights are. The weights that put it there are what the router must produce.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from latentize.activations import FUNCTIONS, Activation
from latentize.passes import graph
from latentize.passes.bound import Bound
from latentize.passes.detect import Region
from latentize.passes.leaves import Role, groupings, readings, sharded_readings, stack

#: Why no reading fits.
NOT_A_SUM = "its routed output is not a weighted sum of the selected experts' outputs"
#: Relative distance from the span below which a reading is taken for a hypothesis; verification decides.
FITS = 1e-5
#: Smallest pivot of the Gram matrix of a token's expert outputs, at unit length, above which its weights are unique.
APART = 1e-8
#: Tokens that tell most readings from the right one, and those of the rest that are looked at together.
FEW, PART = 12, 64
#: Activations that are tried together.
TOGETHER = 16
#: Bytes of weights up to which they are gathered for each pair of a token and an expert.
GATHERED = 4 << 20
#: Names of calls that betray an activation, tried first when they occur.
_HINTS = {
    "silu": ("silu",), "gelu": ("gelu", "gelu_tanh"), "relu": ("relu", "relu_squared"), "sigmoid": ("silu", "sigmoid"),
    "tanh": ("gelu_tanh", "tanh"), "leaky_relu": ("leaky_relu",), "elu": ("elu", "selu"), "mish": ("mish",),
    "softplus": ("softplus", "mish"), "hardswish": ("hardswish",), "hardtanh": ("relu6",), "erf": ("gelu",),
    "clamp": ("relu", "relu6", "relu_squared"), "clamp_min": ("relu", "relu_squared"), "threshold": ("relu",),
    "hardtanh_": ("relu6",), "exp": ("silu", "sigmoid", "tanh", "elu"), "pow": ("relu_squared", "gelu_tanh"),
}  # fmt: skip

#: Calls that are not linear in what they read.
_CURVED = frozenset(
    {*_HINTS, "_softmax", "abs", "cos", "log", "log_sigmoid_forward", "native_layer_norm", "reciprocal", "round",
     "rsqrt", "sign", "sin", "sqrt"}
)  # fmt: skip


@dataclass(frozen=True)
class ExpertsFit:
    """A reading of a region's weights that explains its routed output."""

    gate: Bound | None
    up: Bound
    down: Bound
    gate_bias: Bound | None
    up_bias: Bound | None
    down_bias: Bound | None
    activation: Activation
    num_experts: int
    residual: float
    coefficients: Tensor  # [T, k] weights that put the output in the span
    clear: Tensor  # [T] whether no other weights would
    scale: Bound | None = None  # [h] what multiplies each expert's output beside a norm; part of `down`

    def reordered(self, order: list[int]) -> ExpertsFit:
        """The same with expert order[i] in place i."""
        moved = {name: bound.then(lambda t: t[order]) for name, bound in self.bounds().items()}
        return replace(self, **moved)  # type: ignore[arg-type]

    def bounds(self) -> dict[str, Bound]:
        """The tensors that are present, by their field of `ExpertsSpec`."""
        names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclass(frozen=True)
class _Reading:
    """Weights and biases in canonical form, the activation still open."""

    gate: Bound | None
    up: Bound
    down: Bound
    gate_bias: Bound | None = None
    up_bias: Bound | None = None
    down_bias: Bound | None = None
    scale: Bound | None = None  # [h], in `down` already


@dataclass(frozen=True)
class Sample:
    """Tokens of the recorded run with the experts they selected.

    `weights` are known when they multiply the experts' input, or (`on_output`) where they are not solved for.
    """

    hidden: Tensor  # [T, h]
    output: Tensor  # [T, h]
    indices: Tensor  # [T, k]
    weights: Tensor | None = None
    on_output: bool = False

    def at(self, tokens: Tensor) -> Sample:
        """Some of the tokens, by number."""
        weights = None if self.weights is None else self.weights[tokens]
        return Sample(self.hidden[tokens], self.output[tokens], self.indices[tokens], weights, self.on_output)


@torch.no_grad()
def fit_experts(
    region: Region, indices: Tensor, weights: Tensor | None = None, *, on_output: bool = False
) -> tuple[ExpertsFit | None, str]:
    """The reading of the region's weights that explains its routed output, or the reason why none does.

    Args:
        region: the candidate.
        indices: [T, k] experts that the tokens of the recorded run selected.
        weights: [T, k] routing weights, when the experts are to be read as weighted on their input; or, with
            `on_output`, on their output by these and no others.

    Returns:
        The fit and "", or None and a reason with the best residual.
    """
    sample = Sample(region.hidden_rows(), region.routed_rows(), indices, weights, on_output)
    if not torch.isfinite(sample.output).all():
        return None, "its routed output is not finite"
    best = (float("inf"), "")
    grouped = list(groupings(region))
    for found in grouped:
        for count in _expert_counts(found, region):
            scales = _scales(found, region)
            roles = [role for role in found if role not in scales]
            for reading in _readings(roles, count, region.width, scales):
                for activation, residual, coefficients, clear in _try(reading, sample, region, count):
                    if residual < FITS:
                        parts = _parts(reading)
                        return ExpertsFit(*parts, activation, count, residual, coefficients, clear, reading.scale), ""
                    best = min(best, (residual, f"best reading ({activation.describe(reading.gate is not None)})"))
    if best[0] == float("inf"):
        return None, _misfit(grouped, region)
    return None, f"{NOT_A_SUM}: {best[1]} leaves relative error {best[0]:.1e}{_curves(region)}"


def _curves(region: Region) -> str:
    """The non-linear functions that the experts use, in words; "" where none is seen."""
    used = {c.name.strip("_") for c in region.calls if c.name in _CURVED and any(v in region.fed for v in c.inputs)}
    return f" (they use {', '.join(sorted(used))})" if used else ""


def _parts(reading: _Reading) -> tuple[Bound | None, Bound, Bound, Bound | None, Bound | None, Bound | None]:
    return reading.gate, reading.up, reading.down, reading.gate_bias, reading.up_bias, reading.down_bias


def _misfit(grouped: list[list[Role]], region: Region) -> str:
    """Why no reading could be tried at all."""
    count = len(region.leaves)
    if not grouped:
        return f"its {count} weight tensors do not repeat one structure over {region.head.num_experts} experts"
    weights = sum(role.kind == "weight" for role in grouped[0])
    if weights < 2:
        return f"its experts have {weights} kinds of weights where at least two (up and down) are needed"
    shapes = sorted({tuple(leaf.shape) for leaf in region.leaves})
    return (
        f"shapes {shapes} do not read as gate, up and down of {region.head.num_experts} experts of width {region.width}"
    )


def _expert_counts(found: list[Role], region: Region) -> list[int]:
    """Numbers of real experts worth trying: as many as logits, as listed, or as a leading axis says."""
    routed = region.head.num_experts
    listed = {len(role.members) for role in found if not role.stacked}
    if listed:
        return sorted({n if n <= routed or n % routed else routed for n in listed})
    leading = {role.members[0].shape[0] for role in found if role.kind == "weight"}
    return [routed, *sorted(n for n in leading if 1 < n < routed)]


def _shape(role: Role) -> torch.Size:
    first = role.members[0].shape
    return first if role.stacked else torch.Size((len(role.members), *first))


def _scales(found: list[Role], region: Region) -> list[Role]:
    """The vector that multiplies the output of every expert alike, as a norm's does; only latent experts have one."""
    if region.width == region.head.router_input_rows().shape[1]:
        return []
    weights = [role for role in found if role.kind == "weight"]
    last = max((role.level for role in weights), default=0)
    scales = [role for role in weights if role.level == last and role.stacked and _shape(role) == (region.width,)]
    return scales if len(scales) == 1 else []


def _readings(found: list[Role], experts: int, width: int, scales: list[Role]) -> Iterator[_Reading]:
    """Every way to read the roles as gate, up, down and their biases; `scales`: what multiplies every output."""
    weights = [role for role in found if role.kind == "weight"]
    biases = [role for role in found if role.kind == "bias"]
    if len(weights) < 2:
        return
    last = max(role.level for role in weights)
    downs = [role for role in weights if role.level == last] if last else weights
    for down_role in downs:
        firsts = [role for role in weights if role is not down_role]
        if len(firsts) > 2:
            continue
        neurons, remainder = divmod(_shape(down_role).numel(), experts * width)
        if remainder or not neurons:
            continue
        shards = max(1, len(down_role.members) // experts)
        scale = stack(scales[0]) if scales else None
        for plain in sharded_readings(stack(down_role), _shape(down_role), (experts, width, neurons), 2, shards):
            down = plain if scale is None else plain.with_(scale, lambda d, s: d * s.unsqueeze(-1))
            for gate, up in _firsts(firsts, experts, neurons, width):
                reading = _Reading(gate, up, down, scale=scale)
                yield from _with_biases(reading, biases, last, experts, neurons, width)


def _firsts(firsts: list[Role], experts: int, neurons: int, width: int) -> Iterator[tuple[Bound | None, Bound]]:
    wanted = (experts, neurons, width)
    shards = max(1, *(len(role.members) // experts for role in firsts))
    if len(firsts) == 2:
        one, two = firsts
        for a, b in itertools.product(
            sharded_readings(stack(one), _shape(one), wanted, 1, shards),
            sharded_readings(stack(two), _shape(two), wanted, 1, shards),
        ):
            yield a, b
            yield b, a
        return
    (role,) = firsts
    yield from ((None, up) for up in sharded_readings(stack(role), _shape(role), wanted, 1, shards))
    for fused in readings(stack(role), _shape(role), (experts, 2, neurons, width)):
        first, second = fused.then(lambda t: t[:, 0]), fused.then(lambda t: t[:, 1])
        yield first, second
        yield second, first


def _with_biases(
    reading: _Reading, biases: list[Role], last: int, experts: int, neurons: int, width: int
) -> Iterator[_Reading]:
    """The reading with every assignment of the bias leaves that shapes allow."""
    if not biases:
        yield reading
        return
    options = [_bias_options(role, reading, last, experts, neurons, width) for role in biases]
    for combination in itertools.product(*options):
        fields = [name for part in combination for name in part]
        if len(fields) == len(set(fields)):
            merged = {name: bound for part in combination for name, bound in part.items()}
            yield replace(reading, **merged)


def _bias_options(
    role: Role, reading: _Reading, last: int, experts: int, neurons: int, width: int
) -> list[dict[str, Bound]]:
    """Fields that a bias leaf can be; which level it acts at decides between the first weights and down, when known."""
    bound, shape = stack(role), _shape(role)
    options: list[dict[str, Bound]] = []
    if role.level <= last or not last:
        if reading.gate is not None:
            for pair in readings(bound, shape, (experts, 2, neurons)):
                one, two = pair.then(lambda t: t[:, 0]), pair.then(lambda t: t[:, 1])
                options += [{"gate_bias": one, "up_bias": two}, {"gate_bias": two, "up_bias": one}]
            options += [{"gate_bias": b} for b in readings(bound, shape, (experts, neurons))]
        options += [{"up_bias": b} for b in readings(bound, shape, (experts, neurons))]
    if role.level > last or not last:
        options += [{"down_bias": b} for b in readings(bound, shape, (experts, width))]
    return options


def _try(
    reading: _Reading, sample: Sample, region: Region, experts: int
) -> Iterator[tuple[Activation, float, Tensor, Tensor]]:
    """Every plausible activation of one reading with its residual; where it fits, the weights and which are clear."""
    tensors = {name: b.recorded() for name, b in zip(_FIELDS, _parts(reading), strict=True) if b is not None}
    first = tensors["up"]
    small = sample.at(torch.linspace(0, len(sample.hidden) - 1, min(FEW, len(sample.hidden))).long())
    gate, up = _preactivations(tensors, small, experts)
    candidates = _activations(region, gated=reading.gate is not None)
    sizes = itertools.chain((2,), itertools.repeat(TOGETHER))  # the first ones are likely
    while batch := list(itertools.islice(candidates, next(sizes))):
        outputs = _outputs(tensors, torch.stack([a(gate, up) for a in batch]), small, experts)
        for activation, found in zip(batch, _residuals(outputs, small), strict=True):
            if found < FITS:
                yield activation, *_weights(tensors, activation, sample, experts)
            else:
                yield activation, found, first.new_zeros(0), first.new_zeros(0)


def _weights(
    tensors: dict[str, Tensor], activation: Activation, sample: Sample, experts: int
) -> tuple[float, Tensor, Tensor]:
    """The residual over all tokens, with the weights and of which tokens they are the only ones."""
    found = []
    for part in torch.arange(len(sample.hidden)).split(PART):
        piece = sample.at(part)
        gate, up = _preactivations(tensors, piece, experts)
        found.append(_span(_outputs(tensors, activation(gate, up), piece, experts), piece))
    residuals, coefficients, clear = zip(*found, strict=True)
    return max(residuals), torch.cat(coefficients), torch.cat(clear)


_FIELDS = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")


@torch.no_grad()
def normed_weights(fit: ExpertsFit, region: Region, indices: Tensor) -> Iterator[Tensor]:
    """Candidates for the routing weights [T, k] where each expert's output is normalised before it is weighted.

    A norm only scales an output, so it hides in the coefficients of the fit.
    """
    tensors = {name: bound.recorded() for name, bound in fit.bounds().items()}
    sample = Sample(region.hidden_rows(), region.routed_rows(), indices)
    gate, up = _preactivations(tensors, sample, fit.num_experts)
    scaled = _outputs(tensors, fit.activation(gate, up), sample, fit.num_experts).double()
    outputs = [scaled] if fit.scale is None else [scaled, scaled / fit.scale.recorded().double()]
    for output, eps in itertools.product(outputs, sorted({0.0, *_numbers(region, {"add"})})):
        if eps >= 0:
            yield fit.coefficients * (output.square().mean(-1) + eps).sqrt()


def _preactivations(tensors: dict[str, Tensor], sample: Sample, experts: int) -> tuple[Tensor | None, Tensor]:
    index = sample.indices.clamp(max=experts - 1)
    x = sample.hidden.unsqueeze(1).expand(-1, index.shape[1], -1)
    if sample.weights is not None and not sample.on_output:
        x = x * sample.weights.unsqueeze(-1)

    def linear(name: str) -> Tensor | None:
        if name not in tensors:
            return None
        out = _times(tensors[name], index, x)
        return out + tensors[f"{name}_bias"][index] if f"{name}_bias" in tensors else out

    up = linear("up")
    assert up is not None
    return linear("gate"), up


def _times(weights: Tensor, index: Tensor, x: Tensor) -> Tensor:
    """weights[index] x [..., T, k, out] of weights [N, out, in], index [T, k] and x [..., T, k, in]."""
    if index.numel() * weights[0].numel() * weights.element_size() <= GATHERED:
        return torch.einsum("tkoi,...tki->...tko", weights[index], x)
    out = x.new_empty(*x.shape[:-1], weights.shape[1])
    for expert in index.unique().tolist():
        pairs = index == expert
        out[..., pairs, :] = x[..., pairs, :] @ weights[expert].T
    return out


def _outputs(tensors: dict[str, Tensor], active: Tensor, sample: Sample, experts: int) -> Tensor:
    """Outputs [..., T, k, h] of the selected experts for hidden activations [..., T, k, m].

    Identity experts return the hidden states.
    """
    index = sample.indices.clamp(max=experts - 1)
    out = _times(tensors["down"], index, active)
    if "down_bias" in tensors:
        out = out + tensors["down_bias"][index]
    identity = (sample.indices >= experts).unsqueeze(-1)
    return torch.where(identity, sample.hidden.unsqueeze(1), out) if bool(identity.any()) else out


def _residuals(outputs: Tensor, sample: Sample) -> list[float]:
    """`_span`'s residual for each of several readings' outputs [A, T, k, h] of the same tokens."""
    finite = torch.isfinite(outputs).flatten(1).all(1)
    count, tokens = outputs.shape[:2]
    every = Sample(
        sample.hidden.repeat(count, 1), sample.output.repeat(count, 1), sample.indices,
        None if sample.weights is None else sample.weights.repeat(count, 1), sample.on_output,
    )  # fmt: skip
    error = _distances(outputs.nan_to_num(0.0, 0.0, 0.0).flatten(0, 1), every)[0].view(count, tokens).amax(1)
    return [float(e) if ok else float("inf") for e, ok in zip(error, finite, strict=True)]


def _span(outputs: Tensor, sample: Sample) -> tuple[float, Tensor, Tensor]:
    """Largest relative distance of a token's output from the span of its experts' outputs.

    Also the weights [T, k], and of which tokens [T] they are the only ones.
    """
    if not torch.isfinite(outputs).all():
        return float("inf"), outputs.new_zeros(outputs.shape[:2]), torch.zeros(len(outputs), dtype=torch.bool)
    error, coefficients, clear = _distances(outputs, sample)
    return float(error.max().detach()), coefficients, clear


def _distances(outputs: Tensor, sample: Sample) -> tuple[Tensor, Tensor, Tensor]:
    """For each token [T]: distance of its output from the span of outputs [T, k, h], the weights, whether unique."""
    clear = torch.ones(len(outputs), dtype=torch.bool)
    if sample.weights is not None:
        weighed = outputs * sample.weights.unsqueeze(-1) if sample.on_output else outputs
        difference = weighed.sum(1) - sample.output
        coefficients = sample.weights
    else:
        basis = outputs.mT.double()
        target = sample.output.double().unsqueeze(-1)
        size = basis.norm(dim=-2, keepdim=True).clamp_min(1e-300)
        solution, clear = _least_squares(basis / size, target)
        clear |= ~sample.hidden.any(-1)  # a token that was taken away is no accident of its experts
        difference = ((basis / size) @ solution - target).squeeze(-1)
        coefficients = (solution / size.mT).squeeze(-1)
    scale = sample.output.double().norm(dim=-1)
    error = difference.double().norm(dim=-1) / scale.clamp_min(1e-12 * float(scale.max()) + 1e-300)
    return error.detach(), coefficients, clear


def _least_squares(basis: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients [T, k, 1] of target [T, h, 1] in the unit columns of basis [T, h, k]; where [T] they are unique.

    Normal equations, refined twice against the residual: a few small systems, for which LAPACK's own solvers spend
    their time on threads. A trace of ridge keeps columns that coincide from breaking the factorisation.
    """
    gram = basis.mT @ basis
    factor, _ = torch.linalg.cholesky_ex(gram + 1e-13 * torch.eye(gram.shape[-1], dtype=gram.dtype))
    solution = torch.zeros_like(basis.mT @ target)
    for _ in range(3):
        solution = solution + torch.cholesky_solve(basis.mT @ (target - basis @ solution), factor)
    return solution, factor.diagonal(dim1=-2, dim2=-1).square().amin(-1) > APART


def _activations(region: Region, *, gated: bool) -> Iterator[Activation]:
    """Activations worth trying, those that the region's calls hint at first, with limits from the numbers it uses."""
    names = {call.name for call in region.calls}
    hinted = list(dict.fromkeys(name for key, hints in _HINTS.items() if key in names for name in hints))
    others = [name for name in FUNCTIONS if name not in hinted]
    limits = sorted({abs(s) for s in _numbers(region, _LIMITERS) if s})
    slopes = sorted({s for s in _numbers(region, {"mul"}) if 0.1 < s < 10 and s != 1.0}) if "sigmoid" in names else []
    offsets = (0.0, 1.0) if gated and 1.0 in _numbers(region, {"add"}) else (0.0,)
    for name in hinted or others:
        for alpha, offset in itertools.product([1.0, *slopes] if name == "silu" else [1.0], offsets):
            yield Activation(name, alpha, up_offset=offset)
            for limit in limits:
                yield from _limited(name, alpha, offset, limit, gated=gated)
    yield from (Activation(name) for name in others)


#: Calls that clamp.
_LIMITERS = frozenset({"clamp", "clamp_max", "clamp_min", "minimum", "maximum", "hardtanh"})


def _numbers(region: Region, names: frozenset[str] | set[str]) -> list[float]:
    """Numbers that the named calls of the region use."""
    return [s for c in region.calls if c.name in names for s in graph.numbers(c)]


def _limited(name: str, alpha: float, offset: float, limit: float, *, gated: bool) -> Iterator[Activation]:
    gates = ((None, limit), (-limit, limit)) if gated else ((None, limit), (-limit, limit), (-limit, None))
    ups = ((-limit, limit), (None, None), (None, limit)) if gated else ((None, None),)
    for (low, high), (up_low, up_high) in itertools.product(gates, ups):
        yield Activation(name, alpha, low, high, up_low, up_high, offset)
    if gated:
        yield Activation(name, alpha, None, None, -limit, limit, offset)
