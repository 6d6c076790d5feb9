"""The shared expert absorbs what the routed path lost: its last layer refitted in closed form. It takes no bytes.

With S the sum of routed and shared output in the original and S' that in the converted model, token by token, and φ
what the shared expert's last layer reads there, times its gate: ΔW = argmin Σ w² ‖S - S' - ΔW φ‖² + λ ‖ΔW‖². A metric
of output errors would make no difference, the ridge being measured in it too: all channels have the same features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from latentize.errors import first_line
from latentize.inputs import Batch
from latentize.output_fit import FIT_BYTES, ridge_for
from latentize.passes.listening import listening, without_gradients
from latentize.passes.shared_expert import Heard, SharedExpert, hear
from latentize.sources import out_of_memory
from latentize.statistics import Sample

#: One in so many batches is held out, or the last part of each batch's tokens where there are fewer batches.
HELD_OUT = 4


@dataclass(frozen=True)
class Refit:
    """What became of one block's shared expert.

    `weight` and `bias` name the parameters of the model that were refitted, and `new_weight` [d, f] and `new_bias` [d]
    are what they become; None where they stay, for the `reason`. Errors are those of the sum of routed and shared
    output, relative, over `held_out` tokens that the fit has not seen. `gated` says that every token has a number by
    which its shared expert counts.
    """

    weight: str = ""
    bias: str | None = None
    gated: bool = False
    reason: str = ""
    tokens: int = 0
    held_out: int = 0
    error_before: float | None = None
    error_after: float | None = None
    bytes_added: int = 0
    new_weight: Tensor | None = None
    new_bias: Tensor | None = None

    @property
    def kept(self) -> bool:
        """Whether anything was refitted."""
        return self.new_weight is not None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """New values of the model's parameters by name."""
        named = {self.weight: self.new_weight, self.bias or "": self.new_bias}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def describe(self) -> str:
        """What happened, in a line."""
        if self.error_before is None or self.error_after is None:
            return self.reason
        change = f"{self.error_before:.4f} → {self.error_after:.4f} on {self.held_out} held-out tokens"
        if self.kept:
            what = f"{' and '.join(self.tensors)} refitted"
            return f"{what}: error of routed + shared output {change}; {self.bytes_added} bytes added"
        return f"{self.weight} left as it is, {self.reason}: error of routed + shared output {change}"


def refit(
    original: nn.Module,
    teacher: nn.Module,
    student: nn.Module,
    experts: Mapping[str, SharedExpert],
    batches: Sequence[Batch],
    samples: Mapping[str, Sample],
    weights: Mapping[str, Tensor],
) -> dict[str, Refit]:
    """Refit the shared experts of some blocks.

    Args:
        original: the model whose parameters are named; left as it is.
        teacher: it with its blocks in canonical form.
        student: it with these blocks, and those before them, latent; left as it is.
        experts: the shared experts of these blocks.
        batches: those that `samples` were drawn from.
        samples: the tokens of each block that are looked at.
        weights: [S] of each of those tokens in least squares.
    """
    sums, found = {}, {}
    for name, expert in experts.items():
        held = original.get_parameter(expert.weight), expert.bias and original.get_parameter(expert.bias)
        size = held[0].shape[1] + (expert.bias is not None)
        if 6 * 8 * size**2 > FIT_BYTES:
            reason = f"no memory to refit {expert.weight}: its {size} inputs need more than {FIT_BYTES // 2**30} GiB"
            found[name] = Refit(expert.weight, expert.bias, expert.gated, reason)
        else:
            sums[name] = _Sums(expert, samples[name], weights[name])
    ears = [without_gradients(listening(model)) for model in (teacher, student)]
    for number, batch in enumerate(batches):
        listened = {name: s.expert for name, s in sums.items() if not s.failure}
        if not listened:
            break
        try:
            before, after = (hear(model, listened, batch) for model in ears)
        except Exception as error:  # NotASumError, or whatever code raises where gradients are taken
            if out_of_memory(error):
                raise
            for name in listened:
                sums[name].failure = f"calibration batch {number} does not add up as proved ({first_line(error)})"
            break
        held_out = number % HELD_OUT == HELD_OUT - 1 if len(batches) >= HELD_OUT else None
        for name in listened:
            sums[name].add(before[name], after[name], held_out=held_out)
    for name, total in sums.items():
        expert = experts[name]
        bias = None if expert.bias is None else original.get_parameter(expert.bias)
        found[name] = total.solve(original.get_parameter(expert.weight), bias)
    return {name: found[name] for name in experts}


def changes(original: nn.Module, refits: Mapping[str, Refit]) -> list[tuple[nn.Parameter, Tensor]]:
    """The original's parameters that were refitted, and what they become."""
    named = {name: tensor for made in refits.values() for name, tensor in made.tensors.items()}
    return [(original.get_parameter(name), tensor) for name, tensor in named.items()]


