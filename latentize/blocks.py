"""What `inspect` reports: one `Block` per MoE found, with the proof or the reason for refusing it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from latentize.spec import MoESpec


@dataclass(frozen=True)
class Probe:
    """One comparison of a lifted spec with the original block.

    `error` and `original_error` are relative errors ‖a − b‖/‖b‖ against the original in fp64: of the spec's reference
    forward, and of the original in its own dtype. `tied` tokens were left out because their selection is a tie.
    """

    name: str
    tokens: int
    error: float
    original_error: float
    tied: int = 0


@dataclass(frozen=True)
class Block:
    """One place in a model that looks like an MoE.

    `status` "moe": lifted, and proved unless `max_error` is None (structure only); "latent": it already has latent
    projections; "refused": left alone, for `reason`. `name` is the module path, or the graph's node.
    """

    name: str
    status: Literal["moe", "latent", "refused"]
    reason: str = ""
    spec: MoESpec | None = None
    max_error: float | None = None
    evidence: tuple[Probe, ...] = field(default=(), repr=False)
