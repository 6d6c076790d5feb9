"""Prove a lift: the block in canonical form, put where it belongs, must compute what the original computes.

Both sides run in fp64 on inputs of other lengths, with the model's weights and randomised ones, with N and k as they
are and doubled, and in the model's own dtype against the original's own rounding.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from latentize.blocks import Probe
from latentize.errors import first_line
from latentize.moe import LatentMoE, Router
from latentize.passes.double import dtype_of, in_fp64, in_own_dtype
from latentize.passes.probes import Inputs, Prober, in_proportion
from latentize.passes.rewrite import replace_at
from latentize.passes.shaken import Shaken
from latentize.passes.siblings import multiplied
from latentize.passes.sites import Site
from latentize.spec import MoESpec
from latentize.ties import TIE, margin

#: A rewrite is exact when its error is at most this many times the original's own rounding error, or FLOOR.
SLACK, FLOOR = 4.0, 1e-6
#: Seed of the inputs of a proof; the lift was made on others.
SEED = 1234


@dataclass(frozen=True)
class Candidate:
    """What is to be proved: at `site` of `module` (paths relative to it) sits a block that computes `spec(state)`."""

    module: nn.Module
    site: Site
    spec: Callable[[nn.Module], MoESpec]  # the spec with the tensors of a copy of the module, in that copy's dtype
    share: float  # size of the routed output relative to the module's output
    outputs: tuple[int, ...]  # positions of output tensors that contain the routed output
    template: fx.GraphModule | None = None  # the module's graph, for a graph site


def verify(candidate: Candidate, shaken: Shaken, prober: Prober) -> tuple[tuple[Probe, ...], str]:
    """Compare original and canonical form.

    Args:
        candidate: what is to be proved.
        shaken: copy of the module in fp64 with randomised weights.
        prober: makes the inputs.

    Returns:
        The probes, and "" or the reason why the proof failed.
    """
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        with shaken.trained() as truth:
            takes = _Takes(candidate, truth, prober)
            inputs = [i for i in prober.proofs(SEED) if not i.optional or takes(i)]
            extremes = [i for i in prober.extremes(SEED) if not i.optional or takes(i)]
            cases, known = itertools.tee(_in_double(truth, inputs, extremes))
            found, reason = _compare(candidate, truth, cases, "", 1)
        probes = list(found)
        for label, factor in (("randomised weights, ", 1), ("N and k doubled, ", 2)):
            if reason:
                return tuple(probes), reason
            cases = _in_double(shaken.module, inputs, [] if factor > 1 else extremes)
            found, reason = _compare(candidate, shaken.module, cases, label, factor)
            probes += found
        if reason:
            return tuple(probes), reason
        native = in_own_dtype(candidate.module)
        cases = _in_own_dtype(native, itertools.islice(known, len(inputs)))
        found, reason = _compare(candidate, native, cases, "own dtype, ", 1)
        reason = reason or _skips_empty_tokens(candidate, shaken.module, prober)
        return (*probes, *found), reason


#: Inputs, the outputs to expect of them, and those of the module that is compared, which may be the same.
_Case = tuple[Inputs, list[Tensor], list[Tensor]]


def _in_double(module: nn.Module, given: list[Inputs], extremes: list[Inputs]) -> Iterator[_Case]:
    """Cases of a module that is in fp64 itself; extremes on which it fails by itself, by ties say, are none."""
    for number, inputs in enumerate([*given, *extremes]):
        try:
            outputs = _run(module, inputs, torch.float64)
        except Exception:
            if number < len(given):
                raise
            continue
        yield inputs, outputs, outputs


def _in_own_dtype(module: nn.Module, known: Iterable[_Case]) -> Iterator[_Case]:
    """The same cases for a module in its own dtype; what it is given stays as it is."""
    for inputs, expected, _ in known:
        yield inputs, expected, _run(module, inputs, None)


class _Takes:
    """Whether a module runs on some inputs, with as much output for each token as in its example."""

    def __init__(self, candidate: Candidate, module: nn.Module, prober: Prober) -> None:
        self.outputs, self.module, self.seen = candidate.outputs, module, prober.seen()
        self.graph = isinstance(candidate.module, fx.GraphModule)

    def __call__(self, inputs: Inputs) -> bool:
        """Whether it does."""
        try:
            found = _run(self.module, inputs, torch.float64)
        except Exception:  # sizes or values that it does not take
            return False
        if not self.graph:
            return True
        return in_proportion(inputs, self._main(found), self.seen, self._main(self._example))

    @functools.cached_property
    def _example(self) -> list[Tensor]:
        return _run(self.module, self.seen, torch.float64)

    def _main(self, outputs: list[Tensor]) -> list[Tensor]:
        return [outputs[position] for position in self.outputs]


def _compare(
    candidate: Candidate, subject: nn.Module, cases: Iterable[_Case], label: str, factor: int
) -> tuple[list[Probe], str]:
    canonical = multiplied(candidate.spec(subject), factor)
    templates = {} if candidate.template is None else {"": candidate.template}
    rewritten = replace_at(subject, {"": candidate.site}, {"": canonical}, templates=templates)
    dtype = dtype_of(subject)
    narrowest = min((p.dtype for p in subject.parameters() if p.is_floating_point()), key=_bits, default=dtype)
    probes: list[Probe] = []
    for probe, expected, own in cases:
        margins, handle = _margins(canonical.router)
        try:
            ours = _run(rewritten, probe, torch.float64 if own is expected else None)
        except (RuntimeError, IndexError, ValueError) as failure:  # a captured graph may hold for some shapes only
            return probes, f"rewritten, it does not run on {label}{probe.name} ({first_line(failure)})"
        finally:
            handle.remove()
        if len(ours) != len(expected):
            return (
                probes,
                f"its output has {len(expected)} tensors, and {len(ours)} after rewriting ({label}{probe.name})",
            )
        kept = torch.cat(margins) > TIE if margins else None
        clear = kept if dtype in (torch.float32, torch.float64) else None  # in half precision more tokens tie
        error, own_error, tied, tokens = 0.0, 0.0, 0, 0 if kept is None else len(kept)
        for position, (a, b, o) in enumerate(zip(ours, expected, own, strict=True)):
            if position in candidate.outputs:
                a, b, o = _where_finite(a, b, o) if own is not expected else (a, b, o)
                one, dropped = _relative(a, b, kept, candidate.share)
                two, _ = _relative(o, b, kept, candidate.share)
                error, own_error, tied = max(error, one), max(own_error, two), max(tied, dropped)
            elif factor == 1 and position not in candidate.outputs and not _agrees(a, b, clear):
                return probes, f"output {position} differs after rewriting ({label}{probe.name})"
        probes.append(Probe(label + probe.name, tokens, error, own_error, tied))
        if own_error > _most(narrowest):
            return (
                probes,
                f"its own dtype makes it compute something else: {own_error:.1e} from fp64 on {label}{probe.name}",
            )
        allowed = max(SLACK * own_error, _floor(dtype))
        if not error <= allowed:
            return probes, (
                f"what it was read as does not hold: relative error {error:.1e} on {label}{probe.name} "
                f"where rounding allows {allowed:.1e}"
            )
    return probes, ""


#: Reason of a refusal that no other place for the lift can mend.
EMPTY = "tokens of all zeros, such as padding, are not routed like others"


def _skips_empty_tokens(candidate: Candidate, subject: nn.Module, prober: Prober) -> str:
    """Says so when tokens of all zeros, as padding leaves them, get no expert; "" otherwise.

    Their scores may all tie, so the original may use other experts than ours, but it must use some.
    """
    given = prober.with_gaps("zero tokens", SEED)
    if given is None:
        return ""
    canonical = LatentMoE(candidate.spec(subject))
    templates = {} if candidate.template is None else {"": candidate.template}
    rewritten = replace_at(subject, {"": candidate.site}, {"": canonical}, templates=templates)
    inputs, empty = given
    try:
        wanted = _run(subject, inputs, torch.float64)
    except (RuntimeError, IndexError, ValueError, AssertionError):  # the original does not take them either
        return ""
    try:
        found = _run(rewritten, inputs, torch.float64)
    except (RuntimeError, IndexError, ValueError):
        return EMPTY
    handle = canonical.experts.register_forward_hook(lambda _m, _a, out: out.index_fill(0, torch.tensor(empty), 0.0))
    without = _run(rewritten, inputs, torch.float64)
    handle.remove()
    for position in candidate.outputs:
        original = wanted[position]
        apart = (_relative(ours[position], original, None, candidate.share)[0] for ours in (without, found))
        if next(apart) <= FLOOR < next(apart):
            return EMPTY
    return ""


def difference(wanted: list[Tensor], found: list[Tensor]) -> float:
    """Largest relative difference of two models' floating outputs on the same inputs."""
    pairs = zip(wanted, found, strict=True)
    return max((_finite_error(b, a) for a, b in pairs if a.is_floating_point()), default=0.0)