def apply(model: nn.Module, changed: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
    """Give a model new parameters in place of those of `changes`, which stay as they are."""
    new = {id(parameter): tensor for parameter, tensor in changed}
    for module in list(model.modules()):
        for key, parameter in list(module._parameters.items()):
            if parameter is not None and id(parameter) in new:
                value = new[id(parameter)].to(parameter).clone()
                module._parameters[key] = nn.Parameter(value, requires_grad=parameter.requires_grad)


@dataclass
class _Normal:
    """Normal equations over some tokens: φᵀφ [F, F], φᵀr [F, d] and squares, in fp64."""

    gram: Tensor | None = None
    moment: Tensor | None = None
    residual: float = 0.0
    whole: float = 0.0
    tokens: int = 0

    def add(self, features: Tensor, residual: Tensor, total: Tensor) -> None:
        gram, moment = features.T @ features, features.T @ residual
        self.gram = gram if self.gram is None else self.gram + gram
        self.moment = moment if self.moment is None else self.moment + moment
        self.residual += float(residual.square().sum())
        self.whole += float(total.square().sum())
        self.tokens += len(residual)

    def error(self, change: Tensor | None = None) -> float:
        """Relative error of the sum with coefficients changed by [F, d]."""
        assert self.gram is not None
        assert self.moment is not None
        left = self.residual
        if change is not None:
            left += float((change * (self.gram @ change - 2 * self.moment)).sum())
        return math.sqrt(max(left, 0.0) / self.whole) if self.whole else 0.0


@dataclass
class _Sums:
    """What the runs say about one block's shared expert."""

    expert: SharedExpert
    sample: Sample
    weights: Tensor
    seen: int = 0
    used: int = 0
    failure: str = ""
    fitted: _Normal = field(default_factory=_Normal)
    held_out: _Normal = field(default_factory=_Normal)

    def add(self, before: Heard, after: Heard, *, held_out: bool | None) -> None:
        """One batch; with `held_out` None the last part of its tokens is held out."""
        count = len(before.routed)
        if len(after.routed) != count or self.sample.places is None:
            self.failure = "the converted model brings other tokens to it than the original does"
            return
        places = self.sample.places
        rows = places[(places >= self.seen) & (places < self.seen + count)] - self.seen
        weights = self.weights[self.used : self.used + len(rows)]
        self.seen += count
        self.used += len(rows)
        rows = rows.to(before.routed.device)
        total = before.total[rows].double()
        residual = total - after.total[rows].double()
        features = after.features[rows].double()
        if self.expert.bias is not None:
            features = torch.cat([features, features.new_ones(len(features), 1)], dim=1)
        features = features * after.shared_scale[rows].double()
        good = residual.isfinite().all(-1) & features.isfinite().all(-1)
        out = torch.full((len(rows),), bool(held_out), device=rows.device)
        if held_out is None:
            out[len(rows) - len(rows) // HELD_OUT :] = True
        scale = weights.to(residual).unsqueeze(1)
        for part, into, scaled in ((good & ~out, self.fitted, scale), (good & out, self.held_out, scale.new_ones(()))):
            own = scaled.expand_as(scale)[part]
            if len(own):
                into.add(features[part] * own, residual[part] * own, total[part])

    def solve(self, weight: Tensor, bias: Tensor | None) -> Refit:
        """The refit, kept where it helps."""
        expert, fitted = self.expert, self.fitted
        made = Refit(expert.weight, expert.bias, expert.gated, tokens=fitted.tokens, held_out=self.held_out.tokens)
        if self.failure:
            return replace(made, reason=f"{expert.weight} left as it is: {self.failure}")
        if fitted.gram is None or self.held_out.gram is None:
            return replace(made, reason=f"{expert.weight} left as it is: too few calibration tokens reach it")
        assert fitted.moment is not None
        size = len(fitted.gram)
        ridge = ridge_for(fitted.gram.trace().item(), size, fitted.tokens)
        normal = fitted.gram + ridge * torch.eye(size, dtype=torch.float64, device=fitted.gram.device)
        change = torch.cholesky_solve(fitted.moment, torch.linalg.cholesky(normal))
        width = weight.shape[1]
        new = (weight.double() + change[:width].T).to(weight.dtype)
        rounded = [(new.double() - weight.double()).T]
        new_bias = None
        if bias is not None:
            new_bias = (bias.double() + change[width]).to(bias.dtype)
            rounded.append((new_bias.double() - bias.double()).unsqueeze(0))
        before, after = self.held_out.error(), self.held_out.error(torch.cat(rounded))
        made = replace(made, error_before=before, error_after=after)
        if not after < before or not bool(new.isfinite().all()):
            return replace(made, reason="a refit does not help on held-out tokens")
        pairs = ((weight, new), (bias, new_bias))
        added = sum(b.nbytes - a.nbytes for a, b in pairs if a is not None and b is not None)
        return replace(made, new_weight=new, new_bias=new_bias, bytes_added=added)
