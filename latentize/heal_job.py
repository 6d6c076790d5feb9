"""What both stages of healing share: the job, the state it can be resumed from, its measurements and its schedule."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from latentize.distill import OutputLoss
from latentize.errors import LatentizeError
from latentize.heal_choice import Choice
from latentize.heal_crew import Crew, Worker
from latentize.heal_load import RoutingTap, starved_experts
from latentize.heal_outside import OUTSIDE, OUTSIDE_RATE
from latentize.heal_pieces import pieces_of, sequences_of
from latentize.heal_plan import HealPlan
from latentize.heal_ranks import Ranks
from latentize.heal_splice import Text, padded, reading
from latentize.heal_state import Checkpoint, Trainables
from latentize.inputs import Batch, Inputs
from latentize.load_balance import ExpertLoad
from latentize.moe import LatentMoE
from latentize.progress import Progress
from latentize.soap import Soap

Stage = Literal["blocks", "model", "done"]

#: Measured over 400 steps: projections and routers may take larger relative steps than experts. Over 100 steps smaller
#: ones (0.35) look better for the projections, and end worse. A bypass is taken for a pair of projections.
RATE_FACTORS = {"latent_": 1.4, "bypass_": 1.4, "router.": 1.6}
#: How often a stage may go back to its best weights with a smaller rate before it ends, and the factor on the rate.
FALL_BACKS, FALL_BACK_RATE = 2, 0.3
#: The learning rate over the distance that is left to go, the root of a divergence or of a squared error: a larger one
#: moves a student that is close further away.
RATE_PER_DISTANCE = 0.47
#: The same where whole outputs are regressed on: a squared error says more of a student per token than a divergence.
OUTPUT_RATE_PER_DISTANCE = 1.5


@dataclass
class State:
    """Everything that changes while healing; plain values and tensors only, so that it can be saved."""

    loss_before: float
    errors_before: dict[str, float]
    loads_before: dict[str, list[int]]
    load_tokens: dict[str, int]
    best: list[Tensor]
    best_loss: float
    best_starved: int
    best_end_to_end: bool = False
    stage: Stage = "blocks"
    cursor: int = 0
    block_steps: int = 0
    model_steps: int = 0
    loss_after_blocks: float = math.nan
    errors_after_blocks: dict[str, float] = field(default_factory=dict)
    block_best: list[Tensor] = field(default_factory=list)
    block_best_errors: dict[str, float] = field(default_factory=dict)
    shares: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] | None = None
    rate_scale: float = 1.0
    stale: int = 0
    fall_backs: int = 0
    early_stopped: bool = False
    skipped: int = 0
    curve: list[list[float]] = field(default_factory=list)
    held_out_curve: list[list[float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def enter(self, stage: Stage) -> None:
        """Begin a stage with a fresh optimiser."""
        self.stage, self.optimizer, self.rate_scale, self.stale, self.fall_backs = stage, None, 1.0, 0, 0
        self.block_best, self.block_best_errors = [], {}


@dataclass
class Job:
    """One call of `heal`: the two models, what is trained, and how."""

    student: nn.Module
    teacher: nn.Module
    student_blocks: Mapping[str, LatentMoE]
    teacher_blocks: Mapping[str, LatentMoE]
    trainables: Trainables
    loss: OutputLoss
    train: Sequence[Batch]
    held_out: Sequence[Batch]
    targets: Sequence[Tensor] | None  # the teacher's main output on each of those, where it is held
    plan: HealPlan
    seed: int
    progress: Progress
    checkpoint: Checkpoint
    notes: list[str]
    step_sizes: list[float]
    pieces: int
    crew: Crew
    ranks: Ranks
    choice: Choice | None
    text_weight: float
    _saved_at: float = field(default_factory=time.monotonic)
    _clock: float = field(default_factory=time.monotonic)

    def begin(self, loss: float, errors: dict[str, float], loads: Mapping[str, ExpertLoad]) -> State:
        """The state before the first step.

        Raises:
            LatentizeError: the two models' outputs differ by something that is not a number.
        """
        if not math.isfinite(loss):
            raise LatentizeError(
                f"healing: the distance of the rewritten model's output from the original's is {loss} held out: "
                "the latent blocks give NaN or Inf there; initialise them again, from other calibration data or in a "
                "wider dtype"
            )
        counts = {name: list(load.counts) for name, load in loads.items()}
        return State(
            loss_before=loss,
            errors_before=dict(errors),
            loads_before=counts,
            load_tokens={name: load.tokens for name, load in loads.items()},
            best=self.trainables.snapshot(),
            best_loss=loss,
            best_starved=sum(starved_experts(c, self.plan.min_load) for c in counts.values()),
            shares={name: torch.tensor(c, dtype=torch.float64) / max(1, sum(c)) for name, c in counts.items()},
        )

    def resume(self, saved: dict[str, Any]) -> State:
        """The state that `save` wrote, with the weights and the random state of that moment put back."""
        masters, rng = saved.pop("masters"), saved.pop("rng")
        self.trainables.restore(masters)
        torch.set_rng_state(rng)
        return State(**saved)

    def agree(self) -> None:
        """All processes get the weights of rank 0."""
        self.ranks.agreed(self.trainables.masters)
        self.trainables.write()

    def save(self, state: State, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Write the state now, between two steps."""
        now = time.monotonic()
        state.seconds, self._clock = state.seconds + now - self._clock, now
        if not self.checkpoint.kept:
            return
        state.optimizer = None if optimizer is None else optimizer.state_dict()
        self.checkpoint.save({**vars(state), "masters": self.trainables.masters, "rng": torch.get_rng_state()})
        self._saved_at = time.monotonic()

    def after_step(self, state: State, optimizer: torch.optim.Optimizer, note: str, resumable: bool = True) -> None:
        """Tell the progress, and save where it is time and the step can be resumed from."""
        self.progress(state.block_steps + state.model_steps, self.plan.steps, note)
        if resumable and self.checkpoint.kept and time.monotonic() - self._saved_at > self.plan.save_seconds:
            self.save(state, optimizer)

    def optimizer(self, rate: float, saved: dict[str, Any] | None = None) -> Soap:
        """The optimiser over all masters, as `saved` where given; `rate` is relative to the size of each."""
        groups = []
        trained = self.trainables
        for (block, name), master, size in zip(trained.names, trained.masters, self.step_sizes, strict=True):
            factor = next((f for part, f in RATE_FACTORS.items() if part in name), 1.0)
            factor = OUTSIDE_RATE if block == OUTSIDE else factor
            groups.append(
                {"params": [master], "lr": rate * size, "rate": rate * factor * size, "keep_idle": block == OUTSIDE}
            )
        optimizer = Soap(groups, each=lambda update, them: self.crew.each(lambda _worker, it: update(it), them))
        if saved is not None:
            optimizer.load_state_dict(saved)
        return optimizer

    def apply(self, optimizer: torch.optim.Optimizer, gradients: Sequence[Tensor | None], rate_factor: float) -> None:
        """One step of the masters, and the parameters rounded from them."""
        for master, gradient in zip(self.trainables.masters, gradients, strict=True):
            master.grad = None if gradient is None else gradient.to(master.dtype)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * rate_factor
        optimizer.step()
        for master in self.trainables.masters:
            master.grad = None
        self.trainables.write()

    def train_batch(self, index: int) -> Batch:
        """The `index`-th batch of training: every batch once in each round, in an order of its own for each round."""
        return self.train[self._number(index)]

    def train_pieces(self, index: int, count: int) -> Iterator[Batch]:
        """What the `count` optimiser steps on the `index`-th batch's worth of sequences read, one after the other."""
        if self.choice is None:
            yield from pieces_of(self.train_batch(index), count)
            return
        for place in range(index * count, (index + 1) * count):
            number = self._number(place)
            batch = self.train[number]
            share = -(-sequences_of(batch) // count)
            yield self.choice.of(batch, number, share, self.generator(3, place))

    def _number(self, index: int) -> int:
        count = len(self.train)
        order = torch.randperm(count, generator=self.generator(index // count))
        return int(order[index % count])

    def generator(self, *key: int) -> torch.Generator:
        """A random generator for one purpose, the same whenever it is asked for."""
        value = self.seed
        for part in key:
            value = (value * 1_000_003 + part + 1) % (2**63 - 1)
        return torch.Generator().manual_seed(value)

    def reading(self, worker: Worker, batch: Batch, *key: int, spliced: bool = True) -> AbstractContextManager[Text]:
        """What both models of a worker read in one step, spliced or as it is: the same whenever it is asked for.

        Where there is padding nothing is spliced, and no text is found.
        """
        if padded(batch):
            return nullcontext(Text())
        return reading(worker.embeddings, (lambda: self.generator(2, *key)) if spliced else None)

    def measure(self) -> tuple[float, int]:
        """Held-out loss, and the number of experts below the least load there."""
        counts = {name: torch.zeros(b.spec.num_experts, dtype=torch.int64) for name, b in self.student_blocks.items()}
        wrong = whole = 0.0
        for far, out_of, seen in self.crew.each(self._measured, range(len(self.held_out))):
            wrong, whole = wrong + far, whole + out_of
            for name, selected in seen.items():
                counts[name] += selected
        loss = wrong / whole if whole else wrong
        starved = sum(starved_experts(c.tolist(), self.plan.min_load) for c in counts.values())
        found = torch.tensor([loss, float(starved)], dtype=torch.float64, device=self.trainables.masters[0].device)
        self.ranks.agreed([found])
        return found[0].item(), int(found[1])

    @torch.no_grad()
    def _measured(self, worker: Worker, number: int) -> tuple[float, float, dict[str, Tensor]]:
        """The two sums of the distance over one held-out batch, and the selections of each block's experts."""
        batch = self.held_out[number]
        inputs = Inputs.of(batch)
        target = inputs.call(worker.teacher) if self.targets is None else self.targets[number]
        with RoutingTap(worker.student_blocks) as tap:
            sums = self.loss.sums(inputs.call(worker.student), target, batch)
            return sums[0].item(), sums[1].item(), tap.counts()

    def better(self, loss: float, starved: int, state: State) -> bool:
        """Whether weights measured so are kept: no worse than the start, then no more starved experts, then loss."""
        at_start = sum(starved_experts(c, self.plan.min_load) for c in state.loads_before.values())
        now, best = max(starved, at_start), max(state.best_starved, at_start)
        return loss <= state.loss_before and (now, loss) < (best, state.best_loss)


def rate_for(largest: float, loss: float, per_distance: float = RATE_PER_DISTANCE) -> float:
    """The learning rate to begin with where the relative squared error or divergence is `loss`."""
    return min(largest, per_distance * math.sqrt(max(0.0, loss))) if math.isfinite(loss) else largest


def is_near(rate: float, largest: float) -> bool:
    """Whether a student that begins with the learning rate `rate` of at most `largest` is close to its teacher."""
    return rate <= largest / 2


def cosine(step: float, steps: int, warmup: float) -> float:
    """The factor on the learning rate: a linear rise over the `warmup` share of the steps, a cosine to zero overall."""
    rise = min(1.0, (step + 1) / max(1.0, warmup * steps))
    return rise * 0.5 * (1.0 + math.cos(math.pi * step / steps))


def is_evaluation(step: int, steps: int, evaluations: int) -> bool:
    """Whether the held-out batches are measured after `step` of `steps` steps: `evaluations` times, and at the end."""
    return step == steps or step * evaluations // steps > (step - 1) * evaluations // steps


class Subset(Sequence[Batch]):
    """Some of the batches, each read when it is asked for."""

    def __init__(self, batches: Sequence[Batch], indices: Sequence[int]) -> None:
        self._batches, self._indices = batches, indices

    def __len__(self) -> int:
        return len(self._indices)

    def pick(self, places: Sequence[int]) -> Subset:
        """The batches at some places of this subset."""
        return Subset(self._batches, [self._indices[i] for i in places])

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Subset: ...
    def __getitem__(self, index: int | slice) -> Batch | Subset:
        if isinstance(index, slice):
            return Subset(self._batches, self._indices[index])
        return self._batches[self._indices[index]]


def split_batches(calibration: Sequence[Batch], plan: HealPlan) -> tuple[Subset, Subset, list[str]]:
    """Batches to train on, evenly spread batches held out, and notes."""
    count = len(calibration)
    if count == 1:
        only = Subset(calibration, [0])
        return only, only, ["one calibration batch: it was both trained on and measured on"]
    held = max(1, min(plan.held_out_limit, round(plan.held_out * count)))
    chosen = sorted({(2 * i + 1) * count // (2 * held) for i in range(held)})
    rest = sorted(set(range(count)) - set(chosen))
    return Subset(calibration, rest), Subset(calibration, chosen), []