def _finite_error(found: Tensor, wanted: Tensor) -> float:
    """Relative error where `wanted` is finite; infinite when `found` is not finite there."""
    if found.shape != wanted.shape:
        return math.inf
    finite = wanted.isfinite()
    if not bool(found[finite].isfinite().all()):
        return math.inf
    return _relative(found[finite], wanted[finite], None, 1.0)[0]


def run_double(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Output tensors of a module in fp64."""
    return _run(module, inputs, torch.float64)


def run_native(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Output tensors of a module in its own dtype."""
    return _run(module, inputs, None)


def _bits(dtype: torch.dtype) -> int:
    return torch.finfo(dtype).bits


def _most(dtype: torch.dtype) -> float:
    """Largest rounding error that the original may have against fp64 and still be called the same function."""
    return 1e-3 if dtype in (torch.float32, torch.float64) else 0.2


def _floor(dtype: torch.dtype) -> float:
    """Smallest relative error asked for: routers compute in fp32 even in an fp64 model."""
    return FLOOR if dtype in (torch.float32, torch.float64) else float(torch.finfo(dtype).eps)


def _run(module: nn.Module, inputs: Inputs, dtype: torch.dtype | None) -> list[Tensor]:
    ready = inputs.to(dtype)
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        if dtype == torch.float64:
            with in_fp64():
                output = module(*ready.args, **ready.kwargs)
        else:
            output = module(*ready.args, **ready.kwargs)
    return [t.detach().clone() for t in pytree.tree_leaves(output) if isinstance(t, Tensor)]


def _margins(router: Router) -> tuple[list[Tensor], torch.utils.hooks.RemovableHandle]:
    """Collects, for each token routed, how far its selection is from a tie."""
    found: list[Tensor] = []

    def watch(_module: nn.Module, _args: object, routing: tuple[Tensor, ...]) -> None:
        found.append(margin(routing[0].double(), router.spec))

    return found, router.register_forward_hook(watch)


def _relative(a: Tensor, b: Tensor, kept: Tensor | None, share: float) -> tuple[float, int]:
    """Relative error over the tokens whose selection is clear, and how many were left out."""
    if a.shape != b.shape:
        return float("inf"), 0
    a, b = a.double(), b.double()
    dropped = 0
    if kept is not None and not bool(kept.all()) and a.dim() >= 2:
        rows_a, rows_b = _by_token(a, len(kept)), _by_token(b, len(kept))
        if rows_a is not None and rows_b is not None and bool(kept.any()):
            dropped = int((~kept).sum())
            a, b = rows_a[kept], rows_b[kept]
    error = float((a - b).norm())
    if error == 0.0:
        return 0.0, dropped
    if not math.isfinite(error):
        return math.inf, dropped
    return error / max(float(b.norm()) * min(1.0, share), 1e-300), dropped


def _by_token(tensor: Tensor, tokens: int) -> Tensor | None:
    if tensor.numel() % tokens:
        return None
    width = tensor.numel() // tokens
    if tensor.shape[-1] == width:
        return tensor.reshape(tokens, width)
    return tensor.movedim(1, -1).reshape(tokens, width) if tensor.dim() >= 3 and tensor.shape[1] == width else None


def _where_finite(a: Tensor, b: Tensor, own: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros wherever the original itself overflows its dtype: there it says nothing about ours."""
    if a.shape != own.shape:
        return a, b, own
    finite = own.isfinite()
    return tuple(torch.where(finite, t, torch.zeros((), dtype=t.dtype)) for t in (a, b, own))  # type: ignore[return-value]


def _agrees(a: Tensor, b: Tensor, kept: Tensor | None) -> bool:
    """Whether an output beside the routed one is the same as in an fp64 run, ties and rounding aside."""
    if a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return _same_numbers(a, b, kept)
    exact = a.dtype in (torch.float32, torch.float64)
    a, b = a.double(), b.double()
    if bool((a.isnan() & ~b.isnan()).any()):
        return False
    finite = torch.isfinite(a) & torch.isfinite(b)
    tolerance = 1e-3 if exact else 5e-2
    return float((a - b)[finite].norm()) <= tolerance * max(float(b[finite].norm()), 1e-12)


def _same_numbers(a: Tensor, b: Tensor, kept: Tensor | None) -> bool:
    """Whether integers or truth values are equal, in any order within a token, where the selection is clear."""
    if torch.equal(a, b):
        return True
    if kept is None or not bool(kept.any()):
        return a.shape[-1:] == b.shape[-1:]
    rows_a, rows_b = _by_token(a, len(kept)), _by_token(b, len(kept))
    if rows_a is None or rows_b is None:
        return not bool(kept.all())
    return torch.equal(rows_a[kept].sort(-1).values, rows_b[kept].sort(-1).values)
