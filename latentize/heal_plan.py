"""How long and how hard to heal, and what healing found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from latentize.load_balance import ExpertLoad


@dataclass(frozen=True)
class HealPlan:
    """The work of healing. Both stages warm up to a rate relative to the weights, then follow a cosine to zero.

    `block_steps` steps regress each block on the original's routed output, `block_tokens` tokens a step, the last
    `own_share` of them on what the block reads in the student, read anew every `own_steps` steps; `model_steps`
    steps, one calibration batch's worth of sequences each, distil the whole model. Each of them is taken in up to
    `pieces` smaller steps of at least `piece_tokens` tokens (half as many near the goal). Where the output is logits
    those read sequences chosen from a batch of their own (`latentize.heal_choice`), spliced where they are text. The
    `held_out` share of the batches (at most `held_out_limit`) is never trained on; it is measured `evaluations` times
    and decides which weights are kept. After `patience` measurements in a row without gain the rate falls, and then the
    stage ends early.
    An expert below `min_load` of the mean load is pushed above it. End to end, the relative squared error of what
    reaches each block is added to the loss with the weight `match_inputs`, which falls to zero over the steps.
    Near the goal, where the original predicts text, the token that really follows has the weight `text` in the target,
    and only the first `spliced` share of the end-to-end steps reads spliced text: then it is read as it was given.
    `activation_bytes` bounds the teacher activations kept at once, and what is kept of its outputs on held-out batches.
    End to end `train` "latent" trains the blocks and "all" everything that the student has, for which the student must
    share nothing with the original.
    """

    block_steps: int = 100
    model_steps: int = 400
    block_tokens: int = 1024
    own_share: float = 0.5
    own_steps: int = 25
    train: Literal["latent", "all"] = "latent"
    pieces: int = 4
    piece_tokens: int = 512
    block_rate: float = 0.12
    model_rate: float = 0.2
    warmup: float = 0.05
    held_out: float = 0.05
    held_out_limit: int = 12
    evaluations: int = 6
    patience: int = 4
    min_load: float = 0.1
    match_inputs: float = 4.0
    text: float = 0.1
    spliced: float = 0.6
    activation_bytes: int = 256 * 2**20
    save_seconds: float = 30.0

    @classmethod
    def chosen(cls, heal_steps: int | None = None, train: Literal["latent", "all"] = "latent") -> HealPlan:
        """The plan for `heal_steps` end-to-end steps, and a quarter as many block-wise; None chooses, 0 does nothing.

        The choice, 400 steps of one batch, is at most five minutes of two cores on a model of 1.8 M parameters and
        batches of 16 x 128 tokens.
        """
        if heal_steps is None:
            return cls(train=train)
        return cls(train=train, block_steps=(heal_steps + 3) // 4, model_steps=heal_steps)

    @property
    def steps(self) -> int:
        """Steps of both stages."""
        return self.block_steps + self.model_steps


@dataclass(frozen=True)
class BlockHealing:
    """One block on some of the held-out batches.

    Relative error against the original's routed output on the original's own inputs at the start, after the block-wise
    stage and at the end, which grows where the block makes up for others; its experts' load at the start and the end.
    """

    error_before: float
    error_after_blocks: float
    error_after: float
    load_before: ExpertLoad
    load_after: ExpertLoad


@dataclass(frozen=True)
class HealReport:
    """What healing did.

    `loss_*` is the distance to the original's output on the held-out batches, in the `loss_kind` of
    `latentize.distill.OutputLoss`; `curve` is (end-to-end step, training loss) and `held_out_curve` (end-to-end step,
    held-out loss). The weights kept are the best measured, so `loss_after` is never above `loss_before`. `outside` is
    how many parameters (numbers) outside the blocks were trained; with 0 everything outside is as it was.
    """

    blocks: Mapping[str, BlockHealing]
    loss_kind: str
    loss_before: float
    loss_after_blocks: float
    loss_after: float
    block_steps: int
    model_steps: int
    early_stopped: bool
    seconds: float
    curve: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    held_out_curve: tuple[tuple[int, float], ...] = field(default=(), repr=False)
    notes: tuple[str, ...] = ()
    outside: int = 0

    @property
    def improved(self) -> bool:
        """Whether the healed weights are better than the ones healing started from, which otherwise were kept."""
        return self.loss_after < self.loss_before
