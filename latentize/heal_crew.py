"""Several threads that heal one student: each has copies of both models that share their parameters, and takes a part.

A step of a small model is hundreds of operations too short for several threads each; a part of the batch for a thread,
which then works alone, keeps all cores busy. Parts are put together in their own order, so that a seed decides what
comes out, for a number of threads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from latentize.compare import main_output
from latentize.heal_pieces import pieces_of, sequences_of
from latentize.inputs import Batch, Inputs
from latentize.moe import LatentMoE
from latentize.passes.copying import deep_copy

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_R = TypeVar("_R")

#: Beyond so many threads the operations of each are given more threads instead.
MOST = 4
#: Bytes of buffers up to which each worker may have copies of its own.
BUFFER_BYTES = 256 * 2**20
#: Largest relative difference between what a copy and its original give.
_ALIKE = 1e-4


@dataclass(frozen=True)
class Worker:
    """What one thread heals with."""

    student: nn.Module
    teacher: nn.Module
    student_blocks: Mapping[str, LatentMoE]
    teacher_blocks: Mapping[str, LatentMoE]
    embeddings: Sequence[nn.Embedding]

    def twin(self) -> Worker:
        """The same with modules and buffers of its own, and the same parameters."""
        blocks = dict(self.student_blocks), dict(self.teacher_blocks)
        held = (self.student, self.teacher, *blocks, list(self.embeddings))
        modules = [self.student, self.teacher, *blocks[0].values(), *blocks[1].values()]
        shared = {id(p): p for module in modules for p in module.parameters()}
        return Worker(*deep_copy(held, shared))


class Crew:
    """Workers, the first of which has the models themselves; one worker needs no threads."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = list(workers)
        self._threads = torch.get_num_threads()
        self._pool: ThreadPoolExecutor | None = None

    def __len__(self) -> int:
        return len(self.workers)

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """The threads live while inside."""
        if len(self) == 1:
            yield
            return
        self._threads = torch.get_num_threads()
        share = max(1, self._threads // len(self))
        with ThreadPoolExecutor(len(self), "latentize-heal", torch.set_num_threads, (share,)) as self._pool:
            try:
                yield
            finally:
                self._pool = None
                torch.set_num_threads(self._threads)

    def each(self, work: Callable[[Worker, _T], _R], items: Sequence[_T]) -> list[_R]:
        """`work(worker, item)` for all items, side by side; results in the order of the items.

        The first worker takes the first of every `len(self)` items, and so on. Raises what `work` raises.
        """
        if self._pool is None or len(items) < 2:
            return [work(self.workers[0], item) for item in items]

        def some(number: int) -> list[_R]:
            return [work(self.workers[number], item) for item in items[number :: len(self)]]

        torch.set_num_threads(max(1, self._threads // len(self)))
        try:
            futures = [self._pool.submit(some, number) for number in range(min(len(self), len(items)))]
            found = [future.result() for future in futures]
        finally:
            torch.set_num_threads(self._threads)
        return [found[i % len(self)][i // len(self)] for i in range(len(items))]


def hire(first: Worker, batch: Batch, pieces: int) -> Crew:
    """As many workers as there are threads for, `MOST` at most.

    Args:
        first: the models themselves.
        batch: what a step is made of.
        pieces: how many steps it makes; with one it is not known that sequences can be taken apart.
    """
    alone = Crew([first])
    count = min(MOST, torch.get_num_threads(), sequences_of(batch) // max(1, pieces))
    models = nn.ModuleList([first.student, first.teacher])
    buffers = sum(buffer.nbytes for buffer in models.buffers())
    on_cpu = all(t.device.type == "cpu" for t in (*models.parameters(), *models.buffers()))
    if count < 2 or pieces < 2 or not on_cpu or buffers > BUFFER_BYTES:
        return alone
    try:
        crew = Crew([first, *(first.twin() for _ in range(count - 1))])
        parts = pieces_of(batch, count)
        with crew.at_work():
            found = crew.each(_outputs, parts)
        expected = [_outputs(first, part) for part in parts]
    except Exception as error:  # whatever a model has against being copied, or being run in a thread
        _log.info("healing in one thread: %s: %s", type(error).__name__, error)
        return alone
    same = all(_alike(a, b) for mine, its in zip(found, expected, strict=True) for a, b in zip(mine, its, strict=True))
    return crew if same else alone


@torch.no_grad()
def _outputs(worker: Worker, batch: Batch) -> tuple[Tensor, Tensor]:
    inputs = Inputs.of(batch)
    return main_output(inputs.call(worker.student))[0], main_output(inputs.call(worker.teacher))[0]


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool((a - b).norm() <= _ALIKE * b.norm())
