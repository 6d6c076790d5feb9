"""The record of one `latentize compare`: the original against the rewritten model, every backend against PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from latentize.bench import Latency
from latentize.compare import Evaluation, Gate, OutputAgreement

#: Which of the two models; exported files are made of both.
Which = Literal["original", "rewritten"]


@dataclass(frozen=True)
class LengthAgreement:
    """Outputs of the rewritten model against the original's, over sequences of `tokens` tokens, in PyTorch."""

    tokens: int
    sequences: int
    outputs: OutputAgreement


@dataclass(frozen=True)
class BackendAgreement:
    """One exported model against the PyTorch model that it was made of, over sequences of `tokens` tokens.

    `error` is relative, over the worst output: the smallest tolerance that passes. `outputs` compares the main output;
    None where the backend did not run or nothing could be compared, and `note` says why.
    """

    backend: str
    model: Literal["original", "rewritten"]
    tokens: int
    error: float
    tolerance: float
    passed: bool
    outputs: OutputAgreement | None = None
    note: str = ""


@dataclass(frozen=True)
class BlockSearch:
    """Blocks compared one after the other, in the model's order, until one is over the tolerance.

    `errors` has the relative error of each block that was compared. `first_over` is the block at which the search
    ended, "" where all are within `tolerance`, or where there is none to hold them to (`tolerance` None).
    """

    comparison: str
    tokens: int
    tolerance: float | None
    errors: Mapping[str, float]
    first_over: str = ""
    note: str = ""

    @property
    def worst(self) -> str:
        """The block with the largest error, "" where none was compared."""
        return max(self.errors, key=lambda name: self.errors[name]) if self.errors else ""


@dataclass(frozen=True)
class Memory:
    """Resident bytes that one call on `tokens` tokens took at most beyond what it found, weights not counted."""

    backend: str
    tokens: int
    original: int | None
    rewritten: int | None


@dataclass(frozen=True)
class Comparison:
    """Everything that one comparison measured. `required` is the smallest tolerance with which a backend passes."""

    date: str
    backends: tuple[str, ...]
    evaluation: Evaluation | None
    lengths: tuple[LengthAgreement, ...]
    agreement: tuple[BackendAgreement, ...]
    required: Mapping[str, float]
    blocks: tuple[BlockSearch, ...]
    latency: tuple[Latency, ...]
    memory: tuple[Memory, ...]
    files: Mapping[str, int]
    gates: tuple[Gate, ...]
    notes: tuple[str, ...] = ()
