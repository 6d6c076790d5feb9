"""What a conversion cost: the model's own evaluation, agreement of outputs, and the error of each block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from latentize.errors import GateError, LatentizeError
from latentize.inputs import Batch, Inputs, observing
from latentize.memory import trim
from latentize.moe import LatentMoE
from latentize.taps import BlockCall, tapped

Evaluate = Callable[[nn.Module], Mapping[str, float]]
#: Positions that are compared in fp64 at a time.
_ROWS = 1024


@dataclass(frozen=True)
class Evaluation:
    """The model's own `evaluate` before and after: name -> value, the first being the one that should stay low.

    `initialised` holds the values of the rewritten model before healing, where they were measured.
    """

    original: Mapping[str, float]
    rewritten: Mapping[str, float]
    initialised: Mapping[str, float] | None = None

    @property
    def metric(self) -> str:
        """Name of the first value."""
        return next(iter(self.original))

    @property
    def rise(self) -> float:
        """Relative rise of the first value, 0.01 = 1 %; it is better when negative."""
        before, after = self.original[self.metric], self.rewritten[self.metric]
        return (after - before) / abs(before) if before else math.copysign(math.inf, after) if after else 0.0


@dataclass(frozen=True)
class OutputAgreement:
    """How close the rewritten model's outputs are to the original's on the same inputs.

    `relative` is ‖b − a‖/‖a‖ and `cosine` that of the whole output; `max_abs` the largest difference. Where the outputs
    are class scores: KL(original ‖ rewritten) per position in nats (mean, 99th percentile, worst) and the share of
    positions whose best class is the same; otherwise None.
    """

    positions: int
    max_abs: float
    relative: float
    cosine: float
    kl_mean: float | None = None
    kl_p99: float | None = None
    kl_worst: float | None = None
    top1: float | None = None


@dataclass(frozen=True)
class Gate:
    """One limit that a conversion had to keep: `value` <= `limit`. A value that is not a number does not keep it.

    What could not be `made` at all, for a reason that is among the warnings, fails too. `kind` says what is limited:
    what the conversion lost ("accuracy"), or how far what was exported is from PyTorch ("agreement").
    """

    name: str
    value: float
    limit: float
    passed: bool
    made: bool = True
    kind: Literal["accuracy", "agreement"] = "accuracy"

    @classmethod
    def unmade(cls, name: str) -> Gate:
        """The gate of something that could not be made."""
        return cls(name, math.inf, 0.0, passed=False, made=False, kind="agreement")

    @classmethod
    def of(cls, name: str, value: float, limit: float) -> Gate:
        """The gate of what a conversion lost, judged."""
        return cls(name, value, limit, passed=value <= limit)

    @classmethod
    def of_agreement(cls, name: str, value: float, limit: float) -> Gate:
        """The gate of how far something exported is from PyTorch, judged."""
        return cls(name, value, limit, passed=value <= limit, kind="agreement")

    def describe(self) -> str:
        """What it is and what it may be."""
        if not self.made:
            return f"{self.name}: none"
        return f"{self.name} is {self.value:.4g}, allowed {self.limit:.4g}"


def evaluate_pair(original: nn.Module, rewritten: nn.Module, evaluate: Evaluate) -> Evaluation:
    """Both models under the same `evaluate`, in eval mode, without gradients, from the same random state.

    Raises:
        LatentizeError: `evaluate` does not return a dict of names to numbers, or not the same names for both.
    """
    values = []
    for model in (original, rewritten):
        with observing(model):
            values.append(_numbers(evaluate(model)))
    before, after = values
    if list(before) != list(after):
        raise LatentizeError(
            f"evaluate: returned {', '.join(before)} for the original model and {', '.join(after)} for the rewritten "
            "one; return the same names for both"
        )
    return Evaluation(before, after)


def block_errors(
    teacher_blocks: Mapping[str, LatentMoE],
    student_blocks: Mapping[str, LatentMoE],
    model: nn.Module,
    batches: Iterable[Batch],
) -> dict[str, float]:
    """Relative error ‖student − teacher‖/‖teacher‖ of each block's routed output on the teacher's own inputs.

    Args:
        teacher_blocks: name -> block inside `model`, in canonical form.
        student_blocks: name -> the block that replaces it; names missing here are skipped.
        model: the teacher, with `teacher_blocks` in place; left as found.
        batches: tuples of args or dicts of kwargs.
    """
    sums = {name: [0.0, 0.0] for name in teacher_blocks if name in student_blocks}

    def measure(name: str, call: BlockCall) -> None:
        trim()
        difference = student_blocks[name](*call.inputs).double() - call.output.double()
        sums[name][0] += difference.square().sum().item()
        sums[name][1] += call.output.double().square().sum().item()

    watched = {name: teacher_blocks[name] for name in sums}
    with observing(model, *(student_blocks[name] for name in sums)), tapped(watched, measure):
        for batch in batches:
            Inputs.of(batch).call(model)
    return {name: _ratio(wrong, whole) for name, (wrong, whole) in sums.items()}


def output_agreement(original: nn.Module, rewritten: nn.Module, batches: Iterable[Batch]) -> OutputAgreement:
    """Both models' outputs on `batches` (tuples of args or dicts of kwargs), compared.

    The output compared is `logits` where the model returns one, else the first floating-point tensor. Its last axis is
    read as class scores when it is called logits or when the model's inputs are integers (token ids).
    """
    differences = Differences()
    with observing(original, rewritten):
        for batch in batches:
            inputs = Inputs.of(batch)
            a, named = main_output(inputs.call(original))
            b, _ = main_output(inputs.call(rewritten))
            if a.shape != b.shape:
                raise LatentizeError(
                    f"compare: the original returns {list(a.shape)} and the rewritten model {list(b.shape)} "
                    "for the same inputs; compare models of the same task"
                )
            differences.add(a, b, scores=named or inputs.whole_numbers)
    if not differences.positions:
        raise LatentizeError("compare: no batch to compare the models on; give at least one")
    return differences.result()


class Differences:
    """Pairs of outputs added up, a few thousand positions at a time, so that only the outputs themselves are held."""

    def __init__(self) -> None:
        self.positions = 0
        self._wrong = self._whole = self._other = self._dot = self._largest = 0.0
        self._divergences: list[Tensor] = []
        self._same = 0

    def add(self, a: Tensor, b: Tensor, *, scores: bool) -> None:
        """One more pair [..., c], `a` being right; `scores` says that the last axis holds class scores."""
        for rows_a, rows_b in zip(a.flatten(0, -2).split(_ROWS), b.flatten(0, -2).split(_ROWS), strict=True):
            self._add(rows_a.double(), rows_b.double(), scores)

    def _add(self, a: Tensor, b: Tensor, scores: bool) -> None:
        self._wrong += (b - a).square().sum().item()
        self._whole += a.square().sum().item()
        self._other += b.square().sum().item()
        self._dot += (a * b).sum().item()
        self._largest = _larger(self._largest, (b - a).abs().max().item() if a.numel() else 0.0)
        self.positions += a.shape[0]
        if scores:
            log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
            self._divergences.append(F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1))
            self._same += int((a.argmax(-1) == b.argmax(-1)).sum())

    def result(self) -> OutputAgreement:
        """What was added so far, as one agreement."""
        cosine = self._dot / math.sqrt(self._whole * self._other or 1.0)
        agreement = OutputAgreement(self.positions, self._largest, _ratio(self._wrong, self._whole), cosine)
        if not self._divergences:
            return agreement
        return _with_divergence(agreement, torch.cat(self._divergences), self._same)


def loss_gate(evaluation: Evaluation, max_loss: float) -> Gate:
    """The gate of `--max-loss`: the first value of `evaluate` may rise by the fraction `max_loss`."""
    return Gate.of(f"relative rise of {evaluation.metric}", evaluation.rise, max_loss)


def require(gates: Sequence[Gate], differs: str = "The report says by how much") -> None:
    """Do nothing when every gate passed.

    Args:
        gates: all of them.
        differs: what to do where an export differs from PyTorch, which neither compression nor healing changes.

    Raises:
        GateError: naming each gate that failed, its value and its limit.
    """
    failed = [gate for gate in gates if not gate.passed]
    if failed:
        what = "; ".join(gate.describe() for gate in failed)
        advice = {"accuracy": "Lower the compression, heal longer, or allow more", "agreement": differs}
        fitting = dict.fromkeys(advice[gate.kind] for gate in failed if gate.made) or ["The report says why"]
        raise GateError(f"gate failed: {what}. {'. '.join(fitting)}")


def main_output(output: Any) -> tuple[Tensor, bool]:
    """The tensor to compare in a model's output, and whether the model calls it logits.

    Raises:
        LatentizeError: the output holds no floating-point tensor.
    """
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits, True
    leaves = pytree.tree_leaves(output) if not isinstance(output, Mapping) else pytree.tree_leaves(dict(output))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.ndim]
    if not tensors:
        kind = type(output).__name__
        raise LatentizeError(f"compare: the model returns {kind}, which holds no floating-point tensor to compare")
    return tensors[0] if tensors[0].ndim > 1 else tensors[0].unsqueeze(0), False


def _with_divergence(agreement: OutputAgreement, divergence: Tensor, same: int) -> OutputAgreement:
    ordered = divergence.clamp_min(0).sort().values
    p99 = ordered[max(0, math.ceil(0.99 * len(ordered)) - 1)].item()
    return OutputAgreement(
        agreement.positions, agreement.max_abs, agreement.relative, agreement.cosine,
        kl_mean=divergence.mean().item(), kl_p99=p99, kl_worst=ordered[-1].item(), top1=same / agreement.positions,
    )  # fmt: skip


def _numbers(values: Any) -> dict[str, float]:
    good = isinstance(values, Mapping) and values and all(isinstance(name, str) for name in values)
    try:
        numbers = {name: float(value) for name, value in values.items()} if good else {}
    except (TypeError, ValueError):
        numbers = {}
    if not numbers:
        raise LatentizeError(
            f"evaluate: returned {values!r:.80}; expected a dict of names to numbers, the first lower is better, "
            "e.g. {'bits_per_byte': 1.84}"
        )
    return numbers


def _ratio(wrong: float, whole: float) -> float:
    if whole == 0.0:
        return 0.0 if wrong == 0.0 else math.inf
    return math.sqrt(wrong / whole)


def _larger(a: float, b: float) -> float:
    return b if math.isnan(b) else max(a, b)
